package orchestrate

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"maps"
	rand2 "math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/prometheus/client_golang/prometheus/testutil"

	busserver "rendezvous.dev/rendezvous/broker/bus"
	"rendezvous.dev/rendezvous/broker/internal/fake"
	"rendezvous.dev/rendezvous/broker/internal/testca"
	"rendezvous.dev/rendezvous/broker/model"
	"rendezvous.dev/rendezvous/broker/placement"
	"rendezvous.dev/rendezvous/broker/proof"
	"rendezvous.dev/rendezvous/broker/traces"
	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/identity"
	"rendezvous.dev/rendezvous/wire/mtls"
	"rendezvous.dev/rendezvous/wire/refusal"
	"rendezvous.dev/rendezvous/wire/ticket"
)

const (
	ns, ws   = "ns", "ws"
	patience = 30 * time.Second
	activity = "00000000-0000-4000-8000-000000000001"
)

// world is brokers, gateways and agents of one test, over a real bus.
type world struct {
	t       *testing.T
	ca      *testca.CA
	fake    *fake.World
	key     ed25519.PrivateKey
	servers []*busserver.Server
	brokers []*Orchestrator
	traces  *traces.Store
}

func declare() *model.Snapshot {
	return &model.Snapshot{
		Workspace: &model.Workspace{Name: ws, Resources: []model.Resource{
			{Name: "desk", Pool: "pool", Users: []string{"alice"}, Groups: []string{"engineers"}},
			{Name: "mine", Pool: "personal", Groups: []string{"engineers"}},
			{Name: "broken", Pool: "none", Users: []string{"alice"}},
		}},
		Pools: map[string]*model.Pool{
			"pool":     {Name: "pool", Generation: 1, MaxSessions: 2, HeartbeatTimeout: 30 * time.Second, ConnectTimeout: 500 * time.Millisecond},
			"personal": {Name: "personal", Generation: 1, MaxSessions: 1, Personal: true, Automatic: true, HeartbeatTimeout: 30 * time.Second, ConnectTimeout: 500 * time.Millisecond},
		},
		Gateways: []*model.Gateway{{Name: "gw", Hostname: "gw.example.com", Port: 8443, CABundle: "PEM", Ready: true}},
	}
}

