//go:build !linux

package login

import "context"

// Help is for Linux, which has PAM.
func Help(context.Context, string, func(string) string) error { return errNotHere }
