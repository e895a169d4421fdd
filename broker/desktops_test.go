package broker_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"rendezvous.dev/rendezvous/agent"
	"rendezvous.dev/rendezvous/agent/control"
	"rendezvous.dev/rendezvous/agent/login"
	"rendezvous.dev/rendezvous/broker"
	"rendezvous.dev/rendezvous/broker/internal/fake"
	"rendezvous.dev/rendezvous/broker/internal/testca"
	"rendezvous.dev/rendezvous/broker/model"
	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/config"
	"rendezvous.dev/rendezvous/wire/identity"
	"rendezvous.dev/rendezvous/wire/mtls"
	"rendezvous.dev/rendezvous/wire/ticket"
)

const (
	ns, ws   = "ns", "ws"
	patience = 30 * time.Second
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never happened: %s", what)
		}
	}
}

// listen serves each TLS connection; where met is set it is told of each first, and answers as an RDP server does before TLS.
func listen(t *testing.T, conf *tls.Config, met func(net.Conn), serve func(net.Conn)) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				if met != nil {
					met(c)
					if _, err := io.ReadFull(c, make([]byte, 19)); err != nil {
						c.Close()
						return
					}
					c.Write([]byte{3, 0, 0, 19, 14, 0xd0, 0, 0, 0, 0, 0, 2, 0, 8, 0, 1, 0, 0, 0})
				}
				serve(tls.Server(c, conf))
			}()
		}
	}()
	return l.Addr().String()
}