func newWorld(t *testing.T, replicas int) *world {
	w := &world{t: t, ca: testca.New(t, "ca"), fake: fake.New(declare()), traces: traces.New()}
	var err error
	if _, w.key, err = ed25519.GenerateKey(rand.Reader); err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var addrs []string
	for i := range replicas {
		var b *Orchestrator
		ready := make(chan struct{})
		s, err := busserver.Start(t.Context(), busserver.Options{
			Namespace: ns, Workspace: ws, Name: fmt.Sprint("broker-", i), TLS: w.ca.Reloader(identity.Broker(ns, ws)),
			Host: "127.0.0.1", Port: -1, WebSocketPort: -1, RoutePort: -1, PeersEvery: 20 * time.Millisecond,
			Peers: func(context.Context) ([]string, error) {
				mu.Lock()
				defer mu.Unlock()
				return append([]string(nil), addrs...), nil
			},
			Presence: func(id identity.ID, conn uint64, up bool) { <-ready; b.Presence(id, conn, up) },
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(s.Close)
		mu.Lock()
		addrs = append(addrs, s.RouteAddr().String())
		mu.Unlock()
		nc, err := s.Connect()
		if err != nil {
			t.Fatal(err)
		}
		b = New(Options{
			Namespace: ns, Workspace: ws, Name: fmt.Sprint("broker-", i), Source: w.fake, Writer: w.fake, Conn: nc,
			TicketKey: func() (ed25519.PublicKey, error) { return w.key.Public().(ed25519.PublicKey), nil },
			ProofKey:  func() (ed25519.PrivateKey, error) { return w.key, nil },
		})
		close(ready)
		ctx, cancel := context.WithCancel(context.Background())
		t.Cleanup(func() { cancel(); b.Wait() })
		if err := b.Start(ctx); err != nil {
			t.Fatal(err)
		}
		w.fake.OnChange(b.Changed)
		if i == 0 {
			if err := w.traces.Subscribe(nc); err != nil {
				t.Fatal(err)
			}
		}
		w.servers, w.brokers = append(w.servers, s), append(w.brokers, b)
	}
	eventually(t, "the brokers are one cluster", func() bool {
		for _, s := range w.servers {
			if s.Routes() != replicas-1 {
				return false
			}
		}
		return true
	})
	eventually(t, "the brokers hear each other", func() bool {
		for _, b := range w.brokers {
			b.Expect("nobody", b.o.Name)
		}
		for _, b := range w.brokers {
			if b.Connections()["nobody"] != int32(replicas) {
				return false
			}
		}
		return true
	})
	return w
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("never happened: %s", what)
}

func (w *world) dial(replica int, id identity.ID) *nats.Conn {
	w.t.Helper()
	c := w.ca.Reloader(id).ClientConfig("127.0.0.1", mtls.AllowRole(ns, ws, identity.RoleBroker))
	nc, err := nats.Connect("tls://"+w.servers[replica].Addr().String(), nats.Secure(c), nats.CustomInboxPrefix(bus.InboxPrefix(id)),
		nats.NoReconnect(), nats.Timeout(patience))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(nc.Close)
	return nc
}

// agent is a session host that holds to its own limit.
type agent struct {
	w          *world
	nc         *nats.Conn
	pool, name string
	boot       string

	mu       sync.Mutex
	config   bus.HostConfig
	configs  int
	sequence uint64
	sessions []bus.HostSession
	limit    int
	ready    bool
	logins   bool // logs people in by their connections
	refused  map[string]uint64
	silent   bool           // accepts nothing and answers nothing
	refuse   *refusal.Error // answers this
	asked    []bus.HostConnect
	most     int
	// late, where set, is called before each report and may take its time.
	late func()
}

func (w *world) agent(replica int, pool, name string, limit int) *agent {
	w.t.Helper()
	w.fake.EditHost(name, func(h *model.Host) { h.Pool = pool; h.Generation = 1 })
	a := &agent{w: w, pool: pool, name: name, limit: limit, ready: true, boot: rand.Text()}
	a.join(replica)
	return a
}

func (a *agent) join(replica int) {
	a.w.t.Helper()
	a.nc = a.w.dial(replica, identity.Agent(ns, ws, a.pool, a.name))
	for subject, f := range map[string]nats.MsgHandler{
		bus.HostConnectSubject(a.pool, a.name): a.onConnect, bus.HostConfigSubject(a.pool, a.name): a.onConfig,
	} {
		if _, err := a.nc.Subscribe(subject, f); err != nil {
			a.w.t.Fatal(err)
		}
	}
	a.nc.Flush()
	eventually(a.w.t, a.name+" is known to every broker", func() bool {
		a.report() // as agents do every few seconds
		for _, b := range a.w.brokers {
			if _, there := b.live.live(hostKey{a.pool, a.name}, time.Hour); !there {
				return false
			}
		}
		return true
	})
}

func (a *agent) onConfig(m *nats.Msg) {
	a.mu.Lock()
	json.Unmarshal(m.Data, &a.config)
	a.configs++
	a.mu.Unlock()
	a.report()
}

func (a *agent) onConnect(m *nats.Msg) {
	var req bus.HostConnect
	json.Unmarshal(m.Data, &req)
	a.mu.Lock()
	a.asked = append(a.asked, req)
	reply := bus.HostReply{Err: a.refuse}
	switch {
	case a.silent:
		a.mu.Unlock()
		return
	case a.refuse != nil:
	case len(a.sessions) >= a.limit:
		reply.Err = refusal.New(refusal.HostFull, "Host %s is full.", a.name)
	default:
		a.sessions = append(a.sessions, bus.HostSession{SessionID: req.SessionID, User: req.User, State: bus.SessionActive, Proof: req.Proof})
		a.most = max(a.most, len(a.sessions))
	}
	reply.Sequence = a.sequence
	a.mu.Unlock()
	data, _ := json.Marshal(reply)
	m.Respond(data)
	if a.late != nil {
		go a.report() // as a real agent, whose report doesn't hold up its answers
		return
	}
	a.report()
}

// end ends a session and reports it, sooner or later.
func (a *agent) end(session string) {
	a.mu.Lock()
	a.sessions = slices.DeleteFunc(a.sessions, func(s bus.HostSession) bool { return s.SessionID == session })
	a.mu.Unlock()
	go a.report()
}

func (a *agent) report() {
	if a.late != nil {
		a.late()
	}
	a.mu.Lock()
	a.sequence++
	r := bus.HostReport{
		Host: "lies", // it is known by its certificate
		Boot: a.boot, Sequence: a.sequence, ConfigGeneration: a.config.Generation, RDPReady: a.ready, AgentVersion: "v1", OS: "test",
		Sessions: append([]bus.HostSession(nil), a.sessions...), Logins: a.logins, LoginsRefused: maps.Clone(a.refused),
	}
	a.mu.Unlock()
	data, _ := json.Marshal(r)
	a.nc.Publish(bus.ReportSubject(a.pool, a.name), data)
	a.nc.Flush()
}

// set changes the agent and reports; it returns when every broker has heard.
func (a *agent) set(f func()) {
	a.mu.Lock()
	f()
	a.mu.Unlock()
	a.report()
	a.mu.Lock()
	seq := a.sequence
	a.mu.Unlock()
	eventually(a.w.t, "the brokers hear "+a.name, func() bool {
		for _, b := range a.w.brokers {
			if h, _ := b.live.live(hostKey{a.pool, a.name}, time.Hour); h.report.Sequence < seq {
				return false
			}
		}
		return true
	})
}

func (w *world) ticket(edit func(*ticket.Claims)) string {
	c := ticket.Claims{
		ID: "1", Namespace: ns, Workspace: ws, User: "alice", Resource: "desk", Target: brokerapi.PoolName(ns, "pool"),
		IssuedAt: time.Now(), Expires: time.Now().Add(time.Hour),
	}
	if edit != nil {
		edit(&c)
	}
	raw, err := ticket.Sign(c, w.key)
	if err != nil {
		w.t.Fatal(err)
	}
	return raw
}

// proof is what a broker gave a host when it sent the user there.
func (w *world) proof(pool, host, user string, edit func(*proof.Claims)) string {
	c := proof.Claims{
		Namespace: ns, Workspace: ws, Pool: pool, Host: host, HostUID: w.fake.Snapshot().Hosts[host].UID, User: user, Resource: "desk",
		SessionID: rand.Text(), Gateway: "gw", Instance: "10-0-0-1", IssuedAt: time.Now().Add(-time.Hour), Expires: time.Now().Add(time.Hour),
	}
	if edit != nil {
		edit(&c)
	}
	raw, err := proof.Sign(c, w.key)
	if err != nil {
		w.t.Fatal(err)
	}
	return raw
}

func request(ticket string, edit func(*bus.ConnectRequest)) bus.ConnectRequest {
	r := bus.ConnectRequest{
		ActivityID: activity, SessionID: rand.Text(), Ticket: ticket, Target: brokerapi.PoolName(ns, "pool"), Gateway: "gw", Instance: "10-0-0-1",
		JoinSecret: []byte("0123456789abcdef0123456789abcdef"), Deadline: time.Now().Add(20 * time.Second),
	}
	if edit != nil {
		edit(&r)
	}
	return r
}

func connectVia(t *testing.T, gw *nats.Conn, r bus.ConnectRequest) bus.ConnectReply {
	t.Helper()
	data, _ := json.Marshal(r)
	m, err := gw.Request(bus.SubjectConnect, data, patience)
	if err != nil {
		t.Error(err)
		return bus.ConnectReply{}
	}
	var reply bus.ConnectReply
	if err := json.Unmarshal(m.Data, &reply); err != nil {
		t.Error(err)
	}
	return reply
}

func TestConnect(t *testing.T) {
	w := newWorld(t, 1)
	a := w.agent(0, "pool", "h1", 2)
	gw := w.dial(0, identity.Gateway(ns, ws, "gw"))
	req := request(w.ticket(nil), nil)
	reply := connectVia(t, gw, req)
	if reply.Err != nil || reply.Host != "h1" || reply.Pool != "pool" {
		t.Fatalf("got %+v", reply)
	}
	got := a.asked[0]
	if got.Address != "gw.example.com:8443" || got.ServerName != "gw.example.com" || got.CABundle != "PEM" || got.Instance != req.Instance ||
		string(got.JoinSecret) != string(req.JoinSecret) || got.User != "alice" || got.SessionID != req.SessionID || got.ActivityID != activity {
		t.Errorf("the host was told %+v", got)
	}
	eventually(t, "the activity shows the host and the answer", func() bool {
		events, ok := w.traces.Get(activity, "alice")
		return ok && len(events) == 2 && strings.Contains(events[0].Detail+events[1].Detail, "host h1 accepts")
	})
}

// A person is logged in to an account that is theirs alone, on hosts that do so, and both are told who it is.
func TestAccounts(t *testing.T) {
	w := newWorld(t, 1)
	a := w.agent(0, "pool", "h1", 4)
	gw := w.dial(0, identity.Gateway(ns, ws, "gw"))
	w.fake.Edit(func(s *model.Snapshot) {
		p := *s.Pools["pool"]
		p.Accounts = &model.Accounts{Create: true, FirstUID: 10000, LastUID: 59999}
		s.Pools["pool"] = &p
		ws := *s.Workspace
		ws.Resources = slices.Clone(ws.Resources)
		for i := range ws.Resources {
			ws.Resources[i].Users = append(slices.Clip(ws.Resources[i].Users), "alice@a.example", "alice@b.example", "root@a.example")
		}
		s.Workspace = &ws
	})
	connect := func(user string) bus.ConnectReply {
		return connectVia(t, gw, request(w.ticket(func(c *ticket.Claims) { c.User = user }), nil))
	}
	if r := connect("alice@a.example"); r.Err == nil || r.Err.Code != refusal.NoHost || !strings.Contains(r.Err.Message, "agent service install") {
		t.Errorf("a host that asks for passwords took a session of a pool with accounts: %+v", r)
	}
	a.set(func() { a.logins = true })
	if r := connect("alice@a.example"); r.Err != nil {
		t.Fatal(r.Err)
	}
	got := a.asked[0]
	if got.Account == nil || got.Account.Name != "alice" || !got.Account.Create || got.Account.UID < 10000 {
		t.Errorf("the host was told %+v", got.Account)
	}
	eventually(t, "the session is hers, in her account", func() bool {
		live := w.brokers[0].LiveSessions()
		return len(live) == 1 && live[0].User == "alice@a.example" && live[0].Account == "alice"
	})
	if r := connect("alice@b.example"); r.Err == nil || r.Err.Code != refusal.AccountRefused || !strings.Contains(r.Err.Message, "alice@a.example and alice@b.example") {
		t.Errorf("two people were given one account: %+v", r)
	}
	if r := connect("root@a.example"); r.Err == nil || r.Err.Code != refusal.AccountRefused {
		t.Errorf("root: %+v", r)
	}
	if n := len(a.asked); n != 1 {
		t.Errorf("the host was asked %d times", n)
	}

	count := func() (n float64) {
		n = testutil.ToFloat64(w.brokers[0].o.Metrics.LoginsRefused.WithLabelValues("shared"))
		return n
	}
	a.set(func() { a.refused = map[string]uint64{"shared": 2, strings.Repeat("x", 1000): 9} })
	a.set(func() { a.refused = map[string]uint64{"shared": 3} })
	if n := count(); n != 3 {
		t.Errorf("%v refused logins are counted, want 3", n)
	}
	if n := testutil.CollectAndCount(w.brokers[0].o.Metrics.LoginsRefused); n != 1 {
		t.Errorf("a host made %d metrics", n)
	}
	w.fake.Edit(func(s *model.Snapshot) {
		p := *s.Pools["pool"]
		p.Accounts = nil
		s.Pools["pool"] = &p
	})
	if r := connect("alice@a.example"); r.Err == nil || !strings.Contains(r.Err.Message, "no spec.accounts") {
		t.Errorf("a pool without accounts used a host with: %+v", r)
	}
}

// Each row has its own code, and words that tell a person what to do about it.
func TestRefusals(t *testing.T) {
	w := newWorld(t, 1)
	gw := w.dial(0, identity.Gateway(ns, ws, "gw"))
	var h1 *agent
	_, forged, _ := ed25519.GenerateKey(rand.Reader)
	forgedTicket, _ := ticket.Sign(ticket.Claims{Namespace: ns, Workspace: ws, User: "alice", Resource: "desk", IssuedAt: time.Now(), Expires: time.Now().Add(time.Hour)}, forged)
	for _, c := range []struct {
		name    string
		prepare func()
		ticket  func(*ticket.Claims)
		raw     string
		request func(*bus.ConnectRequest)
		want    refusal.Code
		says    string
	}{
		{name: "no hosts", want: refusal.NoHost, says: "the pool has no hosts"},
		{name: "a host that never came", prepare: func() { w.fake.EditHost("h1", func(h *model.Host) { h.Pool = "pool" }) }, want: refusal.NoHost, says: "1 host: 1 not connected"},
		{name: "good", prepare: func() { h1 = w.agent(0, "pool", "h1", 2) }},
		{name: "good by group", ticket: func(c *ticket.Claims) { c.User, c.Groups = "zoe", []string{"engineers"} }},
		{name: "the host is full", prepare: func() { h1.set(func() {}) }, ticket: func(c *ticket.Claims) { c.User, c.Groups = "yan", []string{"engineers"} }, want: refusal.NoHost, says: "1 full"},
		{name: "one's own session on it, which its agent refuses", want: refusal.HostFull, says: "Host h1 is full"},
		{name: "the RDP server is down", prepare: func() { h1.set(func() { h1.sessions, h1.ready = nil, false }) }, want: refusal.NoHost, says: "1 not ready"},
		{name: "draining", prepare: func() {
			h1.set(func() { h1.ready = true })
			w.fake.EditHost("h1", func(h *model.Host) { h.Drain = &model.Drain{Reason: "new image"}; h.Generation++ })
		}, want: refusal.NoHost, says: "1 draining (new image)"},
		{name: "the drain has ended", prepare: func() {
			w.fake.EditHost("h1", func(h *model.Host) { h.Drain = &model.Drain{Until: time.Now().Add(-time.Second)}; h.Generation++ })
		}},
		{name: "the host refuses", prepare: func() {
			h1.set(func() { h1.sessions = nil; h1.refuse = refusal.New(refusal.HostDraining, "Host h1 drains.") })
		}, want: refusal.HostDraining, says: "Host h1 drains"},
		{name: "the host doesn't answer in time", prepare: func() { h1.set(func() { h1.refuse, h1.silent = nil, true }) }, want: refusal.HostTimeout, says: "Host h1 did not answer within 500ms"},
		{name: "forged ticket", raw: forgedTicket, want: refusal.TicketInvalid},
		{name: "no ticket", raw: "-", want: refusal.TicketMissing},
		{name: "expired ticket", ticket: func(c *ticket.Claims) { c.Expires = time.Now().Add(-time.Minute) }, want: refusal.TicketExpired},
		{name: "not granted any more", ticket: func(c *ticket.Claims) { c.User = "bob" }, want: refusal.NotGranted, says: "bob may not use"},
		{name: "resource gone", ticket: func(c *ticket.Claims) { c.Resource = "old" }, want: refusal.UnknownResource},
		{name: "pool missing", ticket: func(c *ticket.Claims) { c.Resource, c.Target = "broken", brokerapi.PoolName(ns, "none") }, request: func(r *bus.ConnectRequest) { r.Target = "" }, want: refusal.NoHost, says: "does not exist"},
		{name: "another target", request: func(r *bus.ConnectRequest) { r.Target = "10.0.0.1" }, want: refusal.WrongTarget, says: `asked for "10.0.0.1"`},
		{name: "the resource moved to another pool", ticket: func(c *ticket.Claims) { c.Target = "else" }, want: refusal.WrongTarget},
		{name: "the Workspace is gone", prepare: func() { w.fake.Edit(func(s *model.Snapshot) { s.Workspace = nil }) }, want: refusal.BrokerAway},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.prepare != nil {
				c.prepare()
			}
			raw := c.raw
			if raw == "" {
				raw = w.ticket(c.ticket)
			}
			reply := connectVia(t, gw, request(strings.Trim(raw, "-"), c.request))
			got := refusal.Code("")
			if reply.Err != nil {
				got = reply.Err.Code
				if reply.Err.ActivityID != activity {
					t.Errorf("the refusal has activity %q", reply.Err.ActivityID)
				}
				if !strings.Contains(reply.Err.Message, c.says) {
					t.Errorf("message %q does not say %q", reply.Err.Message, c.says)
				}
			}
			if got != c.want {
				t.Fatalf("got %q (%v), want %q", got, reply.Err, c.want)
			}
		})
	}
}

