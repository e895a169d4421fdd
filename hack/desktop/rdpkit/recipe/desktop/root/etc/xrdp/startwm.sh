#!/bin/sh
# One user's session: Xfce without a compositor, on a background of one colour. It ends when the user logs out.
cd || exit 1

# Without a cookie any user of this host could see and steer the session.
test -n "$(xauth list "$DISPLAY")" || { echo "startwm: no X cookie for $DISPLAY: is xauth installed?" >&2; exit 1; }

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
