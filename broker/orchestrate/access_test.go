package orchestrate

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/prometheus/client_golang/prometheus"

	"rendezvous.dev/rendezvous/broker/model"
	"rendezvous.dev/rendezvous/broker/proof"
	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/identity"
	"rendezvous.dev/rendezvous/wire/refusal"
	"rendezvous.dev/rendezvous/wire/ticket"
	"rendezvous.dev/rendezvous/wire/trace"
)

// soon is within what access that was taken back is to have ended.
const soon = 5 * time.Second

// pod is a gateway pod that ends sessions as it is told, unless it is deaf.
type pod struct {
	w      *world
	nc     *nats.Conn
	agents []*agent

	mu   sync.Mutex
	deaf int // commands that it doesn't obey
	told []bus.EndSession
}

func (w *world) pod(replica int, agents ...*agent) *pod {
	w.t.Helper()
	p := &pod{w: w, nc: w.dial(replica, identity.Gateway(ns, ws, "gw")), agents: agents}
	if _, err := p.nc.Subscribe(bus.GatewayEndSubject("gw", "10-0-0-1"), func(m *nats.Msg) {
		var cmd bus.EndSession
		json.Unmarshal(m.Data, &cmd)
		p.mu.Lock()
		p.told = append(p.told, cmd)
		p.deaf--
		obey := p.deaf < 0
		p.mu.Unlock()
		if obey {
			for _, a := range p.agents {
				a.end(cmd.SessionID)
			}
		}
	}); err != nil {
		w.t.Fatal(err)
	}
	if err := p.nc.Flush(); err != nil {
		w.t.Fatal(err)
	}
	return p
}

// commands are those about a session.
func (p *pod) commands(session string) (all []bus.EndSession) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.told {
		if c.SessionID == session {
			all = append(all, c)
		}
	}
	return all
}

// connect begins a session by a ticket.
func (p *pod) connect(raw string) (session string) {
	p.w.t.Helper()
	r := request(raw, func(r *bus.ConnectRequest) { r.Target = "" })
	if reply := connectVia(p.w.t, p.nc, r); reply.Err != nil {
		p.w.t.Fatal(reply.Err)
	}
	return r.SessionID
}

// editWorkspace changes a copy of the Workspace.
func (w *world) editWorkspace(f func(*model.Workspace)) {
	w.fake.Edit(func(s *model.Snapshot) {
		c := *s.Workspace
		c.Resources = slices.Clone(c.Resources)
		f(&c)
		s.Workspace = &c
	})
}

func (w *world) revoke(r model.Revocation) {
	w.editWorkspace(func(ws *model.Workspace) { ws.Revocations = append(slices.Clone(ws.Revocations), r) })
}

// ended is how many sessions a broker says it had ended.
func ended(t *testing.T, b *Orchestrator, cause string) (n float64) {
	t.Helper()
	reg := prometheus.NewRegistry()
	reg.MustRegister(b.o.Metrics.SessionsEnded)
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if m.GetLabel()[0].GetValue() == cause {
				n += m.GetCounter().GetValue()
			}
		}
	}
	return n
}

const ticketID = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

