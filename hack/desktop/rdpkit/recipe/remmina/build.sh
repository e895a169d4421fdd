#!/bin/sh
# Builds a user's machine whose RDP client is Debian 13's Remmina: build.sh remmina TARGET BASE.
set -eu
target=$2 base=$3
export DEBIAN_FRONTEND=noninteractive LC_ALL=C
cp -a "$base/." "$target"
mount -t proc proc "$target/proc"
cat /etc/resolv.conf >"$target/etc/resolv.conf"
# No daemon may start while packages are being installed.
printf '#!/bin/sh\nexit 101\n' >"$target/usr/sbin/policy-rc.d"
chmod 0755 "$target/usr/sbin/policy-rc.d"
chroot "$target" apt-get -o Acquire::Retries=3 install -y -q --no-install-recommends \
	remmina remmina-plugin-rdp dbus-daemon xvfb xauth xdotool imagemagick x11-utils ca-certificates procps
rm "$target/usr/sbin/policy-rc.d"
umount "$target/proc"
rm -rf "$target"/var/lib/apt/lists/* "$target"/var/cache/apt/* "$target"/var/log/*
: >"$target/etc/resolv.conf"
du -sh "$target" | sed 's/\t.*//' >"$target.size"
