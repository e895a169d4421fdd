#!/bin/sh
# Serves RDP on 127.0.0.1:3389 until told to stop, the same way in a container and on a plain machine.
#
#   RDV_DESKTOP_USER, RDV_DESKTOP_PASSWORD  who may log in (demo, demo); several names with blanks between share the password.
#                                           One user has one session: a second connection takes it over from the first.
#   RDV_DESKTOP_COLOR                       colour of the session's root window, #rrggbb
#   RDV_RDP_CERT_DIR                        where the agent puts tls.crt and tls.key (/run/rdp-cert)
set -eu
certs=${RDV_RDP_CERT_DIR:-/run/rdp-cert}
installed=/run/xrdp-tls

say() { echo "desktop: $*"; }
die() { say "$*" >&2; exit 1; }

# install_pair takes a new certificate and key over, both or none. The agent replaces two files, so that for a moment they
# may not belong together; such a pair is left alone until the next look. xrdp runs as user xrdp and gets its own copy.
install_pair() {
	test -s "$certs/tls.crt" && test -s "$certs/tls.key" || return 0
	cmp -s "$certs/tls.crt" "$installed/current/tls.crt" && cmp -s "$certs/tls.key" "$installed/current/tls.key" && return 0
	next=$(mktemp -d "$installed/pair.XXXXXX")
	cp "$certs/tls.crt" "$certs/tls.key" "$next/"
	if test "$(openssl x509 -noout -pubkey -in "$next/tls.crt" 2>/dev/null)" = "$(openssl pkey -pubout -in "$next/tls.key" 2>/dev/null)"; then
		chown -R root:xrdp "$next"
		chmod 0750 "$next"
		chmod 0640 "$next/tls.crt" "$next/tls.key"
		old=$(readlink "$installed/current" || true)
		ln -s "${next##*/}" "$installed/new"
		mv -T "$installed/new" "$installed/current"
		say "serving the certificate $(openssl x509 -noout -serial -enddate -in "$next/tls.crt" | tr '\n' ' ')"
		test -z "$old" || rm -rf "${installed:?}/$old"
	else
		rm -rf "$next"
	fi
}

case ${RDV_DESKTOP_COLOR:-} in
'') ;;
'#'??????) mkdir -p /etc/rdv-desktop && echo "$RDV_DESKTOP_COLOR" >/etc/rdv-desktop/colour ;;
*) die "RDV_DESKTOP_COLOR=$RDV_DESKTOP_COLOR is not of the form #rrggbb" ;;
esac
for user in ${RDV_DESKTOP_USER:-demo}; do
	id "$user" >/dev/null 2>&1 || useradd --create-home --shell /bin/bash "$user"
	echo "$user:${RDV_DESKTOP_PASSWORD:-demo}" | chpasswd
done
unset RDV_DESKTOP_PASSWORD

# Left-overs of an earlier run in the same root would stop the next one.
rm -rf /run/xrdp /run/xrdp*.pid "$installed" /tmp/.X*-lock /tmp/.X11-unix
mkdir -m 1777 /tmp/.X11-unix
install -d -m 0750 -o root -g xrdp "$installed"
install -d -m 0755 -o root -g root /run/xrdp
# xrdp wants a key for "classic" RDP security even where the configuration refuses it: one of this machine's own.
test -e /etc/xrdp/rsakeys.ini || (umask 077; xrdp-keygen xrdp auto >/dev/null; chown xrdp /etc/xrdp/rsakeys.ini)
for log in xrdp xrdp-sesman; do : >"/var/log/$log.log"; done
chown xrdp /var/log/xrdp.log

xrdp='' sesman=''
stop() {
	trap - TERM INT
	kill $xrdp $sesman 2>/dev/null || true
	wait
	exit 0
}
trap stop TERM INT

say "waiting for tls.crt and tls.key in $certs"
while install_pair; ! test -e "$installed/current"; do
	sleep 0.2 & wait $!
done

xrdp-sesman --nodaemon & sesman=$!
setpriv --reuid xrdp --regid xrdp --init-groups xrdp --nodaemon & xrdp=$!
say "xrdp serves 127.0.0.1:3389"
while sleep 1 & wait $!; do
	kill -0 $xrdp 2>/dev/null || die "xrdp ended"
	kill -0 $sesman 2>/dev/null || die "xrdp-sesman ended"
	install_pair
done
