package client

import (
	"context"
	"fmt"
	"path/filepath"
	"time"
)

// Some clients (Remmina) hand the file on to the instance of theirs that runs already, and end at once: the file must be
// there until that one has read it.
const (
	// handsOverWithin is how soon such a client ends. One that ran for longer has read its file.
	handsOverWithin = 10 * time.Second
	// handOverTime is how long the file is kept then; handOverBlind, where nobody can tell whether it was read.
	handOverTime  = 30 * time.Second
	handOverBlind = 10 * time.Second
)

// handOver waits for a file to be read by whomever a client has handed it on to. read is as watchReads gives it, nil where
// nobody can tell.
func (c *Client) handOver(ctx context.Context, program string, read <-chan struct{}) {
	limit := handOverTime
	if read == nil {
		limit = handOverBlind
	}
	select {
	case <-read:
		return
	default:
	}
	fmt.Fprintf(c.Err, "%s ended at once: it may have handed the connection file on; the file is kept for %s more\n", filepath.Base(program), limit)
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-read:
	case <-timer.C:
	case <-ctx.Done():
	}
}