// A request must not have us send a reply where its sender could not.
func TestReplyGoesToTheGatewayOnly(t *testing.T) {
	w := newWorld(t, 1)
	w.agent(0, "pool", "h1", 2)
	gw := w.dial(0, identity.Gateway(ns, ws, "gw"))
	spy, err := w.servers[0].Connect()
	if err != nil {
		t.Fatal(err)
	}
	defer spy.Close()
	victim, _ := spy.SubscribeSync(bus.HostConfigSubject("pool", "h1"))
	spy.Flush()
	data, _ := json.Marshal(request(w.ticket(nil), nil))
	gw.PublishRequest(bus.SubjectConnect, bus.HostConfigSubject("pool", "h1"), data)
	gw.Flush()
	connectVia(t, gw, request(w.ticket(nil), nil)) // a later one is answered, so the first has been read
	w.brokers[0].Drain(t.Context())
	for {
		m, err := victim.NextMsg(100 * time.Millisecond)
		if err != nil {
			break
		}
		if strings.Contains(string(m.Data), `"host"`) || strings.Contains(string(m.Data), `"error"`) {
			t.Fatalf("the answer went to %s: %s", m.Subject, m.Data)
		}
	}
}

func TestNextHost(t *testing.T) {
	w := newWorld(t, 1)
	a, b, c := w.agent(0, "pool", "a", 2), w.agent(0, "pool", "b", 2), w.agent(0, "pool", "c", 2)
	gw := w.dial(0, identity.Gateway(ns, ws, "gw"))
	a.set(func() { a.silent = true })
	b.set(func() { b.refuse = refusal.New(refusal.HostNotReady, "xrdp is down") })
	if reply := connectVia(t, gw, request(w.ticket(nil), nil)); reply.Err != nil || reply.Host != "c" {
		t.Fatalf("got %+v", reply)
	}
	c.set(func() { c.refuse = refusal.New(refusal.HostRefused, "no"); c.sessions = nil })
	reply := connectVia(t, gw, request(w.ticket(nil), nil))
	if reply.Err == nil || reply.Err.Code != refusal.HostTimeout || !strings.Contains(reply.Err.Message, "a (host-timeout), b (host-not-ready), c (host-refused)") {
		t.Fatalf("got %+v", reply.Err)
	}
}

