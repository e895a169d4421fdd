package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/spf13/cobra"
)

// linter is the program that knows Kubernetes, which rdv on people's machines need not carry.
const linter = "kubectl-rdv"

// errLintNotDone says that nothing was checked: exit code 2, as the linter's own.
var errLintNotDone = errors.New("nothing was checked")

// lintCommand hands over to kubectl-rdv, beside this program or in PATH.
func lintCommand() *cobra.Command {
	return &cobra.Command{
		Use: "lint FILE|FOLDER|-...", Short: "Check Kubernetes manifests without a cluster (by kubectl-rdv)",
		DisableFlagParsing: true,
		// Another rdv's state is of no concern here.
		PersistentPreRun: func(*cobra.Command, []string) {},
		RunE: func(cmd *cobra.Command, args []string) error {
			path, err := findLinter()
			if err != nil {
				return err
			}
			child := exec.CommandContext(cmd.Context(), path, append([]string{"lint"}, args...)...)
			child.Stdin, child.Stdout, child.Stderr = os.Stdin, os.Stdout, os.Stderr
			err = child.Run()
			var exit *exec.ExitError
			if errors.As(err, &exit) && exit.ExitCode() > 0 { // it has said why
				os.Exit(exit.ExitCode())
			}
			return err
		},
	}
}

func findLinter() (string, error) {
	if self, err := os.Executable(); err == nil {
		beside := filepath.Join(filepath.Dir(self), linter)
		if info, err := os.Stat(beside); err == nil && info.Mode().IsRegular() {
			return beside, nil
		}
	}
	path, err := exec.LookPath(linter)
	if err != nil {
		return "", fmt.Errorf("%w: manifests are checked by %s, which is neither beside rdv nor in PATH: install it from the same release", errLintNotDone, linter)
	}
	return path, nil
}
