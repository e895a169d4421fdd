//go:build !linux

package login

import (
	"context"

	"rendezvous.dev/rendezvous/wire/bus"
)

// Help is for Linux, which has PAM.
func Help(context.Context, string, func(string) string) error { return errNotHere }

// Ensure is for Linux.
func Ensure(context.Context, bus.Account, string) (uint32, error) { return 0, errNotHere }

// BeginSession is for Linux.
func BeginSession(string) error { return errNotHere }