// What is taken back ends the session that rests on it, and no other, and doesn't let its user back.
func TestTakenBack(t *testing.T) {
	signedIn := time.Now().Add(-time.Hour).Truncate(time.Second)
	byGroup := func(c *ticket.Claims) { c.User, c.Groups = "yan", []string{"engineers"} }
	for _, c := range []struct {
		name   string
		ticket func(*ticket.Claims) // alice, who is granted by name, if nil
		act    func(*world)
		cause  string
		code   refusal.Code
		says   string
	}{
		{"a user is disabled", nil, func(w *world) { w.revoke(model.Revocation{User: "alice", Reason: "left the company"}) }, causeUser, refusal.Revoked, "alice is disabled in workspace ws (left the company)"},
		{"a user is disabled, spelt otherwise", nil, func(w *world) { w.revoke(model.Revocation{User: "ALICE"}) }, causeUser, refusal.Revoked, "alice is disabled in workspace ws:"},
		{"what a user signed in to before", nil, func(w *world) {
			w.revoke(model.Revocation{User: "alice", Before: signedIn.Add(time.Second), Reason: "lost laptop"})
		}, causeUser, refusal.Revoked, "(lost laptop): sign in again"},
		{"one ticket", nil, func(w *world) { w.revoke(model.Revocation{Ticket: ticketID}) }, causeTicket, refusal.Revoked, "has taken this connection file back"},
		{"the resource goes", nil, func(w *world) { w.editWorkspace(func(ws *model.Workspace) { ws.Resources = ws.Resources[1:] }) }, causeResource, refusal.UnknownResource, "no resource"},
		{"the grant by name goes", nil, func(w *world) { w.editWorkspace(func(ws *model.Workspace) { ws.Resources[0].Users = nil }) }, causeGrant, refusal.NotGranted, "alice may not use"},
		{"the grant by group goes", byGroup, func(w *world) { w.editWorkspace(func(ws *model.Workspace) { ws.Resources[0].Groups = nil }) }, causeGrant, refusal.NotGranted, "yan may not use"},
		{"a later sign-in lacks the group", byGroup, func(w *world) {
			if got := w.brokers[0].SignedIn("yan", signedIn.Add(time.Minute), []string{"friends"}, true); !slices.Equal(got, []string{"friends"}) {
				w.t.Errorf("the new token's groups: %q", got)
			}
		}, causeGroup, refusal.NotGranted, "yan has left the group"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t, 2)
			a := w.agent(1, "pool", "h1", 5) // signs in, is told and is ended at different brokers
			w.fake.Edit(func(s *model.Snapshot) {
				p := *s.Pools["pool"]
				p.MaxSessions = 5
				s.Pools["pool"] = &p
			})
			p := w.pod(0, a)
			raw := w.ticket(func(cl *ticket.Claims) {
				cl.ID, cl.SignedIn, cl.IssuedAt = ticketID, signedIn, signedIn.Add(time.Second)
				if c.ticket != nil {
					c.ticket(cl)
				}
			})
			session := p.connect(raw)
			other := p.connect(w.ticket(func(cl *ticket.Claims) {
				cl.ID, cl.User, cl.Groups, cl.SignedIn = "2", "zoe", []string{"engineers"}, signedIn
			}))
			eventually(t, "both sessions are reported", func() bool { return len(w.brokers[1].live.carried()) == 2 })
			if len(p.commands(session)) > 0 {
				t.Fatal("the session is ended before anything was taken back")
			}

			begin := time.Now()
			c.act(w)
			eventually(t, "the session is ended", func() bool { return len(p.commands(session)) > 0 })
			if took := time.Since(begin); took > soon {
				t.Errorf("it took %v", took)
			}
			if why := p.commands(session)[0].Reason; !strings.Contains(why, c.says) || !strings.Contains(why, ticketID) {
				t.Errorf("the session is ended because %q, want %q and the ticket's id", why, c.says)
			}
			reply := connectVia(t, p.nc, request(raw, nil))
			if reply.Err == nil || reply.Err.Code != c.code || !strings.Contains(reply.Err.Message, c.says) || !strings.Contains(reply.Err.Message, ticketID) {
				t.Errorf("back with the same ticket: %v, want %s %q and the ticket's id", reply.Err, c.code, c.says)
			}
			eventually(t, "rdv explain tells the end", func() bool {
				events, _ := w.traces.Get(activity, "alice")
				if c.ticket != nil {
					events, _ = w.traces.Get(activity, "yan")
				}
				return slices.ContainsFunc(events, func(e trace.Event) bool {
					return e.Step == trace.StepOrchestrate && e.Error == string(c.code) && strings.HasPrefix(e.Detail, "ended: ") && strings.Contains(e.Detail, c.says)
				})
			})
			time.Sleep(endAgain + endPause)
			if n := len(p.commands(session)); n != 1 {
				t.Errorf("the gateway was told %d times, want once", n)
			}
			if gone := c.cause == causeResource || c.cause == causeGrant && c.ticket != nil; !gone && len(p.commands(other)) > 0 {
				t.Errorf("somebody else's session is ended: %+v", p.commands(other))
			}
			counted := 0.0
			for _, b := range w.brokers {
				counted += ended(t, b, c.cause)
			}
			if want := map[bool]float64{false: 1, true: 2}[len(p.commands(other)) > 0]; counted != want {
				t.Errorf("%v sessions are counted as ended by cause %s, want %v", counted, c.cause, want)
			}
		})
	}
}

