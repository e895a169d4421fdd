#!/bin/sh
# One user's session: a root window in one colour, and a terminal. The session ends with the terminal.
colour='#1f4e79'
test -r /etc/rdv-desktop/colour && read -r colour </etc/rdv-desktop/colour
cd || exit 1
xsetroot -solid "$colour" -cursor_name left_ptr
exec xterm -fa 'DejaVu Sans Mono' -fs 11 -geometry 64x14+40+40 -bw 0 -b 8 -bg '#101418' -fg '#e6edf3' \
	-title Rendezvous -e /bin/sh -c '
printf "\n  \033[1mRendezvous\033[0m\n\n  host  %s\n  user  %s\n  since %s\n\n" "$(uname -n)" "$(id -un)" "$(date "+%H:%M:%S %Z")"
printf "  Nothing listens for you here: this machine dialled out.\n\n"
PS1="$(id -un)@$(uname -n):\$ "; export PS1
exec /bin/sh -i'
