package relay

import (
	"io"
	"net/http"
	"testing"

	"rendezvous.dev/rendezvous/wire/wsframe"
)

func TestBytesPassBothWays(t *testing.T) {
	for _, mode := range modes {
		t.Run(mode, func(t *testing.T) {
			s := newStack(t, nil)
			c, a := s.session(mode)
			for range 3 {
				c.Write([]byte("\x03client"))
				expect(t, a, "\x03client")
				a.Write([]byte("\x03host"))
				expect(t, c, "\x03host")
			}
			if _, err := c.Conn.Write(wsframe.AppendMaskedFrame(nil, wsframe.Ping, []byte("hi"), maskKey)); err != nil {
				t.Fatal(err)
			}
			a.Write([]byte("x"))
			expect(t, c, "x")
			eventually(t, "all steps reported", func() bool {
				steps := map[uint32]bool{}
				for _, r := range s.adm.list() {
					if p := r.GetStep(); p != nil && p.ActivityId == c.header.Get("Activity-Id") && p.Workspace == "demo" {
						steps[p.Step] = true
					}
				}
				return steps[7] && steps[8] && steps[10] && steps[11] && steps[12]
			})
			c.Close()
			if _, err := io.ReadAll(a); err != nil && err != io.ErrUnexpectedEOF {
				t.Errorf("the agent's leg ended with %v", err)
			}
		})
	}
}

func TestPingForLatency(t *testing.T) {
	s := newStack(t, nil)
	c, err := s.dial(s.addr, testHost)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = http.StatusNoContent
}
