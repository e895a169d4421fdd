#!/bin/sh
# Builds a user's machine of the Debian before ours, whose RDP client is FreeRDP 2.11: build.sh debian12 TARGET.
set -eu
target=$2
mirror=${RDV_DEBIAN_MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Label: Debian' | head -n 1)}
export DEBIAN_FRONTEND=noninteractive LC_ALL=C
debootstrap --variant=minbase bookworm "$target" ${mirror:+"$mirror"}
cp "$(dirname "$0")/../dpkg-slim.cfg" "$target/etc/dpkg/dpkg.cfg.d/slim"
mount -t proc proc "$target/proc"
cat /etc/resolv.conf >"$target/etc/resolv.conf"
# No daemon may start while packages are being installed.
printf '#!/bin/sh\nexit 101\n' >"$target/usr/sbin/policy-rc.d"
chmod 0755 "$target/usr/sbin/policy-rc.d"
chroot "$target" apt-get -o Acquire::Retries=3 install -y -q --no-install-recommends \
	freerdp2-x11 xvfb xauth xdotool imagemagick ca-certificates
rm "$target/usr/sbin/policy-rc.d"
umount "$target/proc"
rm -rf "$target"/var/lib/apt/lists/* "$target"/var/cache/* "$target"/var/log/* "$target"/usr/share/doc/* "$target"/usr/share/man/* "$target"/usr/share/locale/*
: >"$target/etc/resolv.conf"
du -sh "$target" | sed 's/\t.*//' >"$target.size"
