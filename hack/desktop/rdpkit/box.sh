# First process of a box: box.sh ROOT DIR HOSTNAME NETNS sleep|systemd [MODE HOST-PATH BOX-PATH]...
# Runs in fresh namespaces; each mount made here vanishes with them.
set -eu
lower=$1 dir=$2 name=$3 netns=$4 first=$5
shift 5
# /proc is still the host's, so this is the number that the host knows this process by.
read -r pid rest </proc/self/stat
r=$dir/root

mount -t overlay overlay -o "lowerdir=$lower,upperdir=$dir/upper,workdir=$dir/work" "$r"
mount -t proc proc "$r/proc"
mount -t tmpfs -o mode=755 tmpfs "$r/run"
mount -t tmpfs -o mode=1777 tmpfs "$r/tmp"
mount -t tmpfs -o mode=755 tmpfs "$r/dev"
mkdir "$r/dev/pts" "$r/dev/shm"
for d in null zero full random urandom tty; do
	: >"$r/dev/$d"
	mount --bind "/dev/$d" "$r/dev/$d"
done
mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts "$r/dev/pts"
mount -t tmpfs -o mode=1777 tmpfs "$r/dev/shm"
ln -s pts/ptmx "$r/dev/ptmx"
ln -s /proc/self/fd "$r/dev/fd"
ln -s /proc/self/fd/0 "$r/dev/stdin"
ln -s /proc/self/fd/1 "$r/dev/stdout"
ln -s /proc/self/fd/2 "$r/dev/stderr"

while test $# -gt 0; do
	mode=$1 from=$2 to=$r$3
	shift 3
	if test -d "$from"; then
		mkdir -p "$to"
	else
		mkdir -p "${to%/*}"
		test -e "$to" || : >"$to"
	fi
	mount --bind "$from" "$to"
	test "$mode" = rw || mount -o remount,bind,ro "$to"
done

hostname "$name"
printf '127.0.1.1\t%s\n' "$name" >>"$r/etc/hosts"
test -z "$netns" || ip link set lo up

if test "$first" = systemd; then
	mount -t sysfs -o ro sysfs "$r/sys"
	mount -t cgroup2 cgroup2 "$r/sys/fs/cgroup"
	# Not chroot: units with mount namespaces of their own need a real root.
	cd "$r"
	pivot_root . mnt
	umount -l /mnt
	echo "ready $pid"
	exec env -i container=box PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd >/dev/null 2>&1 </dev/null
fi

# From here on it only reaps what its children leave behind.
exec chroot "$r" /bin/sh -c 'echo "ready $1"; exec >/dev/null 2>&1 </dev/null; while :; do sleep 3600 & wait; done' init "$pid"
