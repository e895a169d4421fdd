package fleet

import (
	"crypto/ed25519"
	"encoding/base64"
	"encoding/xml"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// corrupt changes the byte at one place of what passes, or leaves out what comes from there.
type corrupt struct {
	net.Conn
	at   int
	lose bool
}

func (c *corrupt) Write(p []byte) (int, error) {
	defer func() { c.at -= len(p) }()
	if c.at < 0 || c.at >= len(p) {
		return c.Conn.Write(p)
	}
	q := append([]byte{}, p...)
	if c.lose {
		_, err := c.Conn.Write(q[:c.at])
		return len(p), errors.Join(err, c.Conn.Close())
	}
	q[c.at] ^= 1
	return c.Conn.Write(q)
}

func TestStream(t *testing.T) {
	const chunks = 10
	for name, test := range map[string]struct {
		change func(net.Conn) net.Conn
		want   func(error) bool
	}{
		"all comes":        {func(c net.Conn) net.Conn { return c }, func(err error) bool { return err == nil }},
		"a byte changes":   {func(c net.Conn) net.Conn { return &corrupt{Conn: c, at: 3*(headLength+chunk) + 500} }, func(err error) bool { return errors.Is(err, errWrong) }},
		"a number changes": {func(c net.Conn) net.Conn { return &corrupt{Conn: c, at: 2*(headLength+chunk) + headLength - 1} }, func(err error) bool { return errors.Is(err, errWrong) }},
		"the end is missing": {func(c net.Conn) net.Conn { return &corrupt{Conn: c, at: 4*(headLength+chunk) + 5, lose: true} }, func(err error) bool {
			return errors.Is(err, io.ErrUnexpectedEOF)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a, b := net.Pipe()
				var sending sync.WaitGroup
				defer func() { a.Close(); b.Close(); sending.Wait() }()
				total := &tally{}
				client, host := newStream(test.change(a), [32]byte{7}, true, total), newStream(b, [32]byte{7}, false, total)
				sending.Go(func() { client.send() })
				time.AfterFunc(chunks*pace+pace/2, func() { close(client.stop) })
				err := host.receive()
				if !test.want(err) {
					t.Errorf("the host says %v", err)
				}
				if err == nil && host.checked.Load() != chunks*chunk {
					t.Errorf("%d bytes were checked, want %d", host.checked.Load(), chunks*chunk)
				}
			})
		})
	}
}

// What comes late is a stall, and what never comes is a drop.
func TestStall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := net.Pipe()
		var sending sync.WaitGroup
		defer func() { a.Close(); sending.Wait() }()
		total := &tally{}
		client, host := newStream(a, [32]byte{1}, true, total), newStream(b, [32]byte{1}, false, total)
		done := make(chan error, 1)
		go func() { done <- host.receive() }()
		time.Sleep(5 * time.Second)
		sending.Go(func() { client.send() })
		time.Sleep(2*pace + pace/2)
		if got := total.take().stall; got != 5*time.Second {
			t.Errorf("the longest stall was %s, want 5s", got)
		}
		b.Close()
		if err := <-done; err == nil || errors.Is(err, errWrong) {
			t.Errorf("a lost connection is %v", err)
		}
	})
}

func TestProviderSigns(t *testing.T) {
	public, private, _ := ed25519.GenerateKey(nil)
	p := &provider{issuer: "https://issuer", key: private}
	token, err := p.token("a@fleet.test")
	if err != nil {
		t.Fatal(err)
	}
	dot := strings.LastIndex(token, ".")
	signature, err := base64.RawURLEncoding.DecodeString(token[dot+1:])
	if err != nil || !ed25519.Verify(public, []byte(token[:dot]), signature) {
		t.Error("the token's signature is wrong")
	}
}

func TestReport(t *testing.T) {
	r := &Report{Machine: "2 CPUs <x>", Sessions: 2, Rows: []Row{{Step: "relay image", Ended: 12, Sessions: 2, Checked: 1 << 20, Connects: 3, Stall: time.Second, Pods: 3, Draining: 1}},
		Seconds: []second{{Live: 2, Checked: 10}, {Live: 2, Checked: 20, Stall: time.Second}}}
	if got := r.Markdown(); !strings.Contains(got, "| relay image | 12 | 2 | 0 | 1.0 | 3 | 0 | 0.0 | 1.0 | 3 + 1 |") {
		t.Errorf("the table lacks the row:\n%s", got)
	}
	var any struct{}
	if err := xml.Unmarshal(r.Plot(), &any); err != nil {
		t.Errorf("the plot is no XML: %v", err)
	}
}

func TestChoose(t *testing.T) {
	if _, err := choose([]string{"relay image", "nonsense"}); err == nil || !strings.Contains(err.Error(), "nonsense") {
		t.Errorf("an unknown step is %v", err)
	}
	if got, err := choose(nil); err != nil || len(got) != len(steps) {
		t.Errorf("no names choose %d steps, %v", len(got), err)
	}
}