// What is not lost goes on.
func TestNotTakenBack(t *testing.T) {
	w := newWorld(t, 1)
	a := w.agent(0, "pool", "h1", 2)
	p := w.pod(0, a)
	signedIn := time.Now().Add(-time.Hour).Truncate(time.Second)
	raw := w.ticket(func(c *ticket.Claims) {
		c.ID, c.User, c.Groups, c.SignedIn = ticketID, "yan", []string{"engineers"}, signedIn
	})
	session := p.connect(raw)
	eventually(t, "the session is reported", func() bool { return len(w.brokers[0].live.carried()) == 1 })
	resource := func(groups ...string) {
		w.editWorkspace(func(ws *model.Workspace) { ws.Resources[0].Groups = groups })
	}
	for _, c := range []struct { // in this order: each token is newer than those before, unless it says otherwise
		name string
		act  func()
	}{
		{"its group is replaced by another of the user's", func() {
			w.brokers[0].SignedIn("yan", signedIn.Add(3*time.Minute), []string{"engineers", "staff"}, true)
			resource("staff")
			time.Sleep(2 * endPause)
			resource("engineers")
		}},
		{"a newer token lacks its group, and has another that grants", func() {
			resource("engineers", "staff")
			w.brokers[0].SignedIn("yan", signedIn.Add(4*time.Minute), []string{"staff"}, true)
			time.Sleep(2 * endPause)
			w.brokers[0].SignedIn("yan", signedIn.Add(5*time.Minute), []string{"engineers", "staff"}, true)
		}},
		{"an older token lacks the group", func() { w.brokers[0].SignedIn("yan", signedIn.Add(-time.Minute), nil, true) }},
		{"a newer token has more groups", func() { w.brokers[0].SignedIn("yan", signedIn.Add(6*time.Minute), []string{"new", "engineers"}, true) }},
		{"a newer token has groups elsewhere", func() { w.brokers[0].SignedIn("yan", signedIn.Add(7*time.Minute), nil, false) }},
		{"a newer token of somebody else", func() { w.brokers[0].SignedIn("zoe", signedIn.Add(time.Minute), nil, true) }},
		{"somebody else is disabled", func() { w.revoke(model.Revocation{User: "yann"}) }},
		{"another ticket is taken back", func() { w.revoke(model.Revocation{Ticket: strings.Repeat("A", 26)}) }},
		{"what was signed in to earlier", func() { w.revoke(model.Revocation{User: "yan", Before: signedIn}) }},
		{"a grant that it doesn't rest on goes", func() { w.editWorkspace(func(ws *model.Workspace) { ws.Resources[0].Users = nil }) }},
		{"its resource moves to another pool", func() { w.editWorkspace(func(ws *model.Workspace) { ws.Resources[0].Pool = "personal" }) }},
		{"the Workspace isn't there for a moment", func() {
			var was *model.Workspace
			w.fake.Edit(func(s *model.Snapshot) { was, s.Workspace = s.Workspace, nil })
			time.Sleep(2 * endPause)
			w.fake.Edit(func(s *model.Snapshot) { s.Workspace = was })
		}},
	} {
		c.act()
		w.brokers[0].accessChanged()
		time.Sleep(2 * endPause)
		if got := p.commands(session); len(got) > 0 {
			t.Fatalf("%s: the session is ended: %+v", c.name, got)
		}
	}
}

