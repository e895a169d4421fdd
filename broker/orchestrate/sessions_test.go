package orchestrate

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"rendezvous.dev/rendezvous/broker/model"
	"rendezvous.dev/rendezvous/broker/placement"
	"rendezvous.dev/rendezvous/broker/proof"
	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/identity"
	"rendezvous.dev/rendezvous/wire/refusal"
	"rendezvous.dev/rendezvous/wire/ticket"
)

// A full, draining host is asked first by whoever has a desktop there, so each row claims to be that host for alice. Only
// a proof of this very host and user makes it so.
func TestHostDrawsNobodyByClaim(t *testing.T) {
	w := newWorld(t, 1)
	a := w.agent(0, "pool", "a", 9)
	evil := w.agent(0, "pool", "evil", 9)
	w.fake.EditHost("evil", func(h *model.Host) { h.Drain = &model.Drain{}; h.Generation++ })
	gw := w.dial(0, identity.Gateway(ns, ws, "gw"))
	_, otherKey, _ := ed25519.GenerateKey(rand.Reader)
	forge := func(edit func(*proof.Claims)) string {
		real := w.key
		w.key = otherKey
		defer func() { w.key = real }()
		return w.proof("pool", "evil", "alice", edit)
	}
	for _, c := range []struct {
		name  string
		proof string
		edit  func(*bus.HostSession)
		drawn bool
	}{
		{name: "no proof"},
		{name: "no proof, and assumed", edit: func(s *bus.HostSession) { s.Assumed = true }},
		{name: "rubbish", proof: "rubbish"},
		{name: "a ticket", proof: w.ticket(nil)},
		{name: "another key's", proof: forge(nil)},
		{name: "another user's", proof: w.proof("pool", "evil", "bob", nil)},
		{name: "another host's", proof: w.proof("pool", "a", "alice", nil)},
		{name: "another pool's", proof: w.proof("personal", "evil", "alice", nil)},
		{name: "another workspace's", proof: w.proof("pool", "evil", "alice", func(c *proof.Claims) { c.Workspace = "other" })},
		{name: "of an object of that name from before", proof: w.proof("pool", "evil", "alice", func(c *proof.Claims) { c.HostUID = "before" })},
		{name: "expired", proof: w.proof("pool", "evil", "alice", func(c *proof.Claims) { c.Expires = time.Now().Add(-time.Minute) })},
		{name: "of another session", proof: w.proof("pool", "evil", "alice", nil), edit: func(s *bus.HostSession) { s.SessionID = "another" }},
		{name: "good", proof: w.proof("pool", "evil", "alice", nil), drawn: true},
		{name: "good, and assumed", proof: w.proof("pool", "evil", "alice", nil), edit: func(s *bus.HostSession) { s.Assumed = true }, drawn: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := bus.HostSession{User: "alice", State: bus.SessionDisconnected, Proof: c.proof}
			if c.edit != nil {
				c.edit(&s)
			}
			a.set(func() { a.sessions = nil })
			evil.set(func() {
				evil.sessions = []bus.HostSession{s, {User: "x", State: bus.SessionActive}, {User: "y", State: bus.SessionActive}}
			})
			want := "a"
			if c.drawn {
				want = "evil"
			}
			if reply := connectVia(t, gw, request(w.ticket(nil), nil)); reply.Host != want {
				t.Errorf("alice was sent to %q (%v), want %q", reply.Host, reply.Err, want)
			}
		})
	}
}

func TestPersonalHostIsNotAssignedByClaim(t *testing.T) {
	for _, c := range []struct {
		name  string
		proof func(w *world) string
	}{
		{"no proof", func(*world) string { return "" }},
		{"a proof from when it was hers", func(w *world) string { return w.proof("personal", "z-evil", "alice", nil) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t, 1)
			w.agent(0, "personal", "a", 1)
			evil := w.agent(0, "personal", "z-evil", 9)
			evil.set(func() {
				evil.sessions = []bus.HostSession{{User: "alice", State: bus.SessionDisconnected, Assumed: true, Proof: c.proof(w)}}
			})
			gw := w.dial(0, identity.Gateway(ns, ws, "gw"))
			target := brokerapi.PoolName(ns, "personal")
			reply := connectVia(t, gw, request(w.ticket(func(c *ticket.Claims) {
				c.Groups, c.Resource, c.Target = []string{"engineers"}, "mine", target
			}), func(r *bus.ConnectRequest) { r.Target = target }))
			if owner := w.fake.Snapshot().Hosts["z-evil"].AssignedUser; reply.Host != "a" || owner != "" {
				t.Errorf("sent to %q, z-evil is assigned to %q: %v", reply.Host, owner, reply.Err)
			}
		})
	}
}

