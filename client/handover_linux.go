package client

import (
	"os"

	"golang.org/x/sys/unix"
)

// watchReads tells once somebody has read a file and closed it. ok is false where the kernel can't say.
func watchReads(path string) (read <-chan struct{}, stop func(), ok bool) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, func() {}, false
	}
	f := os.NewFile(uintptr(fd), "inotify")
	if _, err := unix.InotifyAddWatch(fd, path, unix.IN_CLOSE_NOWRITE); err != nil {
		f.Close()
		return nil, func() {}, false
	}
	done := make(chan struct{})
	go func() {
		if n, err := f.Read(make([]byte, unix.SizeofInotifyEvent+unix.NAME_MAX+1)); err == nil && n > 0 {
			close(done)
		}
	}()
	return done, func() { f.Close() }, true
}