// A gateway that doesn't obey is told again, less and less often, until the session is gone; meanwhile its host may lose
// its channel.
func TestEndIsRepeated(t *testing.T) {
	w := newWorld(t, 2)
	a := w.agent(0, "pool", "h1", 2)
	p := w.pod(1, a)
	session := p.connect(w.ticket(nil))
	eventually(t, "the session is reported", func() bool { return len(w.brokers[0].live.carried()) == 1 })
	p.mu.Lock()
	p.deaf = 2
	p.mu.Unlock()
	w.revoke(model.Revocation{User: "alice"})
	eventually(t, "the gateway obeys", func() bool { return len(p.commands(session)) == 3 })
	time.Sleep(3 * endAgain)
	if n := len(p.commands(session)); n != 3 {
		t.Errorf("told %d times, though the session is gone", n)
	}

	// The host's channel is gone, its connection to the gateway lives.
	w.fake.Edit(func(s *model.Snapshot) { c := *s.Workspace; c.Revocations = nil; s.Workspace = &c })
	session = p.connect(w.ticket(nil))
	eventually(t, "the session is reported", func() bool { return len(w.brokers[0].live.carried()) == 1 })
	a.nc.Close()
	eventually(t, "the host is missed", func() bool {
		for _, b := range w.brokers {
			if _, there := b.live.live(hostKey{"pool", "h1"}, time.Hour); there {
				return false
			}
		}
		return true
	})
	w.revoke(model.Revocation{User: "alice"})
	eventually(t, "the session is ended all the same", func() bool { return len(p.commands(session)) > 0 })
}

// A download with an older token names no group that a newer one lacks, at whatever broker; a broker that starts later
// is told by the others.
func TestGroupsAsOfTheNewestToken(t *testing.T) {
	w := newWorld(t, 2)
	now := time.Now().Truncate(time.Second)
	w.brokers[0].SignedIn("yan", now, []string{"friends"}, true)
	older := func(b *Orchestrator) []string {
		return b.SignedIn("yan", now.Add(-time.Minute), []string{"engineers", "friends"}, true)
	}
	eventually(t, "the other broker knows", func() bool { return slices.Equal(older(w.brokers[1]), []string{"friends"}) })

	nc, err := w.servers[0].Connect()
	if err != nil {
		t.Fatal(err)
	}
	late := New(Options{
		Namespace: ns, Workspace: ws, Name: "broker-late", Source: w.fake, Writer: w.fake, Conn: nc,
		TicketKey: func() (ed25519.PublicKey, error) { return w.key.Public().(ed25519.PublicKey), nil },
		ProofKey:  func() (ed25519.PrivateKey, error) { return w.key, nil },
	})
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(func() { cancel(); late.Wait() })
	if err := late.Start(ctx); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a broker that starts later knows", func() bool { return slices.Equal(older(late), []string{"friends"}) })
}

// What brokers tell one that they meet is split, however much it is.
func TestStandingIsSplit(t *testing.T) {
	w := newWorld(t, 1)
	var groups []string
	for i := range 2000 {
		groups = append(groups, fmt.Sprint("group", i))
	}
	const users = 50
	for i := range users {
		w.brokers[0].SignedIn(fmt.Sprint("user", i), time.Now(), groups, true)
	}
	nc, err := w.servers[0].Connect()
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	sub, err := nc.SubscribeSync(subjectStanding + ".late")
	if err != nil {
		t.Fatal(err)
	}
	if err := nc.Flush(); err != nil { // the subscription comes by another connection than what it is to hear
		t.Fatal(err)
	}
	w.brokers[0].tellStanding("late")
	for seen := 0; seen < users; {
		m, err := sub.NextMsg(patience)
		if err != nil {
			t.Fatalf("%v after %d users", err, seen)
		}
		var records []struct{ User string }
		if err := json.Unmarshal(m.Data, &records); err != nil || len(m.Data) > 1<<20 {
			t.Fatalf("%d bytes: %v", len(m.Data), err)
		}
		seen += len(records)
	}
}