// What a host claims takes its places: it can keep users off itself, as it could by refusing them.
func TestClaimedSessionsTakePlaces(t *testing.T) {
	w := newWorld(t, 1)
	a := w.agent(0, "pool", "a", 9)
	a.set(func() { a.sessions = []bus.HostSession{{User: "alice"}, {User: "bob"}} })
	gw := w.dial(0, identity.Gateway(ns, ws, "gw"))
	if reply := connectVia(t, gw, request(w.ticket(nil), nil)); reply.Err == nil || !strings.Contains(reply.Err.Message, "1 full") {
		t.Errorf("got %+v", reply)
	}
}

// A connect's proof goes to the host and comes back with its reports, so that every broker knows whose session it is.
func TestProofComesBack(t *testing.T) {
	w := newWorld(t, 2)
	a := w.agent(0, "pool", "a", 2)
	gw := w.dial(0, identity.Gateway(ns, ws, "gw"))
	req := request(w.ticket(func(c *ticket.Claims) { c.ID, c.Groups = "t7", []string{"engineers"} }), nil)
	if reply := connectVia(t, gw, req); reply.Err != nil {
		t.Fatal(reply.Err)
	}
	for i, b := range w.brokers {
		eventually(t, fmt.Sprintf("broker %d knows the session", i), func() bool { return len(b.LiveSessions()) == 1 })
		s := b.LiveSessions()[0]
		if s.User != "alice" || s.Resource != "desk" || !slices.Equal(s.Groups, []string{"engineers"}) || s.TicketID != "t7" || s.SessionID != req.SessionID ||
			s.Gateway != "gw" || s.Instance != req.Instance || s.Pool != "pool" || s.Host != "a" || !s.Connected || s.State != bus.SessionActive {
			t.Errorf("broker %d: %+v", i, s)
		}
	}
	// Its desktop stays when she leaves, and the claims with it.
	a.set(func() {
		a.sessions = []bus.HostSession{{User: "alice", State: bus.SessionDisconnected, Proof: a.sessions[0].Proof}, {User: "alice", State: bus.SessionActive, SessionID: "claimed"}}
	})
	if all := w.brokers[1].LiveSessions(); len(all) != 1 || all[0].Connected || all[0].User != "alice" {
		t.Errorf("got %+v", all)
	}
	// The SessionHost is made again under the same name: nothing was ever said of the new one.
	w.fake.EditHost("a", func(h *model.Host) { h.UID = "" })
	if all := w.brokers[1].LiveSessions(); len(all) != 0 {
		t.Errorf("made again: %+v", all)
	}
}

