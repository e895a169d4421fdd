package e2e

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"rendezvous.dev/rendezvous/hack/desktop/rdpkit"
	"rendezvous.dev/rendezvous/hack/stage"
)

// bobAt is bob, signed in, at a machine with another client than ours. Not alice: Dex keeps one refresh token per user and
// client, so that her own machine would be signed out.
func bobAt(t *testing.T, ensure func(context.Context, *slog.Logger) (string, error)) *stage.User {
	t.Helper()
	grantBob(t)
	root, err := ensure(t.Context(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	u, err := w.NewSecondUser(t.Context(), rdpkit.Roots{Client: root})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(u.Close)
	if err := u.Login(t.Context(), "bob@example.test", "bob-demo"); err != nil {
		t.Fatal(err)
	}
	return u
}

// fetchFile has bob's machine get a connection file, as a browser or a feed reader would, and names it. activity is that of the download.
func fetchFile(t *testing.T, u *stage.User) (file, activity string) {
	t.Helper()
	file = "/root/desktop.rdp"
	out, err := u.Command(t.Context(), "sh", "-c", `rdv connect linux-desktop --print 2>&1 >"$0"`, file).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	_, rest, _ := strings.Cut(string(out), "activity ")
	activity, _, _ = strings.Cut(rest, "\n")
	return file, activity
}

// seesDesktop runs a client that nobody answers any question of, and wants bob's own desktop on at least a share of the screen,
// and keys to arrive there.
func seesDesktop(t *testing.T, u *stage.User, share float64, name string, argv ...string) {
	t.Helper()
	t.Cleanup(func() { endSessions(context.WithoutCancel(t.Context())) })
	p, err := u.Start(argv...)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Stop()
	ctx, cancel := context.WithTimeout(t.Context(), 40*time.Second)
	defer cancel()
	if _, err := u.WaitForColor(ctx, w.podColor, share); err != nil {
		picture(t, u, name)
		t.Fatalf("%v\n%s", err, tail(p.Output(), 30))
	}
	mark := "ok-" + name
	if err := u.Type(t.Context(), fmt.Sprintf("id -un > ran; rm ran && touch %s\n", mark)); err != nil {
		t.Fatal(err)
	}
	podSays(t, fmt.Sprintf("ls /home/bob/%s && rm /home/bob/%s", mark, mark), mark)
	picture(t, u, name)
}

// cameBy wants the relay to have seen a client of an activity by one transport.
func cameBy(t *testing.T, u *stage.User, activity, transport string) {
	t.Helper()
	if err := eventually(t.Context(), 15*time.Second, func() error {
		out, err := u.Rdv(t.Context(), "explain", activity)
		if err == nil && !strings.Contains(out, transport+" from ") {
			err = fmt.Errorf("no client came by %s:\n%s", transport, out)
		}
		return err
	}); err != nil {
		t.Error(err)
	}
}

// A user of Debian 12 has FreeRDP 2.11, whose WebSocket key is no base64. `rdv connect`, as it is, shows the desktop, and so
// does a file that was downloaded.
func TestFreeRDP2(t *testing.T) {
	u := bobAt(t, rdpkit.EnsureDebian12)
	rdv := []string{"rdv", "connect", "linux-desktop", "--", "/cert:deny", "/size:1280x720", "-decorations"}
	t.Run("WebSocket", func(t *testing.T) { seesDesktop(t, u, 0.3, "freerdp2", rdv...) })
	t.Run("two channels", func(t *testing.T) {
		seesDesktop(t, u, 0.3, "freerdp2-legacy", append(rdv, "/gt:http,no-websockets")...)
	})
	t.Run("file", func(t *testing.T) {
		file, _ := fetchFile(t, u)
		seesDesktop(t, u, 0.3, "freerdp2-file", "xfreerdp", file)
	})
}

// Somebody who has FreeRDP 3 and no rdv opens what was downloaded: no option, and no question.
func TestFreeRDP3OpensAFile(t *testing.T) {
	u := bobAt(t, func(context.Context, *slog.Logger) (string, error) { return w.roots.Client, nil })
	file, _ := fetchFile(t, u)
	seesDesktop(t, u, 0.3, "freerdp3-file", "xfreerdp3", file)
}

// Debian 13's Remmina shows the desktop in a window of its own, in every form that it speaks, and asks for nothing.
func TestRemmina(t *testing.T) {
	const share = 0.05 // a window of 640 by 480, with a terminal in it
	u := bobAt(t, rdpkit.EnsureRemmina)
	t.Run("rdv", func(t *testing.T) { seesDesktop(t, u, share, "remmina", "rdv", "connect", "linux-desktop") })
	t.Run("file", func(t *testing.T) {
		file, activity := fetchFile(t, u)
		seesDesktop(t, u, share, "remmina-file", "remmina", "-c", file)
		cameBy(t, u, activity, "tsgu-legacy")
	})
	t.Run("websockets ticked", func(t *testing.T) {
		file, activity := fetchFile(t, u)
		seesDesktop(t, u, share, "remmina-websockets", "remmina", "-c", remminaProfile(t, u, file, "websockets=1"))
		cameBy(t, u, activity, "tsgu-websocket")
	})
}

// remminaProfile is what Remmina saves of a connection file that it has opened, with further settings.
func remminaProfile(t *testing.T, u *stage.User, file string, settings ...string) (profile string) {
	t.Helper()
	text, err := u.Command(t.Context(), "iconv", "-f", "UTF-16", "-t", "UTF-8", file).Output()
	if err != nil {
		t.Fatal(err)
	}
	get := func(name string) string {
		for line := range strings.Lines(string(text)) {
			if value, ok := strings.CutPrefix(line, name+":s:"); ok {
				return strings.TrimSpace(value)
			}
		}
		t.Fatalf("the file has no line %q", name)
		return ""
	}
	profile = "/root/.local/share/remmina/desktop.remmina"
	lines := append([]string{"[remmina]", "protocol=RDP", "name=desktop", "server=" + get("full address"), "username=" + get("username"),
		"gateway_usage=1", "gateway_server=" + get("gatewayhostname"), "gatewayaccesstoken=" + get("gatewayaccesstoken")}, settings...)
	if err := u.WriteFile(profile, []byte(strings.Join(lines, "\n")+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	// Remmina encrypts passwords, with a key of its own.
	cmd := u.Command(t.Context(), "remmina", "--update-profile", profile, "--set-option", "password")
	cmd.Stdin = strings.NewReader(get("password") + "\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("remmina --update-profile: %v\n%s", err, out)
	}
	return profile
}