// A host can't have somebody else's session ended by reporting it, nor keep one by naming another pod.
func TestEndGoesByTheProof(t *testing.T) {
	w := newWorld(t, 1)
	a := w.agent(0, "pool", "h1", 2)
	p := w.pod(0, a)
	elsewhere, err := w.servers[0].Connect()
	if err != nil {
		t.Fatal(err)
	}
	defer elsewhere.Close()
	sub, err := elsewhere.SubscribeSync("rdv.gateway.*.*.end")
	if err != nil {
		t.Fatal(err)
	}
	mine := w.proof("pool", "h1", "alice", func(c *proof.Claims) { c.SessionID = "mine" })
	a.set(func() {
		a.sessions = []bus.HostSession{
			{SessionID: "mine", User: "alice", State: bus.SessionActive, Gateway: "lies", Instance: "lies", Proof: mine},
			{SessionID: "yours", User: "alice", State: bus.SessionActive, Gateway: "gw", Instance: "10-0-0-1", Proof: mine},
			{SessionID: "theirs", User: "alice", State: bus.SessionActive, Gateway: "gw", Instance: "10-0-0-1"},
		}
	})
	w.revoke(model.Revocation{User: "alice"})
	eventually(t, "the session is ended", func() bool { return len(p.commands("mine")) > 0 })
	if m, err := sub.NextMsg(patience); err != nil || m.Subject != bus.GatewayEndSubject("gw", "10-0-0-1") {
		t.Errorf("told %v, %v", m, err)
	}
	if n := len(p.commands("yours")) + len(p.commands("theirs")); n > 0 {
		t.Error("a session that no broker sent to this host is ended")
	}
}

// The ARM form's entry gateway refuses as well.
func TestEntryIsRefused(t *testing.T) {
	w := newWorld(t, 1)
	w.agent(0, "pool", "h1", 2)
	gw := w.dial(0, identity.Gateway(ns, ws, "gw"))
	w.revoke(model.Revocation{User: "alice"})
	data, _ := json.Marshal(bus.EntryRequest{ActivityID: activity, Ticket: w.ticket(nil), Gateway: "gw", Instance: "10-0-0-1"})
	m, err := gw.Request(bus.SubjectEntry, data, patience)
	if err != nil {
		t.Fatal(err)
	}
	var reply bus.EntryReply
	if err := json.Unmarshal(m.Data, &reply); err != nil || reply.Err == nil || reply.Err.Code != refusal.Revoked || reply.Retry {
		t.Errorf("%s, %v", m.Data, err)
	}
}

// Tickets and sessions of a broker that spelled users as their tokens do go on, as the same person's.
func TestOlderSpelling(t *testing.T) {
	w := newWorld(t, 1)
	w.agent(0, "pool", "a", 2)
	b := w.agent(0, "pool", "b", 2)
	b.set(func() {
		b.sessions = []bus.HostSession{{User: "Alice", State: bus.SessionDisconnected, Proof: w.proof("pool", "b", "Alice", nil)}}
	})
	gw := w.dial(0, identity.Gateway(ns, ws, "gw"))
	older := w.ticket(func(c *ticket.Claims) { c.User = "Alice" })
	if reply := connectVia(t, gw, request(older, nil)); reply.Host != "b" {
		t.Errorf("got %+v, want the host with her own desktop", reply)
	}
	if asked := b.asked; len(asked) != 1 || asked[0].User != "alice" {
		t.Errorf("the host was told %+v", asked)
	}

	pod := w.pod(0, b)
	session := pod.connect(older)
	eventually(t, "the session is reported", func() bool { return len(w.brokers[0].live.carried()) > 0 })
	w.brokers[0].accessChanged()
	time.Sleep(2 * endPause)
	if got := pod.commands(session); len(got) > 0 {
		t.Errorf("the session is ended: %+v", got)
	}
	w.revoke(model.Revocation{User: "alice"})
	eventually(t, "it ends when she is disabled", func() bool { return len(pod.commands(session)) > 0 })
}
