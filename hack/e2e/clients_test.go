package e2e

import (
	"context"
	"log/slog"
	"slices"
	"testing"
	"time"

	"rendezvous.dev/rendezvous/hack/desktop/rdpkit"
)

// A user of Debian 12 has FreeRDP 2.11, whose WebSocket key is no base64. `rdv connect`, as it is, shows the desktop.
func TestFreeRDP2(t *testing.T) {
	grantBob(t)
	root, err := rdpkit.EnsureDebian12(t.Context(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	u, err := w.NewSecondUser(t.Context(), rdpkit.Roots{Client: root})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(u.Close)
	// Not alice: Dex keeps one refresh token per user and client, so that her own machine would be signed out.
	if err := u.Login(t.Context(), "bob@example.test", "bob-demo"); err != nil {
		t.Fatal(err)
	}
	for name, args := range map[string][]string{
		"WebSocket":    nil,
		"two channels": {"/gt:http,no-websockets"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Cleanup(func() { endSessions(context.WithoutCancel(t.Context())) })
			p, err := u.Start(slices.Concat([]string{"rdv", "connect", "linux-desktop", "--", "/cert:deny", "/size:1280x720", "-decorations"}, args)...)
			if err != nil {
				t.Fatal(err)
			}
			defer p.Stop()
			ctx, cancel := context.WithTimeout(t.Context(), 40*time.Second)
			defer cancel()
			if _, err := u.WaitForColor(ctx, w.podColor, 0.3); err != nil {
				t.Fatalf("%v\n%s", err, tail(p.Output(), 30))
			}
			if err := u.Type(t.Context(), "id -un > freerdp2; rm freerdp2 && touch ok-freerdp2\n"); err != nil {
				t.Fatal(err)
			}
			podSays(t, "ls /home/bob/ok-freerdp2 && rm /home/bob/ok-freerdp2", "ok-freerdp2")
		})
	}
}
