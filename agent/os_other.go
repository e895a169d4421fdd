//go:build !windows

package agent

import "os"

// secureDir keeps other users out of the state folder.
func secureDir(dir string) error {
	fi, err := os.Stat(dir)
	if err != nil {
		return err
	}
	if fi.Mode().Perm()&0o077 == 0 {
		return nil
	}
	// A volume whose owner is another user (an emptyDir with fsGroup) can't be changed; the files are 0600 all the same.
	if err := os.Chmod(dir, 0o700); err != nil && !os.IsPermission(err) {
		return err
	}
	return nil
}

// syncDir makes the renames in dir survive a loss of power.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

func newInstaller(dir string) installer {
	if dir == "" {
		return nil
	}
	return newDirInstaller(dir)
}