func TestOwnDisconnectedSession(t *testing.T) {
	w := newWorld(t, 1)
	w.agent(0, "pool", "a", 2)
	b := w.agent(0, "pool", "b", 2)
	b.set(func() {
		b.sessions = []bus.HostSession{{User: "alice", State: bus.SessionDisconnected, Proof: w.proof("pool", "b", "alice", nil)}, {User: "x"}}
		b.limit = 3
	})
	w.fake.EditHost("b", func(h *model.Host) { h.Drain = &model.Drain{}; h.Generation++ })
	gw := w.dial(0, identity.Gateway(ns, ws, "gw"))
	if reply := connectVia(t, gw, request(w.ticket(nil), nil)); reply.Host != "b" {
		t.Fatalf("got %+v", reply)
	}
}

func TestPersonalAssignmentLasts(t *testing.T) {
	w := newWorld(t, 2)
	hosts := map[string]*agent{}
	for _, n := range []string{"p1", "p2"} {
		hosts[n] = w.agent(0, "personal", n, 1)
	}
	gws := []*nats.Conn{w.dial(0, identity.Gateway(ns, ws, "gw")), w.dial(1, identity.Gateway(ns, ws, "gw"))}
	ask := func(user string) bus.ConnectReply {
		return connectVia(t, gws[0], request(w.ticket(func(c *ticket.Claims) {
			c.User, c.Groups, c.Resource, c.Target = user, []string{"engineers"}, "mine", brokerapi.PoolName(ns, "personal")
		}), func(r *bus.ConnectRequest) { r.Target = "" }))
	}
	first := ask("alice")
	if first.Err != nil || first.Host != "p1" || w.fake.Snapshot().Hosts["p1"].AssignedUser != "alice" {
		t.Fatalf("got %+v", first)
	}
	if second := ask("bob"); second.Host != "p2" {
		t.Fatalf("got %+v", second)
	}
	if third := ask("carol"); third.Err == nil || !strings.Contains(third.Err.Message, "2 assigned to other users") {
		t.Fatalf("got %+v", third)
	}
	hosts["p1"].set(func() { hosts["p1"].sessions = nil })
	if again := ask("alice"); again.Host != "p1" {
		t.Fatalf("alice's host did not last: %+v", again)
	}
}

