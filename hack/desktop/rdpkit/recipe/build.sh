#!/bin/sh
# Builds one root file system: build.sh base|desktop|client TARGET [BASE].
# Runs in a mount and PID namespace of its own, so that nothing mounted here, and no process, outlives a kill.
set -eu
kind=$1 target=$2 base=${3-}
here=$(dirname "$0")
suite=trixie
# The mirror that this machine installs from, where it is a Debian that knows one; else debootstrap's own.
mirror=${RDV_DEBIAN_MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Label: Debian' | head -n 1)}
export DEBIAN_FRONTEND=noninteractive LC_ALL=C

install_packages() {
	mount -t proc proc "$target/proc"
	cat /etc/resolv.conf >"$target/etc/resolv.conf"
	# No daemon may start while packages are being installed.
	printf '#!/bin/sh\nexit 101\n' >"$target/usr/sbin/policy-rc.d"
	chmod 0755 "$target/usr/sbin/policy-rc.d"
	chroot "$target" apt-get -o Acquire::Retries=3 install -y -q --no-install-recommends "$@"
	rm "$target/usr/sbin/policy-rc.d"
	umount "$target/proc"
}

slim() {
	rm -rf "$target"/var/lib/apt/lists/* "$target"/var/cache/* "$target"/var/log/* "$target"/tmp/*
	find "$target/etc" -name '*-' -type f -delete
}

case $kind in
base)
	debootstrap --variant=minbase "$suite" "$target" ${mirror:+"$mirror"}
	cp "$here/dpkg-slim.cfg" "$target/etc/dpkg/dpkg.cfg.d/slim"
	rm -rf "$target"/usr/share/doc/* "$target"/usr/share/man/* "$target"/usr/share/info/* "$target"/usr/share/locale/*
	rm -f "$target"/var/cache/apt/archives/*.deb
	;;
desktop)
	cp -a "$base/." "$target"
	install_packages $(sed 's/#.*//' "$here/desktop/packages")
	slim
	# What the package made for this one machine must not be shared by all: the RSA key of "classic" RDP security
	# (which the configuration refuses) and a self-signed certificate.
	rm -f "$target"/etc/xrdp/cert.pem "$target"/etc/xrdp/key.pem "$target"/etc/xrdp/rsakeys.ini
	rm -f "$target"/etc/ssl/private/ssl-cert-snakeoil.key "$target"/etc/ssl/certs/ssl-cert-snakeoil.pem
	cp -r "$here/desktop/root/." "$target"
	rm -r "$target/var/lib/extrausers"
	ln -s /run/rendezvous-login/accounts "$target/var/lib/extrausers"
	chmod 0755 "$target"/etc/xrdp/*.sh "$target"/usr/local/bin/*
	;;
client)
	cp -a "$base/." "$target"
	install_packages freerdp3-x11 xvfb xauth xdotool imagemagick x11-utils ca-certificates openssl procps
	slim
	;;
esac
: >"$target/etc/resolv.conf"
echo localhost >"$target/etc/hostname"
printf '127.0.0.1\tlocalhost\n' >"$target/etc/hosts"
du -sh "$target" | sed 's/\t.*//' >"$target.size"
