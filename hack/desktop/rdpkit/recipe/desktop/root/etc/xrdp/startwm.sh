#!/bin/sh
# One user's session: Xfce without a compositor, on a background of one colour. It ends when the user logs out.
cd || exit 1

die() { echo "startwm: $*" >&2; exit 1; }

# Without a cookie any user of this host could see and steer the session.
test -n "$(xauth list "$DISPLAY")" || die "no X cookie for $DISPLAY: is xauth installed?"

# Programs reach the X server by these sockets, the abstract one first; whoever had bound that one before would be the session's
# screen and keyboard. What listens must be a process of this user's: its sockets are found among the files that they have open.
ours() {
	inode=$(awk -v path="$1" '$4 == "00010000" && $8 == path { print $7 }' /proc/net/unix)
	test -n "$inode" && test -n "$(find /proc/[0-9]*/fd -lname "socket:\[$inode\]" 2>/dev/null)"
}
socket=/tmp/.X11-unix/X${DISPLAY#:}
socket=${socket%.*}
for path in "$socket" "@$socket"; do
	ours "$path" || die "$path is not this user's X server: another user of this host may be posing as it"
done

# Proof of whose session this is, for the user and for tests.
cat >.rdv-session.new <<EOF && mv .rdv-session.new .rdv-session
user=$(id -un)
uid=$(id -u)
host=$(uname -n)
display=${DISPLAY%.*}
started=$(date -u +%Y-%m-%dT%H:%M:%SZ)
EOF

: "${LANG:=C.UTF-8}"
export LANG
export XDG_SESSION_TYPE=x11 XDG_CURRENT_DESKTOP=XFCE DESKTOP_SESSION=xfce XDG_MENU_PREFIX=xfce- NO_AT_BRIDGE=1
# Where no logind made one (a container), a private folder of this session's.
if test -z "${XDG_RUNTIME_DIR:-}"; then
	XDG_RUNTIME_DIR=$(mktemp -d "/tmp/session-$(id -u)-XXXXXX") || exit 1
	export XDG_RUNTIME_DIR
	trap 'rm -rf "$XDG_RUNTIME_DIR"' EXIT
fi
# desktop-welcome paints the session's colour when the desktop is ready for its user.
xsetroot -solid '#101418' -cursor_name left_ptr
dbus-run-session -- xfce4-session
