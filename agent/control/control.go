// Package control acts on the desktops of this machine's RDP server: it logs one off, and shows its user a message.
//
//	desktop_linux.go  xrdp's sessions, by root on the machine (or in the container) that they run in
//	helper_linux.go   what runs there where the agent is in a container beside the desktops
//	wts*.go           Windows's Remote Desktop sessions, by the WTS API
//	remote.go         the agent's end of that helper's connection
//
// In a pod the agent sees neither the desktops' processes nor their displays. So the desktop's container runs the agent's
// program as a helper, root there, which connects to a socket in the login folder and does what it is told:
//
//	agent -> helper  {"id":1,"act":"message","uid":10345,"display":10,"text":"…"}
//	helper -> agent  {"id":1}                   done, or {"id":1,"error":"why not"}
//
// The agent obeys no helper: it only tells. It takes root's connections alone, by the kernel's word; the helper obeys
// whoever made the socket, which is in a folder that the desktops can't write.
package control

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"
)

// Desktop names one session of the RDP server.
type Desktop struct {
	// UID is of the user that it runs as.
	UID uint32
	// Display is its X display's number.
	Display int
}

func (d Desktop) String() string { return fmt.Sprintf("display :%d of user id %d", d.Display, d.UID) }

// Control acts on desktops. Local and *Remote do.
type Control interface {
	// LogOff ends a desktop and what runs in it, and returns when it is gone.
	LogOff(ctx context.Context, d Desktop) error
	// Message shows a text in a window on the desktop and doesn't wait until it is read.
	Message(ctx context.Context, d Desktop, text string) error
}

// ErrNoDesktop is of a desktop that isn't there.
var ErrNoDesktop = errors.New("the desktop is not there any more")

const (
	// SocketName is the agent's socket for the helper, in the login folder.
	SocketName = "sessions.sock"
	// maxMessage bounds one line between agent and helper, in bytes. A text of 2 KiB may grow sixfold as JSON.
	maxMessage = 16 << 10
	// actTimeout bounds what is done to one desktop.
	actTimeout = 20 * time.Second
)

// title stands over each message.
const title = "Message from your administrator"

const (
	actLogOff  = "logoff"
	actMessage = "message"
)

// command is what the agent tells the helper, and result its answer.
type command struct {
	ID      uint64 `json:"id"`
	Act     string `json:"act"`
	UID     uint32 `json:"uid"`
	Display int    `json:"display"`
	Text    string `json:"text,omitempty"`
}

type result struct {
	ID    uint64 `json:"id"`
	Error string `json:"error,omitempty"`
	// Gone says that Error is ErrNoDesktop.
	Gone bool `json:"gone,omitempty"`
}

func (c command) carryOut(ctx context.Context, by Control) error {
	d := Desktop{c.UID, c.Display}
	switch c.Act {
	case actLogOff:
		return by.LogOff(ctx, d)
	case actMessage:
		return by.Message(ctx, d, c.Text)
	}
	return fmt.Errorf("unknown act %q: are agent and desktop of one version?", c.Act)
}

// readLine reads one line of JSON into v.
func readLine(r *bufio.Reader, v any) error {
	line, err := r.ReadSlice('\n')
	switch {
	case errors.Is(err, bufio.ErrBufferFull):
		return fmt.Errorf("a message is longer than %d bytes", maxMessage)
	case err != nil:
		return err
	}
	return json.NewDecoder(strings.NewReader(string(line))).Decode(v)
}

func writeLine(w io.Writer, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if len(data) >= maxMessage {
		return fmt.Errorf("a message of %d bytes is longer than %d", len(data), maxMessage)
	}
	_, err = w.Write(append(data, '\n'))
	return err
}
