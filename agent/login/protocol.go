package login

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode"

	"rendezvous.dev/rendezvous/wire/bus"
)

// maxMessage bounds one message on the socket, its line break included, in bytes.
const maxMessage = 4 << 10

// ask is the helper's first message: PAM's items.
type ask struct {
	User    string `json:"user"`
	Remote  string `json:"remote"`
	Service string `json:"service"`
}

// answer is the agent's: either the account to log in to, or the end.
type answer struct {
	Account *bus.Account `json:"account,omitempty"`
	// Comment is for the account's list entry: whose it is.
	Comment string `json:"comment,omitempty"`
	OK      bool   `json:"ok,omitempty"`
	Error   string `json:"error,omitempty"`
}

// outcome is the helper's second message: the account's user id, or why there is none.
type outcome struct {
	UID    uint32 `json:"uid,omitempty"`
	Failed string `json:"failed,omitempty"`
}

// readMessage reads one line of JSON into v. Fields that are not known are refused: both ends are one program.
func readMessage(r *bufio.Reader, v any) error {
	line, err := r.ReadSlice('\n')
	switch {
	case errors.Is(err, bufio.ErrBufferFull):
		return fmt.Errorf("a message is longer than %d bytes", maxMessage)
	case err != nil:
		return err
	}
	d := json.NewDecoder(strings.NewReader(string(line)))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("more than one value in a message")
	}
	return nil
}

func writeMessage(w io.Writer, v any) error {
	data, err := json.Marshal(v)
	if err == nil && len(data) >= maxMessage {
		err = fmt.Errorf("a message of %d bytes is longer than %d", len(data), maxMessage)
	}
	if err != nil {
		return err
	}
	_, err = w.Write(append(data, '\n'))
	return err
}

// check says why a request can't be one of PAM's.
func (a ask) check() error {
	for name, v := range map[string]string{"user": a.User, "remote": a.Remote, "service": a.Service} {
		if v == "" || len(v) > 256 || strings.ContainsFunc(v, unicode.IsControl) {
			return fmt.Errorf("%s is empty, too long, or has control characters", name)
		}
	}
	return nil
}

// DefaultDir is the login folder where nothing else is said.
const DefaultDir = "/run/rendezvous-login"

// Files of a login folder: the agent's socket, and the helper for hosts that have no agent program of their own.
const (
	SocketName = "agent.sock"
	HelperName = "login"
)
