//go:build !windows

package client

import (
	"errors"
	"os"
	"syscall"
)

// tryLock takes the lock on an open file, which ends with the file or its process. false says that another has it.
func tryLock(f *os.File) (bool, error) {
	err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		return false, nil
	}
	return err == nil, err
}
