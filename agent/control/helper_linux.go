package control

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

const (
	redialEvery = time.Second
	// maxActs bounds what the helper does at one time.
	maxActs = 16
)

// Help is the helper: it connects to the agent's socket, does by control what it is told, and connects again when the
// agent goes, until ctx ends.
func Help(ctx context.Context, socket string, by Control, peer func(net.Conn) (uint32, error), log *slog.Logger) error {
	said := ""
	for {
		err := helpOnce(ctx, socket, by, peer, log)
		if ctx.Err() != nil {
			return nil
		}
		if now := fmt.Sprint(err); err != nil && now != said {
			said = now
			log.Info("no agent to help", "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(redialEvery):
		}
	}
}

func helpOnce(ctx context.Context, socket string, by Control, peer func(net.Conn) (uint32, error), log *slog.Logger) error {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	fi, err := os.Stat(socket)
	if err != nil {
		return err
	}
	uid, err := peer(conn)
	if err != nil {
		return err
	}
	if s, ok := fi.Sys().(*syscall.Stat_t); !ok || s.Uid != uid {
		return fmt.Errorf("user %d answers at %s, which is not its owner", uid, socket)
	}
	log.Info("helping the agent", "socket", socket, "agentUID", uid)
	in := bufio.NewReaderSize(conn, maxMessage)
	var writing sync.Mutex
	slots := make(chan struct{}, maxActs)
	for {
		var c command
		if err := readLine(in, &c); err != nil {
			return err
		}
		slots <- struct{}{}
		go func() {
			defer func() { <-slots }()
			ctx, cancel := context.WithTimeout(ctx, actTimeout)
			defer cancel()
			res := result{ID: c.ID}
			if err := c.carryOut(ctx, by); err != nil {
				res.Error, res.Gone = err.Error(), errors.Is(err, ErrNoDesktop)
			}
			log.Info("session helper", "act", c.Act, "uid", c.UID, "display", c.Display, "error", res.Error)
			writing.Lock()
			defer writing.Unlock()
			writeLine(conn, res)
		}()
	}
}
