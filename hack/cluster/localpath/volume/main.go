// Command volume makes and removes the folder of one volume on a node: what local-path-provisioner runs in a pod there, in
// place of its shell scripts.
package main

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "volume:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	flags := flag.NewFlagSet("volume", flag.ContinueOnError)
	path := flags.String("p", "", "folder of the volume")
	action := flags.String("a", "", "create or delete")
	flags.String("s", "", "size in bytes, which nothing holds to")
	flags.String("m", "", "mode of the volume: Filesystem")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if !filepath.IsAbs(*path) || filepath.Dir(*path) == "/" {
		return fmt.Errorf("-p %q is no folder below another", *path)
	}
	switch *action {
	case "create":
		if err := os.MkdirAll(*path, 0o777); err != nil {
			return err
		}
		return os.Chmod(*path, 0o777) // desktops run as users of their own
	case "delete":
		return os.RemoveAll(*path)
	}
	return fmt.Errorf("-a %q: want create or delete", *action)
}