// TestBackToOnesOwnDesktop is of real agents, a real broker and what xrdp leaves in the kernel's table of sockets: who
// left a desktop behind gets back to it, past emptier hosts and although its host drains; nobody else gets there.
func TestBackToOnesOwnDesktop(t *testing.T) {
	if runtime.GOOS != "linux" || os.Geteuid() != 0 {
		t.Skip("elsewhere agents see no desktops, and answer root alone")
	}
	ca := testca.New(t, "ca")
	local := testca.IdentitySpec(identity.Broker(ns, ws))
	public := testca.Spec{IPs: local.IPs, DNSNames: []string{"gw.test"}}
	secret := make([]byte, 32)
	rand.Read(secret)
	registration := "rdvreg.ns.pool.-." + base64.RawURLEncoding.EncodeToString(secret)
	hash := sha256.Sum256([]byte(registration))
	certPEM, keyPEM := ca.Issue(public)
	pair, err := tls.X509KeyPair(certPEM, keyPEM)
	must(t, err)
	serverTLS := &tls.Config{Certificates: []tls.Certificate{pair}}

	// A gateway that takes every join, and an RDP server that answers; what it says is of no matter here.
	joined := make(chan net.Conn, 9)
	gatewayAddr := listen(t, serverTLS, nil, func(c net.Conn) {
		if _, err := http.ReadRequest(bufio.NewReader(c)); err != nil {
			return
		}
		io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: rendezvous-join/1\r\n\r\n")
		joined <- c
	})
	from := make(chan string, 9) // the addresses of those who log in by them
	rdpAddr := listen(t, serverTLS, func(c net.Conn) {
		if a, _, _ := net.SplitHostPort(c.RemoteAddr().String()); a != "127.0.0.1" {
			from <- a
		}
	}, func(c net.Conn) { io.Copy(io.Discard, c); c.Close() })
	_, gatewayPort, _ := net.SplitHostPort(gatewayAddr)
	var port int32
	fmt.Sscan(gatewayPort, &port)

	world := fake.New(&model.Snapshot{
		Workspace: &model.Workspace{Name: ws, Resources: []model.Resource{{Name: "desk", Pool: "pool", Groups: []string{"all"}}}},
		Pools: map[string]*model.Pool{"pool": {
			Name: "pool", Generation: 1, MaxSessions: 2, HeartbeatTimeout: 30 * time.Second, ConnectTimeout: 5 * time.Second,
			Accounts:     &model.Accounts{Create: true, FirstUID: 10000, LastUID: 59999},
			Registration: model.Registration{TokenHash: hex.EncodeToString(hash[:]), Expires: time.Now().Add(time.Hour)},
		}},
		Gateways: []*model.Gateway{{Name: "gw", Hostname: "127.0.0.1", Port: port, Ready: true, CABundle: string(ca.PEM)}},
	})
	world.Signer = func(r model.CertificateRequest) ([]byte, error) { return ca.SignCSR(r.CSR), nil }
	busPort := freePort(t)
	tickets := ca.Dir(ca.IssueEd25519(testca.IdentitySpec(identity.TicketSigner(ns, ws))))
	started := make(chan broker.Addresses, 1)
	run(t, func(ctx context.Context) error {
		return broker.Run(ctx, broker.Options{
			Config: config.Broker{
				Namespace: ns, Workspace: ws, BusURLs: []string{fmt.Sprintf("tls://127.0.0.1:%d", busPort)}, InternalIssuer: config.Issuer{Name: "internal"},
			},
			ConfigDir: t.TempDir(), TLSDir: ca.Dir(certPEM, keyPEM), BusDir: ca.Dir(ca.Issue(local)), SigningDir: ca.Dir(certPEM, keyPEM), TicketsDir: tickets,
			Name: "broker-0", Host: "127.0.0.1", FeedPort: -1, BusPort: busPort, BusWebSocketPort: -1, BusRoutePort: -1, SessionsPort: -1, MetricsAddr: "127.0.0.1:0",
			Inventory: world, Log: slog.New(slog.DiscardHandler), Started: func(a broker.Addresses) { started <- a },
		})
	})
	addrs := <-started

	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		must(t, os.WriteFile(path+".new", []byte(text), 0o600))
		must(t, os.Rename(path+".new", path))
		return path
	}
	token, caFile := write("token", registration), write("ca", string(ca.PEM))
	logins := map[string]string{} // login folders by host
	for _, host := range []string{"h1", "h2"} {
		table := write("table-"+host, "")
		state, err := os.MkdirTemp("", "rdv") // short enough for a socket's path
		must(t, err)
		t.Cleanup(func() { os.RemoveAll(state) })
		logins[host] = filepath.Join(state, "l")
		a, err := agent.New(agent.Options{
			Broker: "https://" + addrs.Feed.String(), CAFile: caFile, TokenFile: token, Host: host, StateDir: filepath.Join(state, "s"), RDPAddr: rdpAddr,
			LoginDir: logins[host], LoginShared: true, UnixTable: table, Version: "test", Log: slog.New(slog.DiscardHandler),
		})
		must(t, err)
		run(t, a.Run)
	}
	status := func(host, what string, ok func(model.AgentStatus) bool) {
		t.Helper()
		eventually(t, host+" "+what, func() bool { h := world.Snapshot().Hosts[host]; return h != nil && h.Agent != nil && ok(*h.Agent) })
	}
	for _, host := range []string{"h1", "h2"} {
		status(host, "is ready", func(s model.AgentStatus) bool { return s.Connected && s.RDPReady })
	}

	gwID := identity.Gateway(ns, ws, "gw")
	gw, err := nats.Connect("tls://"+addrs.Bus.String(), nats.CustomInboxPrefix(bus.InboxPrefix(gwID)),
		nats.Secure(ca.Reloader(gwID).ClientConfig("127.0.0.1", mtls.AllowRole(ns, ws, identity.RoleBroker))))
	must(t, err)
	t.Cleanup(gw.Close)
	key := testca.NewReloader(t, tickets).Certificate().PrivateKey.(ed25519.PrivateKey)
	connect := func(user string) (host string, leg net.Conn) {
		t.Helper()
		raw, err := ticket.Sign(ticket.Claims{
			ID: rand.Text(), Namespace: ns, Workspace: ws, User: user, Groups: []string{"all"}, Resource: "desk", Target: brokerapi.PoolName(ns, "pool"),
			IssuedAt: time.Now(), Expires: time.Now().Add(time.Hour),
		}, key)
		must(t, err)
		data, _ := json.Marshal(bus.ConnectRequest{
			SessionID: rand.Text(), Ticket: raw, Gateway: "gw", Instance: "pod", JoinSecret: secret, Deadline: time.Now().Add(patience), ClientAddr: "192.0.2.1:4711",
		})
		m, err := gw.Request(bus.SubjectConnect, data, patience)
		must(t, err)
		var reply bus.ConnectReply
		must(t, json.Unmarshal(m.Data, &reply))
		if reply.Err != nil {
			t.Fatalf("%s: %v", user, reply.Err)
		}
		return reply.Host, <-joined
	}
	expect := func(user, want string) net.Conn {
		t.Helper()
		host, leg := connect(user)
		if host != want {
			t.Errorf("%s got to %s, want %s", user, host, want)
		}
		return leg
	}

	// As PAM's helper, where the account is there already.
	logIn := func(host, account string) (uid string) {
		t.Helper()
		list, _, err := world.ReadAccounts(t.Context(), "pool")
		must(t, err)
		uid, _, _ = strings.Cut(list[account], " ")
		address := <-from
		time.Sleep(100 * time.Millisecond) // a client's handshake takes longer than the agent's last step of a dial
		c, err := net.Dial("unix", filepath.Join(logins[host], login.SocketName))
		must(t, err)
		defer c.Close()
		r, answer := bufio.NewReader(c), ""
		for _, line := range []string{fmt.Sprintf(`{"user":%q,"remote":%q,"service":"xrdp-sesman"}`, account, address), `{"uid":` + uid + `}`} {
			io.WriteString(c, line+"\n")
			said, err := r.ReadString('\n')
			if err != nil {
				t.Fatalf("%s is not logged in: %s%v", account, answer, err)
			}
			answer = said
		}
		if answer != `{"ok":true}`+"\n" {
			t.Fatalf("%s is not logged in: %s", account, answer)
		}
		return uid
	}

	// h2 is the emptier host for both, but for what they have to come back to.
	warm := expect("warm", "h1")
	defer warm.Close()
	logIn("h1", "warm")
	leg := expect("alice", "h2")
	uid := logIn("h2", "alice")
	const others = "0: 2 0 10000 1 01 1 /run/xrdp/sockdir/1001/xrdp_chansrv_socket_11\n"
	write("table-h2", "0: 3 0 0 1 03 1 /run/xrdp/sockdir/"+uid+"/xrdp_chansrv_socket_10\n"+others)
	time.Sleep(2 * time.Second) // the agent looks every second; the stranger's desktop takes no place, so nothing tells of it
	leg.Close()
	write("table-h2", "0: 2 0 10000 1 01 1 /run/xrdp/sockdir/"+uid+"/xrdp_chansrv_socket_10\n")
	world.EditHost("h2", func(h *model.Host) { h.Drain, h.Generation = &model.Drain{Reason: "new image"}, h.Generation+1 })
	status("h2", "holds the desktop and drains", func(s model.AgentStatus) bool { return s.Sessions == 1 && s.DrainAcknowledged })
	expect("bob", "h1")
	leg = expect("alice", "h2")
	<-from // bob's
	logIn("h2", "alice")
	write("table-h2", "0: 3 0 0 1 03 1 /run/xrdp/sockdir/"+uid+"/xrdp_chansrv_socket_10\n")

	// What the operator asks, from here to the helper beside the desktops and back: her session is listed, she is told
	// something, and logged off.
	helper := &desktops{loggedOff: func() { write("table-h2", "") }}
	run(t, func(ctx context.Context) error {
		return control.Help(ctx, filepath.Join(logins["h2"], control.SocketName), helper, login.PeerUID, slog.New(slog.DiscardHandler))
	})
	operator := ca.Reloader(identity.Operator(ns, ws))
	hc := &http.Client{Transport: &http.Transport{
		TLSClientConfig: mtls.ClientConfig(*operator.Certificate(), operator.Roots(), "", mtls.AllowRole(ns, ws, identity.RoleBroker)),
	}}
	sessions := "https://" + addrs.Sessions.String() + brokerapi.PathAllSessions
	hers := func() (found []brokerapi.Session) {
		res, err := hc.Get(sessions)
		must(t, err)
		defer res.Body.Close()
		var all brokerapi.Sessions
		must(t, json.NewDecoder(res.Body).Decode(&all))
		for _, s := range all.Sessions {
			if s.User == "alice" {
				found = append(found, s)
			}
		}
		return found
	}
	var her brokerapi.Session
	eventually(t, "alice's session is listed", func() bool {
		all := hers()
		if len(all) != 1 || all[0].State != bus.SessionActive || all[0].Account != "alice" {
			return false
		}
		her = all[0]
		return true
	})
	if !her.Proven || her.Host != "h2" || her.Pool != "pool" || her.Resource != "desk" || her.Client != "192.0.2.1:4711" || her.Gateway != "gw" || her.Instance != "pod" {
		t.Errorf("her session is listed as %+v", her)
	}
	act := func(req brokerapi.ActRequest) (status int, answer string) {
		t.Helper()
		req.SessionID, req.By = her.ID, "eddie"
		body, _ := json.Marshal(req)
		res, err := hc.Post(sessions, "application/json", bytes.NewReader(body))
		must(t, err)
		defer res.Body.Close()
		data, err := io.ReadAll(res.Body)
		must(t, err)
		return res.StatusCode, string(data)
	}
	eventually(t, "the message is shown", func() bool { // once the helper has come
		status, _ := act(brokerapi.ActRequest{Act: bus.ActMessage, Text: "Save your work."})
		return status == http.StatusOK
	})
	if status, answer := act(brokerapi.ActRequest{Act: bus.ActEnd}); status != http.StatusOK || !strings.Contains(answer, "logged off from display :10 of alice") {
		t.Errorf("log-off: %d %s", status, answer)
	}
	if done := helper.all(); len(done) != 2 || done[0] != "message :10 "+uid+" Save your work." || done[1] != "log off :10 "+uid {
		t.Errorf("the helper did %q", done)
	}
	leg.SetReadDeadline(time.Now().Add(patience))
	if _, err := io.Copy(io.Discard, leg); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("her connection goes on after the log-off")
	}
	eventually(t, "her session is gone", func() bool { return len(hers()) == 0 })
	if status, answer := act(brokerapi.ActRequest{Act: bus.ActEnd}); status != http.StatusNotFound || !strings.Contains(answer, "list the sessions again") {
		t.Errorf("log-off of a session that is gone: %d %s", status, answer)
	}
}

// desktops stands for what a helper does to real ones.
type desktops struct {
	loggedOff func()

	mu   sync.Mutex
	done []string
}

func (d *desktops) LogOff(_ context.Context, at control.Desktop) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.done = append(d.done, fmt.Sprintf("log off :%d %d", at.Display, at.UID))
	d.loggedOff()
	return nil
}

func (d *desktops) Message(_ context.Context, at control.Desktop, text string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.done = append(d.done, fmt.Sprintf("message :%d %d %s", at.Display, at.UID, text))
	return nil
}

func (d *desktops) all() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.done)
}

func freePort(t *testing.T) int {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// run runs f until the test ends.
func run(t *testing.T, f func(context.Context) error) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(2 * patience):
			t.Error("it does not stop")
		}
	})
}