// stale is a source that lags behind: it shows hosts as nobody's that were given away since.
type stale struct {
	*fake.World
	left int // snapshots yet to be stale
}

func (s *stale) Snapshot() *model.Snapshot {
	snap := s.World.Snapshot()
	if s.left--; s.left < 0 {
		return snap
	}
	old := *snap
	old.Hosts = map[string]*model.Host{}
	for n, h := range snap.Hosts {
		c := *h
		c.AssignedUser = ""
		old.Hosts[n] = &c
	}
	return &old
}

// Two brokers that give away hosts at the same time neither share one nor give a user two.
func TestAssignmentConflict(t *testing.T) {
	for _, c := range []struct{ owner, want string }{{"bob", "p2"}, {"alice", "p1"}} {
		t.Run("first to "+c.owner, func(t *testing.T) {
			w := newWorld(t, 1)
			w.agent(0, "personal", "p1", 1)
			w.agent(0, "personal", "p2", 1)
			w.fake.EditHost("p1", func(h *model.Host) { h.AssignedUser = c.owner })
			lagging := w.brokers[0].o
			lagging.Source = &stale{w.fake, 2} // for authorise and the first place
			b := New(lagging)
			b.live = w.brokers[0].live
			con := &connect{b: b, asked: map[string]uint64{}, deadline: time.Now().Add(patience), req: request(w.ticket(func(c *ticket.Claims) {
				c.Groups, c.Resource, c.Target = []string{"engineers"}, "mine", brokerapi.PoolName(ns, "personal")
			}), func(r *bus.ConnectRequest) { r.Target = "" })}
			host, err := con.run(t.Context())
			if err != nil || host != c.want {
				t.Fatalf("got %s %v, want %s", host, err, c.want)
			}
			if c.owner == "alice" && w.fake.Snapshot().Hosts["p2"].AssignedUser != "" {
				t.Error("alice was given a second host")
			}
		})
	}
}

