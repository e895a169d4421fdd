#!/bin/sh
# Builds a root of the base and the packages that a folder beside this names: packages.sh FOLDER TARGET BASE.
set -eu
target=$2 base=$3
export DEBIAN_FRONTEND=noninteractive LC_ALL=C
cp -a "$base/." "$target"
mount -t proc proc "$target/proc"
cat /etc/resolv.conf >"$target/etc/resolv.conf"
# No daemon may start while packages are being installed.
printf '#!/bin/sh\nexit 101\n' >"$target/usr/sbin/policy-rc.d"
chmod 0755 "$target/usr/sbin/policy-rc.d"
chroot "$target" apt-get -o Acquire::Retries=3 install -y -q --no-install-recommends $(sed 's/#.*//' "$(dirname "$0")/$1/packages")
rm "$target/usr/sbin/policy-rc.d"
umount "$target/proc"
rm -rf "$target"/var/lib/apt/lists/* "$target"/var/cache/apt/*
: >"$target/etc/resolv.conf"
du -sh "$target" | sed 's/\t.*//' >"$target.size"