// testRegistry knows one host and the key of its proofs.
func testRegistry(t *testing.T, now *time.Time) (r *registry, k hostKey, prove func(user, session string) string, replaceKey func()) {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	r = newRegistry(func() time.Time { return *now })
	r.proofs = proofSource{ns, ws, func() (ed25519.PublicKey, error) { return key.Public().(ed25519.PublicKey), nil }}
	prove = func(user, session string) string {
		raw, err := proof.Sign(proof.Claims{
			Namespace: ns, Workspace: ws, Pool: "pool", Host: "a", HostUID: "uid", User: user, Resource: "desk", SessionID: session,
			Gateway: "gw", Instance: "i", IssuedAt: *now, Expires: now.Add(time.Hour),
		}, key)
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	return r, hostKey{"pool", "a"}, prove, func() { _, key, _ = ed25519.GenerateKey(rand.Reader) }
}

func reported(r *registry, k hostKey, uid string) []placement.Session {
	r.mu.Lock()
	defer r.mu.Unlock()
	sessions, _ := r.host(k).taken(uid, r.now(), r.spelling)
	return sessions
}

func TestProofsAreLookedAtOnceAndBounded(t *testing.T) {
	now := time.Unix(1_900_000_000, 0)
	r, k, prove, replaceKey := testRegistry(t, &now)
	sequence := uint64(0)
	report := func(sessions ...bus.HostSession) {
		sequence++
		r.report(k, bus.HostReport{Boot: "1", Sequence: sequence, Sessions: sessions})
	}
	left := func() float64 { return r.hosts[k].budget.TokensAt(now) }
	good := bus.HostSession{User: "alice", SessionID: "s1", State: bus.SessionActive, Proof: prove("alice", "s1")}
	bad := bus.HostSession{User: "bob", SessionID: "s2", State: bus.SessionActive, Proof: "x"}
	for range 5 {
		report(good, bad, good)
	}
	if spent := proofBurst - left(); spent != 2 {
		t.Errorf("five reports of the same two proofs had %v looked at, want 2", spent)
	}
	if s := reported(r, k, "uid"); len(s) != 3 || s[0].User != "alice" || s[1].User != "" {
		t.Errorf("got %+v", s)
	}
	if s := reported(r, k, "another"); s[0].User != "" {
		t.Errorf("of another object: %+v", s)
	}

	// Who shows ever new rubbish is held to a budget, in which its honest sessions keep what was found of them.
	flood := []bus.HostSession{good}
	for i := range maxReported * 2 {
		flood = append(flood, bus.HostSession{User: "bob", Proof: fmt.Sprint("rubbish ", i)})
	}
	report(flood...)
	if n := left(); n >= 1 {
		t.Errorf("%v proofs may still be looked at", n)
	}
	if s := reported(r, k, "uid"); len(s) != maxReported || s[0].User != "alice" || !s[0].Sent {
		t.Errorf("%d sessions, the first %+v", len(s), s[0])
	}
	late := bus.HostSession{User: "carol", SessionID: "s3", State: bus.SessionActive, Proof: prove("carol", "s3")}
	report(late)
	if s := reported(r, k, "uid"); s[0].User != "" {
		t.Errorf("looked at beyond the budget: %+v", s)
	}
	now = now.Add(sentLately)
	report(late)
	if s := reported(r, k, "uid"); s[0].User != "carol" || s[0].Sent {
		t.Errorf("a minute later: %+v", s)
	}

	replaceKey()
	report(late)
	if s := reported(r, k, "uid"); s[0].User != "" {
		t.Errorf("the ticket key was replaced: %+v", s)
	}
	replaceKey()
	fresh := late
	fresh.Proof = prove("carol", "s3")
	report(fresh)
	now = now.Add(2 * time.Hour)
	report(fresh)
	if s := reported(r, k, "uid"); s[0].User != "" {
		t.Errorf("expired since it was looked at: %+v", s)
	}
}

// Brokers tell each other what a host claims as no more than that a place is taken.
func TestPeersAreToldCheckedFacts(t *testing.T) {
	now := time.Unix(1_900_000_000, 0)
	r, k, prove, _ := testRegistry(t, &now)
	r.presence(k, "b/1", true, true)
	raw := prove("alice", "s1")
	r.report(k, bus.HostReport{Boot: "1", Sequence: 1, Sessions: []bus.HostSession{
		{User: "alice", SessionID: "s1", State: bus.SessionActive, Proof: raw, Resource: "lies", Account: "root", Gateway: "lies", Instance: "lies"},
		{User: "bob", SessionID: "s2", State: bus.SessionActive, Proof: raw, Resource: "lies", Account: "bob", ActivityID: "lies"},
		{User: "carol", State: bus.SessionDisconnected, Assumed: true},
		{User: "mallory", State: bus.SessionActive, Proof: raw}, // which is alice's
	}})
	want := []bus.HostSession{
		{User: "alice", SessionID: "s1", State: bus.SessionActive, Proof: raw, Resource: "desk", Gateway: "gw", Instance: "i"},
		{State: bus.SessionActive},
		{State: bus.SessionDisconnected, Assumed: true},
		{State: bus.SessionActive},
	}
	if got := r.mine()[0].Report.Sessions; !slices.Equal(got, want) {
		t.Errorf("told %+v, want %+v", got, want)
	}
}

// However much hosts report, no message of an introduction passes the bus's bound.
func TestIntroductionsAreSplit(t *testing.T) {
	w := newWorld(t, 1)
	b := w.brokers[0]
	const hosts = 40
	for i := range hosts {
		k := hostKey{"pool", fmt.Sprint("h", i)}
		b.live.presence(k, "broker-0/1", true, true)
		b.live.report(k, bus.HostReport{Pool: "pool", Host: k.host, Boot: "1", Sequence: 1, Message: strings.Repeat("m", 60<<10)})
	}
	w.fake.EditHost("huge", func(h *model.Host) { h.Pool = "pool" })
	// One has sessions whose proofs alone fill a message of the bus, and text that grows on the wire.
	huge := bus.HostReport{Pool: "pool", Host: "huge", Boot: "1", Sequence: 1, Message: strings.Repeat("<", 1<<20), AgentVersion: strings.Repeat("<", 1<<19)}
	for i := range maxReported {
		session := fmt.Sprint("s", i)
		huge.Sessions = append(huge.Sessions, bus.HostSession{User: "alice", SessionID: session, State: bus.SessionActive, Gateway: "gw", ActivityID: strings.Repeat("<", maxName),
			Proof: w.proof("pool", "huge", "alice", func(c *proof.Claims) {
				c.SessionID, c.Gateway, c.Instance = session, "gw", strings.Repeat("i", maxName)
			})})
	}
	b.live.presence(hostKey{"pool", "huge"}, "broker-0/1", true, true)
	b.live.report(hostKey{"pool", "huge"}, huge)
	nc, err := w.servers[0].Connect()
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	sub, err := nc.SubscribeSync(subjectHosts + ".late")
	if err != nil {
		t.Fatal(err)
	}
	data, _ := json.Marshal(helloMessage{"late", time.Now()})
	if err := nc.Publish(subjectHello, data); err != nil {
		t.Fatal(err)
	}
	var told *bus.HostReport
	for seen := 0; seen <= hosts; {
		m, err := sub.NextMsg(patience)
		if err != nil {
			t.Fatalf("%v after %d hosts", err, seen)
		}
		var msg hostsMessage
		if err := json.Unmarshal(m.Data, &msg); err != nil || len(m.Data) > maxIntroduced+1024 || len(msg.Hosts) > 1 && len(m.Data) > hostsMessageSize+1024 {
			t.Fatalf("%d bytes of %d hosts: %v", len(m.Data), len(msg.Hosts), err)
		}
		for _, data := range msg.Hosts {
			var s hostSeen
			if err := json.Unmarshal(data, &s); err != nil {
				t.Fatal(err)
			}
			if s.Report.Host == "huge" {
				told = &s.Report
			}
		}
		seen += len(msg.Hosts)
	}
	// Every place that is taken is told; whose the last are will be told by the host.
	if told == nil || len(told.Sessions) != maxReported || told.Sessions[0].User != "alice" || told.Sessions[maxReported-1] != (bus.HostSession{State: bus.SessionActive}) {
		t.Errorf("told of the huge one: %d sessions", len(told.Sessions))
	}
}

// Texts that hosts and gateways make up are held to a length before anything keeps them.
func TestReportsAreBounded(t *testing.T) {
	now := time.Unix(1_900_000_000, 0)
	r, k, prove, _ := testRegistry(t, &now)
	long := strings.Repeat("x", 1<<20)
	raw := prove("alice", "s1")
	r.report(k, bus.HostReport{
		Boot: "1", Sequence: 1, AgentVersion: "v1\x1b[2J" + long, OS: long, Message: long, CertificateFingerprint: long, CertificateNotAfter: long,
		LoginsRefused: map[string]uint64{"shared": 1, long: 1},
		Sessions: []bus.HostSession{
			{User: "alice", SessionID: "s1", State: bus.SessionActive, Proof: raw, Account: "alice"},
			{User: "alice", SessionID: "s1", State: bus.SessionActive, Proof: raw, Account: long},
			{User: "alice", SessionID: "s1", State: bus.SessionActive, Proof: raw, ActivityID: long},
			{User: "alice", SessionID: "s1", State: bus.SessionActive, Proof: long},
			{User: long, State: bus.SessionDisconnected},
			{User: "bob", State: long},
		},
	})
	got, _ := r.live(k, time.Hour)
	if data, err := json.Marshal(got.report); err != nil || len(data) > 8<<10 {
		t.Errorf("%d bytes are kept: %v", len(data), err)
	}
	if !strings.HasPrefix(got.report.AgentVersion, "v1 [2J") || len(got.report.Message) != refusal.MaxMessage || !maps.Equal(got.report.LoginsRefused, map[string]uint64{"shared": 1}) {
		t.Errorf("kept: %q %d %v", got.report.AgentVersion[:10], len(got.report.Message), got.report.LoginsRefused)
	}
	for i, s := range reported(r, k, "uid") {
		if want := map[bool]string{true: "alice"}[i == 0]; s.User != want || s.Disconnected != (i == 4) {
			t.Errorf("session %d: %+v, want it to be %q's", i, s, want)
		}
	}

	load := boundedLoad(bus.GatewayReport{Latencies: map[string]int64{"gw": 7, long: 1, "old": 2}}, []*model.Gateway{{Name: "gw"}, {Name: "silent"}})
	if !maps.Equal(load.Latencies, map[string]int64{"gw": 7}) {
		t.Errorf("latencies: %d", len(load.Latencies))
	}
	for i := range 2 * maxPods {
		r.gatewayReport(gatewayKey{"gw", fmt.Sprint(i)}, bus.GatewayReport{Sessions: 1})
	}
	r.gatewayReport(gatewayKey{"gw", "0"}, bus.GatewayReport{Sessions: 2})
	if loads := r.gatewayLoads(); loads["gw"].sessions != maxPods+1 {
		t.Errorf("a gateway counts %d sessions by pods that it makes up", loads["gw"].sessions)
	}
	now = now.Add(gatewaySilence)
	r.gatewayReport(gatewayKey{"gw", "new"}, bus.GatewayReport{Sessions: 3})
	if loads := r.gatewayLoads(); loads["gw"].sessions != 3 || len(r.gateways) != 1 {
		t.Errorf("pods that went keep new ones out: %+v", loads)
	}
}
