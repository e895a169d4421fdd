package agent

import (
	"context"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// systemd hears that the agent serves before any broker has answered, then what it is at, and that it stops.
func TestNotify(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		t.Skip("no Unix datagram sockets here: ", err)
	}
	defer l.Close()
	t.Setenv("NOTIFY_SOCKET", socket)
	t.Setenv("WATCHDOG_USEC", "150000")
	a, err := New(Options{
		Broker: "https://127.0.0.1:1", TokenFile: filepath.Join(t.TempDir(), "absent"), Host: "h", StateDir: t.TempDir(), Log: slog.New(slog.NewTextHandler(io.Discard, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	ended := make(chan error, 1)
	go func() { ended <- a.Run(ctx) }()
	hear := func() string {
		t.Helper()
		buf := make([]byte, 4096)
		l.SetReadDeadline(time.Now().Add(10 * time.Second))
		n, err := l.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		return string(buf[:n])
	}
	if first := hear(); first != "READY=1" {
		t.Errorf("the first word to systemd is %q", first)
	}
	<-a.Ready()
	if left := os.Getenv("NOTIFY_SOCKET"); left != "" {
		t.Errorf("children would speak for the agent, by %s", left)
	}
	said := ""
	for range 50 {
		if said = hear(); strings.Contains(said, "no registration token") {
			break
		}
	}
	if !strings.HasPrefix(said, "STATUS=not enrolled yet: ") || !strings.HasSuffix(said, "\nWATCHDOG=1") || strings.Count(said, "\n") != 1 {
		t.Errorf("systemd hears %q", said)
	}
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
