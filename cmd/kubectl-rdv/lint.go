package main

import (
	"encoding/json"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"rendezvous.dev/rendezvous/lint"
)

// exitError ends the program with a code of its own.
type exitError struct {
	code    int
	message string
}

func (e *exitError) Error() string { return e.message }

// Exit codes of lint.
const (
	exitFindings = 1
	exitNotDone  = 2
)

// lintCommand checks manifests for CI and pre-commit.
func lintCommand(out io.Writer) *cobra.Command {
	var strict bool
	var format string
	c := &cobra.Command{
		Use: "lint FILE|FOLDER|-...", Short: "Check manifests of ours without a cluster",
		Long: `Check manifests without a cluster: by the definitions of the four kinds, and by the operator's own rules, which a
server-side dry run doesn't know (pod templates, references among the files, hostnames that stand twice). Other kinds are
ignored, but for what ours refer to. Folders are read with all .yaml, .yml and .json files below; - is standard input:

    kustomize build overlays/prod | kubectl rdv lint -

Exit code: 0 nothing is wrong, 1 something is, 2 it could not be checked. Warnings count with --strict alone.`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return &exitError{exitNotDone, "which files? Name files, folders, or - for standard input"}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			sources, err := lint.Read(args, cmd.InOrStdin())
			if err != nil {
				return &exitError{exitNotDone, err.Error()}
			}
			result, err := lint.Check(cmd.Context(), sources)
			if err != nil {
				return &exitError{exitNotDone, err.Error()}
			}
			switch format {
			case "json":
				if err := json.NewEncoder(out).Encode(result); err != nil {
					return err
				}
			case "", "text":
				for _, f := range result.Findings {
					fmt.Fprintln(out, f)
				}
				fmt.Fprintf(out, "%d objects of ours checked, %d of others passed over: %d errors, %d warnings\n", result.Checked, result.Others,
					result.Errors(), len(result.Findings)-result.Errors())
			default:
				return &exitError{exitNotDone, fmt.Sprintf("-o %s: want text or json", format)}
			}
			if n := result.Errors(); n > 0 {
				return &exitError{exitFindings, fmt.Sprintf("%d errors in the manifests", n)}
			}
			if n := len(result.Findings); strict && n > 0 {
				return &exitError{exitFindings, fmt.Sprintf("%d warnings, and --strict counts them", n)}
			}
			return nil
		},
	}
	c.Flags().BoolVar(&strict, "strict", false, "let warnings count as errors")
	c.Flags().StringVarP(&format, "output", "o", "", "text (default) or json")
	return c
}
