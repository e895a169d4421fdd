package orchestrate

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	"rendezvous.dev/rendezvous/broker/model"
	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/refusal"
)

// Whatever a host reports, it is kept and told within bounds, and no session is anybody's without a proof.
func FuzzReport(f *testing.F) {
	for _, r := range []bus.HostReport{
		{Boot: "1", Sequence: 1, AgentVersion: "v1", OS: "linux/amd64", RDPReady: true, LoginsRefused: map[string]uint64{"shared": 1, "made-up": 2}},
		{Boot: "1", Sequence: 2, Message: "xrdp\x1b[2J", Sessions: []bus.HostSession{
			{User: "alice", SessionID: "s", State: bus.SessionActive, Since: time.Unix(1_900_000_000, 0).UTC(), Proof: "a.b.c", Gateway: "gw", Instance: "10-0-0-1"}, {User: "bob", Assumed: true, State: "odd"},
		}},
	} {
		data, err := json.Marshal(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var rep bus.HostReport
		if len(data) > 1<<20 || json.Unmarshal(data, &rep) != nil {
			return
		}
		now := time.Unix(1_900_000_000, 0)
		r, k, _, _ := testRegistry(t, &now)
		rep.Pool, rep.Host = k.pool, k.host // by the subject
		r.presence(k, "b/1", true, true)
		if !r.report(k, rep) {
			t.Fatal("a first report was dropped")
		}
		kept, _ := r.live(k, time.Hour)
		for _, text := range []string{kept.report.AgentVersion, kept.report.OS, kept.report.Boot, kept.report.Message, kept.report.CertificateFingerprint} {
			if len(text) > refusal.MaxMessage || strings.ContainsAny(text, "\n\x1b\u009b\u202e") {
				t.Errorf("kept %q", text)
			}
		}
		if len(kept.report.Sessions) > maxReported || len(kept.report.LoginsRefused) > len(bus.LoginReasons) {
			t.Errorf("%d sessions, %d reasons", len(kept.report.Sessions), len(kept.report.LoginsRefused))
		}
		for _, s := range reported(r, k, "uid") {
			if s.User != "" {
				t.Errorf("a session is %q's by the host's word", s.User)
			}
		}
		for _, s := range r.mine() {
			told, err := s.encode()
			if err != nil || len(told) > maxIntroduced {
				t.Fatalf("%d bytes are told: %v", len(told), err)
			}
			var again hostSeen
			if err := json.Unmarshal(told, &again); err != nil || len(again.Report.Sessions) != len(kept.report.Sessions) {
				t.Fatalf("the other broker reads %d sessions: %v", len(again.Report.Sessions), err)
			}
			if slices.ContainsFunc(again.Report.Sessions, func(s bus.HostSession) bool { return s.User != "" || s.Account != "" || s.Resource != "" }) {
				t.Error("another broker is told whose the sessions are")
			}
		}
		agentStatus(kept, true, model.AgentStatus{}, bus.HostConfig{})
	})
}

// Whatever a gateway reports, only round trips to the workspace's gateways are kept.
func FuzzGatewayReport(f *testing.F) {
	f.Add([]byte(`{"gateway":"gw","instance":"10-0-0-1","sessions":3,"pending":1,"maxSessions":9,"latencies":{"gw":7,"evil":-1}}`))
	f.Add([]byte(`{"sessions":-2147483648,"pending":2147483647,"draining":true}`))
	gateways := []*model.Gateway{{Name: "gw", Ready: true}, {Name: "other", Ready: true}}
	f.Fuzz(func(t *testing.T, data []byte) {
		var rep bus.GatewayReport
		if json.Unmarshal(data, &rep) != nil {
			return
		}
		now := time.Unix(1_900_000_000, 0)
		r := newRegistry(func() time.Time { return now })
		kept := boundedLoad(rep, gateways)
		if len(kept.Latencies) > len(gateways) {
			t.Errorf("latencies %v", kept.Latencies)
		}
		if kept.Sessions < 0 || kept.Pending < 0 || kept.MaxSessions < 0 {
			t.Errorf("a pod with %d sessions of %d and %d pending", kept.Sessions, kept.MaxSessions, kept.Pending)
		}
		r.gatewayReport(gatewayKey{"gw", "pod"}, kept)
		r.gatewayReport(gatewayKey{"other", "pod"}, bus.GatewayReport{Sessions: 5})
		if chosen, weighed := r.choose(gateways, "t", "gw", true); chosen == "" || len(weighed) != len(gateways) {
			t.Errorf("no gateway is chosen of %q", weighed)
		}
		for name, l := range r.gatewayLoads() {
			if l.connections() < 0 {
				t.Errorf("%s has %d connections", name, l.connections())
			}
		}
	})
}
