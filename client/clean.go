package client

import (
	"io"

	"rendezvous.dev/rendezvous/wire/terminal"
)

// What rdv prints of others' texts (a broker's, a provider's, a gateway's) goes through package terminal.

// Clean gives an error's text for a terminal.
func Clean(err error) string { return terminal.OneLine(err.Error()) }

// cleanError is an error whose text others had a hand in.
type cleanError struct{ error }

func (e cleanError) Error() string { return terminal.OneLine(e.error.Error()) }
func (e cleanError) Unwrap() error { return e.error }

// clean makes an error's text fit for a terminal.
func clean(err error) error {
	if err == nil {
		return nil
	}
	return cleanError{err}
}

func (c *Client) out() io.Writer { return terminal.Writer(c.Out) }
func (c *Client) err() io.Writer { return terminal.Writer(c.Err) }
