package agent

import (
	"bufio"
	"encoding/json"
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"

	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/identity"
	"rendezvous.dev/rendezvous/wire/refusal"
)

// Whatever comes as a broker's request to connect, what is taken names one pod, and can be dialled with TLS or not at all.
func FuzzHostConnect(f *testing.F) {
	good, err := json.Marshal(bus.HostConnect{
		ActivityID: "a", SessionID: "s", User: "alice", Address: "gw.example.test:443", ServerName: "gw.example.test", Instance: "10-0-0-1",
		JoinSecret: make([]byte, 32), Deadline: time.Unix(1_900_000_000, 0), Account: &bus.Account{Name: "alice", UID: 10001},
	})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(strings.ReplaceAll(string(good), "10-0-0-1", "evil.example.test")))
	f.Add([]byte(strings.ReplaceAll(string(good), "gw.example.test:443", "[::1]")))
	f.Add([]byte(`{"caBundle":"-----BEGIN CERTIFICATE-----"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var req bus.HostConnect
		if json.Unmarshal(data, &req) != nil {
			return
		}
		if refused := checkRequest(req); refused != nil {
			if refused.Code != refusal.BadRequest || refused.Message == "" {
				t.Fatalf("refused by %+v", refused)
			}
			return
		}
		if !identity.IsLabel(req.Instance) || len(req.JoinSecret) != 32 || req.SessionID == "" {
			t.Fatalf("taken: %+v", req)
		}
		conf, err := gatewayTLS(req, nil)
		if err != nil {
			return
		}
		if conf.VerifyConnection == nil || !strings.HasSuffix(conf.ServerName, ".join."+req.ServerName) {
			t.Fatalf("TLS to %q", conf.ServerName)
		}
	})
}

// Whatever a gateway answers to a join, but for 101, is a refusal that can be told.
func FuzzJoinAnswer(f *testing.F) {
	f.Add("HTTP/1.1 403 Forbidden\r\nContent-Length: 70\r\n\r\n{\"error\":{\"code\":\"join-secret-unknown\",\"message\":\"Used before.\"}}")
	f.Add("HTTP/1.1 403 \x1b[2J\r\n\r\n{\"error\":{\"code\":\"" + strings.Repeat("x", 3000) + "\",\"message\":\"\\u202e\"}}")
	f.Add("HTTP/1.1 503 Service Unavailable\r\nTransfer-Encoding: chunked\r\n\r\nffffffff\r\n")
	f.Fuzz(func(t *testing.T, answer string) {
		req := bus.HostConnect{Address: "gw.example.test:443", ActivityID: "a"}
		res, err := http.ReadResponse(bufio.NewReader(strings.NewReader(answer)), nil)
		if err != nil || res.StatusCode == http.StatusSwitchingProtocols {
			return
		}
		err = joinRefusal(req, res)
		var r *refusal.Error
		if !errors.As(err, &r) {
			if res.StatusCode < 500 {
				t.Fatalf("%d is %v", res.StatusCode, err)
			}
			return
		}
		if known := refusal.Received(r, ""); known.Code != r.Code || len(r.Message) > refusal.MaxMessage+4096 || r.ActivityID != "a" {
			t.Fatalf("refused by %+v", r)
		}
	})
}