// 500 connects at once at 3 brokers: no host takes more than its limit, and as many are accepted as there are places.
func TestStorm(t *testing.T) {
	w := newWorld(t, 3)
	const hosts, limit, connects = 25, 10, 500
	w.fake.Edit(func(s *model.Snapshot) {
		p := *s.Pools["pool"]
		p.MaxSessions, p.ConnectTimeout = limit, 10*time.Second
		s.Pools["pool"] = &p
	})
	var agents []*agent
	for i := range hosts {
		agents = append(agents, w.agent(i%3, "pool", fmt.Sprintf("h%02d", i), limit))
	}
	var gws []*nats.Conn
	for i := range 3 {
		gws = append(gws, w.dial(i, identity.Gateway(ns, ws, "gw")))
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	accepted, codes := 0, map[refusal.Code]int{}
	for i := range connects {
		wg.Go(func() {
			raw := w.ticket(func(c *ticket.Claims) { c.User, c.Groups = fmt.Sprint("user", i), []string{"engineers"} })
			reply := connectVia(t, gws[i%3], request(raw, nil))
			mu.Lock()
			defer mu.Unlock()
			if reply.Err == nil {
				accepted++
			} else {
				codes[reply.Err.Code]++
			}
		})
	}
	wg.Wait()
	for _, a := range agents {
		if a.most > limit {
			t.Errorf("%s held %d sessions, limit %d", a.name, a.most, limit)
		}
	}
	if accepted != hosts*limit || codes[refusal.NoHost]+codes[refusal.HostFull] != connects-hosts*limit {
		t.Errorf("%d accepted of %d places; refusals %v", accepted, hosts*limit, codes)
	}
	asked := 0
	for _, a := range agents {
		asked += len(a.asked)
	}
	t.Logf("%d accepted, refusals %v, %d questions to hosts", accepted, codes, asked)
}

// While there is a place, nobody is refused, however late the reports are and whichever sessions end before a report
// could tell of them.
func TestNeverRefusedWhileAPlaceIsFree(t *testing.T) {
	w := newWorld(t, 3)
	const hosts, limit, connects = 6, 3, 400
	for _, b := range w.brokers {
		b.o.Settle = patience // what is tried is whether a place is found, not how fast this machine is
	}
	w.fake.Edit(func(s *model.Snapshot) {
		p := *s.Pools["pool"]
		p.MaxSessions, p.ConnectTimeout = limit, 10*time.Second
		s.Pools["pool"] = &p
	})
	agents := map[string]*agent{}
	for i := range hosts {
		a := w.agent(i%3, "pool", fmt.Sprintf("h%02d", i), limit)
		a.late = func() { time.Sleep(rand2.N(40 * time.Millisecond)) }
		agents[a.name] = a
	}
	var gws []*nats.Conn
	for i := range 3 {
		gws = append(gws, w.dial(i, identity.Gateway(ns, ws, "gw")))
	}
	places := make(chan struct{}, hosts*limit) // one who holds a token has a place somewhere
	var wg sync.WaitGroup
	for i := range connects {
		wg.Go(func() {
			places <- struct{}{}
			defer func() { <-places }()
			raw := w.ticket(func(c *ticket.Claims) { c.User, c.Groups = fmt.Sprint("user", i), []string{"engineers"} })
			req := request(raw, nil)
			reply := connectVia(t, gws[i%3], req)
			if reply.Err != nil {
				t.Errorf("user%d was refused: %v", i, reply.Err)
				return
			}
			if i%2 == 0 { // the others end before any report
				time.Sleep(rand2.N(30 * time.Millisecond))
			}
			agents[reply.Host].end(req.SessionID)
		})
	}
	wg.Wait()
	asked := 0
	for _, a := range agents {
		asked += len(a.asked)
		if a.most > limit {
			t.Errorf("%s held %d sessions, limit %d", a.name, a.most, limit)
		}
	}
	t.Logf("%d questions to hosts for %d connects", asked, connects)
}

func TestConfigIsPushed(t *testing.T) {
	w := newWorld(t, 2)
	a := w.agent(1, "pool", "h1", 2)
	holds := func(what string, ok func(bus.HostConfig) bool) {
		t.Helper()
		eventually(t, what, func() bool { a.mu.Lock(); defer a.mu.Unlock(); return ok(a.config) })
	}
	holds("the limit", func(c bus.HostConfig) bool { return c.MaxSessions == 2 && !c.Draining && c.ReportEvery == 10 })
	w.fake.EditHost("h1", func(h *model.Host) { h.Drain = &model.Drain{Reason: "why"}; h.Generation++ })
	holds("the drain", func(c bus.HostConfig) bool { return c.Draining && c.DrainReason == "why" })
	eventually(t, "the drain's acknowledgement is written", func() bool {
		h := w.fake.Snapshot().Hosts["h1"]
		return h.Agent != nil && h.Agent.DrainAcknowledged && h.Agent.AcknowledgedGeneration == h.Generation
	})
	w.fake.EditHost("h1", func(h *model.Host) { h.Drain = nil; h.Generation++ })
	holds("the drain's end", func(c bus.HostConfig) bool { return !c.Draining })
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.configs > 4 {
		t.Errorf("%d configurations were sent for 3 states", a.configs)
	}
}

func TestGenerationGrows(t *testing.T) {
	now := time.Now()
	pool, last := &model.Pool{Generation: 3, HeartbeatTimeout: time.Minute}, int64(0)
	for i, h := range []*model.Host{
		{Generation: 1}, {Generation: 2, Drain: &model.Drain{Until: now.Add(time.Hour)}}, {Generation: 2, Drain: &model.Drain{Until: now.Add(-time.Hour)}}, {Generation: 3},
	} {
		c := hostConfig(pool, h, now)
		if c.Generation <= last || c.Draining != (i == 1) {
			t.Errorf("state %d: %+v after generation %d", i, c, last)
		}
		last = c.Generation
	}
}

func TestStatusIsCoarse(t *testing.T) {
	w := newWorld(t, 3)
	a := w.agent(1, "pool", "h1", 2)
	status := func(what string, ok func(model.AgentStatus) bool) {
		t.Helper()
		eventually(t, what, func() bool { s := w.fake.Snapshot().Hosts["h1"].Agent; return s != nil && ok(*s) })
	}
	status("connected", func(s model.AgentStatus) bool { return s.Connected && s.RDPReady && s.Version == "v1" })
	before := len(w.fake.AgentWrites())
	for range 20 {
		a.set(func() {}) // heartbeats
	}
	time.Sleep(3 * gather) // what would be written, would be by now
	if n := len(w.fake.AgentWrites()) - before; n != 0 {
		t.Errorf("20 heartbeats made %d writes", n)
	}
	a.set(func() { a.ready = false })
	status("not ready", func(s model.AgentStatus) bool { return !s.RDPReady })
	a.nc.Close()
	status("gone", func(s model.AgentStatus) bool { return !s.Connected && s.Version == "v1" })
}

func TestAgentMovesBetweenBrokers(t *testing.T) {
	w := newWorld(t, 2)
	a := w.agent(0, "pool", "h1", 2)
	gw := w.dial(1, identity.Gateway(ns, ws, "gw"))
	old := a.nc
	a.join(1) // heard at the other broker before it is missed at the first
	old.Close()
	eventually(t, "the new broker has it", func() bool {
		h, _ := w.brokers[1].live.live(hostKey{"pool", "h1"}, time.Hour)
		g, _ := w.brokers[0].live.live(hostKey{"pool", "h1"}, time.Hour)
		return h.local && !g.local && !h.gone && !g.gone
	})
	if reply := connectVia(t, gw, request(w.ticket(nil), nil)); reply.Host != "h1" {
		t.Fatalf("got %+v", reply)
	}
	a.nc.Close()
	eventually(t, "an agent that left is out of placement at once", func() bool {
		reply := connectVia(t, gw, request(w.ticket(nil), nil))
		return reply.Err != nil && reply.Err.Code == refusal.NoHost
	})
}

// A connect that comes while agents are on their way from one broker to another waits for them, and a host that has left
// for good, or has never been there, is not waited for.
func TestConnectWaitsForReturningHosts(t *testing.T) {
	type answer struct {
		reply bus.ConnectReply
		asked time.Time
	}
	ask := func(w *world) <-chan answer {
		gw := w.dial(0, identity.Gateway(ns, ws, "gw"))
		c := make(chan answer, 1)
		begin := time.Now()
		go func() { c <- answer{connectVia(t, gw, request(w.ticket(nil), nil)), begin} }()
		return c
	}
	stillWaiting := func(c <-chan answer) {
		t.Helper()
		select {
		case a := <-c:
			t.Errorf("answered at once: %+v", a.reply)
		case <-time.After(2 * settle):
		}
	}
	t.Run("a young broker has yet to hear of a host", func(t *testing.T) {
		w := newWorld(t, 1)
		w.fake.EditHost("h1", func(h *model.Host) { h.Pool, h.Generation, h.Agent = "pool", 1, &model.AgentStatus{} })
		c := ask(w)
		stillWaiting(c)
		w.agent(0, "pool", "h1", 2)
		if a := <-c; a.reply.Host != "h1" {
			t.Errorf("got %+v", a.reply)
		}
	})
	t.Run("an agent lost its channel just now", func(t *testing.T) {
		w := newWorld(t, 1)
		w.fake.EditHost("h1", func(h *model.Host) { h.Pool, h.Agent = "pool", &model.AgentStatus{Connected: true} })
		a := w.agent(0, "pool", "h1", 2)
		// A report still on its way when the channel closes would count as a sign of life.
		eventually(t, "the host is configured", func() bool {
			h, _ := w.brokers[0].live.live(hostKey{"pool", "h1"}, time.Hour)
			return h.report.ConfigGeneration > 0
		})
		a.set(func() {})
		a.nc.Close()
		eventually(t, "the broker misses it", func() bool {
			_, there := w.brokers[0].live.live(hostKey{"pool", "h1"}, time.Hour)
			return !there
		})
		c := ask(w)
		stillWaiting(c)
		a.join(0)
		if a := <-c; a.reply.Host != "h1" {
			t.Errorf("got %+v", a.reply)
		}
	})
	t.Run("nobody is on the way", func(t *testing.T) {
		w := newWorld(t, 1)
		w.fake.EditHost("h1", func(h *model.Host) { h.Pool, h.Generation = "pool", 1 })
		if a := <-ask(w); a.reply.Err == nil || a.reply.Err.Code != refusal.NoHost || time.Since(a.asked) > returning/2 {
			t.Errorf("got %+v after %s", a.reply, time.Since(a.asked))
		}
	})
}

func TestGatewayLoad(t *testing.T) {
	w := newWorld(t, 1)
	gw := w.dial(0, identity.Gateway(ns, ws, "gw"))
	for i, r := range []bus.GatewayReport{{Sessions: 3, Pending: 1}, {Sessions: 4}} {
		r.Gateway = "lies"
		data, _ := json.Marshal(r)
		gw.Publish(bus.GatewayReportSubject("gw", fmt.Sprint("pod", i)), data)
	}
	gw.Flush()
	b := w.brokers[0]
	eventually(t, "the pods' load adds up", func() bool { return b.Connections()["gw"] == 8 })
	if b.Connections()["lies"] != 0 {
		t.Error("a gateway reported for another")
	}
	b.status.lookForSilence(w.fake.Snapshot())
	eventually(t, "the sessions are written", func() bool { n, ok := w.fake.GatewaySessions("gw"); return ok && n == 7 })
}

// A pod that drains is soon silent, since its gateway container ends first: the hosts' reports tell of its sessions.
func TestGatewayInstances(t *testing.T) {
	now := time.Date(2026, 5, 4, 12, 0, 0, 0, time.UTC)
	r := newRegistry(func() time.Time { return now })
	on := func(instance, gateway string) bus.HostSession {
		return bus.HostSession{State: bus.SessionActive, Gateway: gateway, Instance: instance}
	}
	r.report(hostKey{"p", "h1"}, bus.HostReport{Boot: "a", Sequence: 1, Sessions: []bus.HostSession{on("1", "gw"), on("2", "gw"), on("9", "other"), {State: bus.SessionDisconnected}}})
	r.report(hostKey{"p", "h2"}, bus.HostReport{Boot: "a", Sequence: 1, Sessions: []bus.HostSession{on("2", "gw")}})
	r.gatewayReport(gatewayKey{"gw", "1"}, bus.GatewayReport{Sessions: 3})
	r.gatewayReport(gatewayKey{"gw", "3"}, bus.GatewayReport{Sessions: 0})
	r.gatewayReport(gatewayKey{"other", "9"}, bus.GatewayReport{Sessions: 1})
	check := func(what string, shared bool, want ...model.GatewayInstance) {
		t.Helper()
		if got := r.instances("ws", &model.Gateway{Name: "gw", Shared: shared}); !slices.Equal(got, want) {
			t.Errorf("%s: got %+v, want %+v", what, got, want)
		}
	}
	one := func(name string, sessions int32, draining bool) model.GatewayInstance {
		return model.GatewayInstance{Name: name, Workspace: "ws", Sessions: sessions, Draining: draining}
	}
	check("pods that report are believed", false, one("1", 3, false), one("2", 2, true), one("3", 0, false))
	check("but for others' sessions", true, one("1", 1, false), one("2", 2, true), one("3", 0, false))
	r.gatewayReport(gatewayKey{"gw", "1"}, bus.GatewayReport{Sessions: 3, Draining: true})
	now = now.Add(gatewaySilence)
	check("silent pods", false, one("1", 1, true), one("2", 2, true))
	r.report(hostKey{"p", "h2"}, bus.HostReport{Boot: "a", Sequence: 2})
	r.report(hostKey{"p", "h1"}, bus.HostReport{Boot: "a", Sequence: 2})
	check("the last session has ended", false)
}

// Clients that are given a gateway at one time are spread, at one broker or at several.
func TestGatewayChoiceCountsThoseOnTheirWay(t *testing.T) {
	w := newWorld(t, 2)
	var gateways []*model.Gateway
	for _, n := range []string{"a", "b", "c"} {
		gateways = append(gateways, &model.Gateway{Name: n, Ready: n != "c"})
	}
	conns := map[string]*nats.Conn{}
	report := func(name string, r bus.GatewayReport) {
		if conns[name] == nil {
			conns[name] = w.dial(0, identity.Gateway(ns, ws, name))
		}
		data, _ := json.Marshal(r)
		conns[name].Publish(bus.GatewayReportSubject(name, "pod"), data)
		conns[name].Flush()
	}
	everywhere := func(what string, ok func(map[string]int32) bool) {
		t.Helper()
		eventually(t, what, func() bool { return ok(w.brokers[0].Connections()) && ok(w.brokers[1].Connections()) })
	}
	report("a", bus.GatewayReport{Sessions: 4})
	report("b", bus.GatewayReport{Sessions: 5})
	everywhere("the load is known", func(c map[string]int32) bool { return c["a"] == 4 && c["b"] == 5 })

	chosen := map[string]int{}
	for i := range 9 {
		g, weighed := w.brokers[0].Choose(gateways, fmt.Sprint("t", i))
		chosen[g.Name]++
		if i == 1 && !strings.Contains(weighed, "a 4+0+1, b 5+0+0, c 0+0+0 (not ready)") {
			t.Errorf("weighed %q", weighed)
		}
	}
	if chosen["a"] != 5 || chosen["b"] != 4 {
		t.Errorf("nine at one time were spread %v over 4 and 5 sessions", chosen)
	}
	w.brokers[0].Expect("b", "own choice")
	everywhere("the other broker counts them too", func(c map[string]int32) bool { return c["a"] == 9 && c["b"] == 10 })

	// One of them arrives, at another gateway than foreseen, and is counted once throughout.
	w.brokers[1].arrived("b", "t0")
	everywhere("the arrival is counted where it is", func(c map[string]int32) bool { return c["a"] == 8 && c["b"] == 11 })
	report("b", bus.GatewayReport{Sessions: 6})
	everywhere("and by the gateway's report", func(c map[string]int32) bool { return c["a"] == 8 && c["b"] == 11 })

	report("a", bus.GatewayReport{Sessions: 0, Draining: true})
	report("b", bus.GatewayReport{Sessions: 10, MaxSessions: 11})
	everywhere("the drain is known", func(c map[string]int32) bool { return c["a"] == 4 && c["b"] == 15 })
	if g, weighed := w.brokers[1].Choose(gateways, "x"); g.Name != "b" || !strings.Contains(weighed, "a 0+0+4 (full or draining)") {
		t.Errorf("a draining gateway: chose %s of %s", g.Name, weighed)
	}
	if g, weighed := w.brokers[1].Choose(gateways[2:], "y"); g != nil {
		t.Errorf("a gateway that is not ready was chosen of %s", weighed)
	}
}

// Who has a ticket and never comes is forgotten.
func TestJourneysEnd(t *testing.T) {
	now := time.Unix(1000, 0)
	r := newRegistry(func() time.Time { return now })
	r.travel("t1", "a", false)
	r.travel("t2", "a", true)
	r.travel("t2", "a", false) // heard late
	check := func(want int32) {
		t.Helper()
		if got := r.gatewayLoads()["a"].connections(); got != want {
			t.Errorf("%d on their way, want %d", got, want)
		}
	}
	check(2)
	now = now.Add(arrivalTime)
	check(1)
	now = now.Add(journeyTime)
	check(0)
	r.prune(func(hostKey) bool { return true }, time.Hour)
	if len(r.onTheWay) != 0 {
		t.Errorf("%v is kept", r.onTheWay)
	}
}

func TestRegistry(t *testing.T) {
	now := time.Unix(1000, 0)
	r := newRegistry(func() time.Time { return now })
	k, pool := hostKey{"p", "h"}, &model.Pool{Name: "p", HeartbeatTimeout: 30 * time.Second}
	declared := map[string]*model.Host{"h": {Name: "h", Pool: "p"}}
	view := func() string {
		var h placement.Host
		for h = range r.placementHosts(pool, r.join(declared)["p"]) {
		}
		return fmt.Sprint(h.Connected, len(h.Sessions), len(h.Reserved))
	}
	check := func(what, want string) {
		t.Helper()
		if got := view(); got != want {
			t.Errorf("%s: got %s, want %s", what, got, want)
		}
	}
	report := func(boot string, seq uint64, sessions ...string) bus.HostReport {
		rep := bus.HostReport{Boot: boot, Sequence: seq}
		for _, s := range sessions {
			rep.Sessions = append(rep.Sessions, bus.HostSession{SessionID: s})
		}
		return rep
	}
	check("unknown", "false 0 0")
	r.report(k, report("1", 5))
	check("reported", "true 0 0")
	settle := r.promise(k, "s1", "u", now.Add(10*time.Second))
	r.promise(k, "s2", "v", now.Add(10*time.Second))
	check("promised", "true 0 2")
	settle(false, 0)
	check("refused", "true 0 1")
	r.promise(k, "s4", "u", now.Add(10*time.Second))(true, 0)
	check("accepted", "true 1 1")
	r.report(k, report("1", 6, "s2", "s4"))
	check("a promise kept is counted once", "true 2 0")
	if r.report(k, report("1", 6)) || r.report(k, report("1", 4)) {
		t.Error("a late report was taken")
	}
	r.report(k, report("2", 1))
	check("restarted", "true 0 0")
	if r.report(k, report("1", 7, "s2")) {
		t.Error("a report of the life before was taken")
	}
	settle = r.promise(k, "s5", "w", now.Add(10*time.Second))
	settle(true, 1)
	check("accepted after the last report", "true 1 0")
	r.report(k, report("2", 2))
	check("a later report has the last word, also on what it doesn't list", "true 0 0")
	settle = r.promise(k, "s6", "w", now.Add(10*time.Second))
	r.report(k, report("2", 3))
	settle(true, 2)
	check("the report was faster than the answer", "true 0 0")
	r.promise(k, "s3", "u", now.Add(10*time.Second))
	now = now.Add(11 * time.Second)
	check("a promise lapsed", "true 0 0")
	now = now.Add(19 * time.Second)
	check("silent", "false 0 0")
	r.report(k, report("2", 4))
	leaving := report("2", 5)
	leaving.Leaving = true
	r.report(k, leaving)
	check("leaving", "false 0 0")
	now = now.Add(time.Hour)
	r.prune(func(hostKey) bool { return true }, time.Minute)
	if len(r.hosts) != 1 {
		t.Error("a declared host was forgotten")
	}
	r.prune(func(hostKey) bool { return false }, time.Minute)
	if len(r.hosts) != 0 {
		t.Error("an undeclared, silent host was kept")
	}
}

// A decision with all that it takes to know the hosts.
func BenchmarkBest(b *testing.B) {
	now := time.Unix(1000, 0)
	r := newRegistry(func() time.Time { return now })
	pool := &model.Pool{Name: "pool", MaxSessions: 16, HeartbeatTimeout: time.Minute}
	declared := map[string]*model.Host{}
	for i := range 10_000 {
		name := fmt.Sprintf("h%05d", i)
		declared[name] = &model.Host{Name: name, Pool: "pool"}
		rep := bus.HostReport{Boot: "1", Sequence: 1, RDPReady: true}
		for j := range i % 4 {
			rep.Sessions = append(rep.Sessions, bus.HostSession{SessionID: fmt.Sprint(j), User: fmt.Sprint("user", i, j)})
		}
		r.report(hostKey{"pool", name}, rep)
	}
	hosts := r.join(declared)["pool"]
	b.ReportAllocs()
	for b.Loop() {
		if c, found, _ := r.best(pool, hosts, "u", nil); !found || c.Host != "h00000" {
			b.Fatal(c)
		}
	}
}
