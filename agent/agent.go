// Package agent is what runs beside an RDP server and makes its machine a session host. It listens on no network
// address: it enrols once, keeps one outbound control channel to the workspace's brokers, and for each session dials
// the gateway that holds the client and joins it to the RDP server on the loopback address.
//
//	enrol.go     step 0: registration token and CSRs -> certificates
//	state.go     what survives a restart, each generation complete or absent
//	renew.go     the next certificates, at two thirds of the life of these
//	channel.go   the control channel: one bus connection, remade for ever
//	report.go    presence: what brokers know of this host
//	ledger.go    the host's own word on whether one session more fits
//	desktops*.go which sessions the RDP server holds
//	presence.go  whose those are, and what is told of them
//	act.go       what an administrator or the user wants done to a session; package control has the workings
//	reverse.go   steps 9 to 11: dial the gateway, join, copy
//	signin.go    who logs in by which connection; package login has the workings
//	probe.go     whether the RDP server really answers, and with which certificate
//	health.go    a Unix socket in the state folder, for liveness probes
//	notify.go    what systemd hears of it
//	service_*.go a systemd unit on Linux, a service on Windows
package agent

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"rendezvous.dev/rendezvous/agent/control"
	"rendezvous.dev/rendezvous/agent/login"
	"rendezvous.dev/rendezvous/agent/login/setup"
	"rendezvous.dev/rendezvous/wire/identity"
	"rendezvous.dev/rendezvous/wire/proxydial"
)

// Options is what one agent is started with.
type Options struct {
	// Broker is the https URL of the workspace's broker, for enrolment.
	Broker string
	// CAFile (PEM) verifies the broker's HTTPS; empty, or an empty file, means the machine's own roots.
	CAFile string
	// TokenFile holds the registration token. It is read at each enrolment, so that a new token heals a refused one.
	TokenFile string
	// Proxy is the URL of an HTTP proxy for everything that the agent dials, in place of HTTPS_PROXY; NO_PROXY still applies.
	Proxy string
	// ProxyAuthFile holds USER:PASSWORD for Proxy, where it wants them.
	ProxyAuthFile string
	// Host is the session host's name, a DNS label; empty means the machine's name.
	Host string
	// StateDir keeps keys and certificates; it must survive restarts and be readable by nobody else.
	StateDir string
	// RDPAddr is the RDP server's loopback address.
	RDPAddr string
	// RDPCertDir is where tls.crt and tls.key for the RDP server go. Empty: on Windows the listener's own
	// configuration is set, elsewhere the host keeps its own certificate.
	RDPCertDir string
	// UnixTable is the kernel's table of Unix sockets, which tells the RDP server's sessions; /proc/net/unix if empty.
	UnixTable string
	// LoginDir is the folder with the socket by which PAM asks whose a connection is, so that people are logged in by
	// their connections. Empty: the RDP server asks for credentials itself.
	LoginDir string
	// LoginShared says that the desktops are in a container beside this one, which shares LoginDir: the agent puts a copy of
	// its program there, for PAM, and the lists of accounts. Otherwise it makes accounts on its own machine, as root.
	LoginShared bool
	// Drain is how long a stopping agent waits for its sessions to end.
	Drain time.Duration
	// Version is reported to the brokers.
	Version string
	// Log gets everything; nil means slog.Default.
	Log *slog.Logger

	proxy    *url.URL // Proxy, with its credentials
	timing   timing
	desktops func() map[desktop]bool // readDesktops, but for some tests
	// listeners looks at who listens at RDPAddr; login.Listeners, but for some tests.
	listeners func() (login.Listening, error)
	control   control.Control // for some tests
	// guarded says why logging people in by connection would not be safe on this machine; setup.Check, but for some tests.
	guarded func() error
}

// timing is what tests shorten.
type timing struct {
	probe        time.Duration // for one probe of the RDP server
	probeReady   time.Duration // between probes of a server that answers, where the kernel can't be asked, and between looks at who may log in
	probeAgain   time.Duration // between probes of one that there is no reason to ask
	look         time.Duration // between looks at the RDP server's sessions
	probeUnready time.Duration // between looks at its listening socket, and at first between probes of one that does not answer
	retryMin     time.Duration // first delay after a transient failure
	retryMax     time.Duration // and the longest
	refusedMax   time.Duration // longest delay after a final refusal
	closeGrace   time.Duration // from one direction's end to the forced end of the other
	joinMin      time.Duration // what a session gets for its join at least, whatever the clocks say
	displaced    time.Duration // before coming back after another machine took this one's place, up to twice that
	unrenewed    time.Duration // for how long brokers may refuse a renewed key before the one before is taken up again
}

func (t timing) withDefaults() timing {
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	def(&t.probe, 5*time.Second)
	def(&t.probeReady, 10*time.Second)
	def(&t.probeAgain, 5*time.Minute)
	def(&t.look, time.Second)
	def(&t.probeUnready, time.Second)
	def(&t.retryMin, 500*time.Millisecond)
	def(&t.retryMax, 15*time.Second)
	def(&t.refusedMax, time.Minute)
	def(&t.closeGrace, 10*time.Second)
	def(&t.joinMin, 5*time.Second)
	def(&t.displaced, 30*time.Second)
	def(&t.unrenewed, 30*time.Second)
	return t
}

// withDefaults checks the options and fills in what may be left out. Errors name the flag.
func (o Options) withDefaults() (Options, error) {
	o.timing = o.timing.withDefaults()
	if o.Log == nil {
		o.Log = slog.Default()
	}
	if o.desktops == nil {
		o.desktops = func() map[desktop]bool { return readDesktops(o.UnixTable) }
	}
	if o.guarded == nil {
		o.guarded = func() error { return nil } // an image has its own files, and a machine that asks for credentials none of ours
		if o.LoginDir != "" && !o.LoginShared {
			o.guarded = func() error { return setup.Check(o.LoginDir) }
		}
	}
	if o.StateDir == "" {
		return o, errors.New("--state-dir: give the folder that keeps this host's keys and certificates")
	}
	if u, err := url.Parse(o.Broker); err != nil || u.Scheme != "https" || u.Host == "" {
		return o, fmt.Errorf("--broker: %q is not an https URL: take it from key `broker` of the pool's registration Secret", o.Broker)
	}
	o.Broker = strings.TrimRight(o.Broker, "/")
	auth := ""
	if o.ProxyAuthFile != "" {
		if o.Proxy == "" {
			return o, errors.New("--proxy-auth-file: name the proxy with --proxy")
		}
		data, err := os.ReadFile(o.ProxyAuthFile)
		if err != nil {
			return o, fmt.Errorf("--proxy-auth-file: %w", err)
		}
		auth = string(data)
	}
	if o.Proxy != "" {
		var err error
		if o.proxy, err = proxydial.ParseProxy(o.Proxy, auth); err != nil {
			return o, fmt.Errorf("--proxy: %w (--proxy-auth-file names the file with them)", err)
		}
	}
	if o.RDPAddr == "" {
		o.RDPAddr = "127.0.0.1:3389"
	}
	if o.Host == "" {
		name, err := os.Hostname()
		if err != nil {
			return o, fmt.Errorf("--host: %w", err)
		}
		o.Host, _, _ = strings.Cut(strings.ToLower(name), ".")
	}
	if o.listeners == nil {
		addr, err := netip.ParseAddrPort(o.RDPAddr)
		o.listeners = func() (login.Listening, error) {
			if err != nil { // a name
				return login.Listening{}, err
			}
			return login.Listeners(addr)
		}
	}
	if !identity.IsLabel(o.Host) {
		return o, fmt.Errorf("--host: %q is not a DNS label (lower-case letters, digits and '-', at most 63): name the session host with --host", o.Host)
	}
	return o, nil
}

// Agent is one running agent.
type Agent struct {
	opts    Options
	log     *slog.Logger
	store   store
	ledger  *ledger
	install installer       // nil where the host keeps its own RDP certificate
	signIn  *signIn         // nil where the RDP server asks for credentials itself; set by Run
	control control.Control // nil where this host's desktops can't be acted on; set by Run
	boot    string
	// tlsSessions with gateway instances, to resume.
	tlsSessions tls.ClientSessionCache

	changed chan struct{} // one waiting signal: report at once
	redial  chan struct{} // one waiting signal: make another control channel in place of this one
	early   chan struct{} // one waiting signal: renew before the time has come
	suspect chan struct{} // one waiting signal: ask the RDP server, for something has changed or gone wrong
	// displaced is one waiting signal: another machine came as this host, and took the channel's place.
	displaced chan struct{}

	enrolling enrolling // owned by whoever enrols: one at a time
	// Owned by keepChannel.
	refused    string // token that the broker refused when the bus refused this host's key
	renewAgain bool   // once there is a channel

	mu       sync.Mutex
	member   *member    // guarded by mu; nil before enrolment
	previous *renewed   // guarded by mu; what member replaced, until a channel is made with member
	conn     *nats.Conn // guarded by mu; nil while there is no control channel
	probed   probeResult
	sequence uint64
	// Of the last try to enrol or to make a channel; guarded by mu.
	problem        string
	refusedForGood bool

	notify notifier      // set by Run
	ready  chan struct{} // closed once the agent serves its own machine
}

// Ready is closed once Run has all that it needs of its own machine: its folders, and the sockets by which it is asked. Whether
// a broker can be reached is not part of it: that may come later, and restarting the agent would not bring it about.
func (a *Agent) Ready() <-chan struct{} { return a.ready }

// trouble notes why there is no membership or no channel; nil where there is.
func (a *Agent) trouble(err error, forGood bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.problem, a.refusedForGood = "", forGood
	if err != nil {
		a.problem = err.Error()
	}
}

// dialer is how the agent reaches broker, bus and gateways.
func (a *Agent) dialer() proxydial.Dialer { return proxydial.Dialer{Proxy: a.opts.proxy} }

// maxInstances is how many gateway instances' TLS sessions are kept.
const maxInstances = 64

// New makes an agent. It touches nothing yet.
func New(o Options) (*Agent, error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, err
	}
	boot := make([]byte, 8)
	rand.Read(boot)
	return &Agent{
		opts: o, log: o.Log.With("host", o.Host), store: store{dir: o.StateDir}, ledger: newLedger(),
		install: newInstaller(o.RDPCertDir), boot: hex.EncodeToString(boot), tlsSessions: tls.NewLRUClientSessionCache(maxInstances),
		changed: make(chan struct{}, 1), redial: make(chan struct{}, 1), early: make(chan struct{}, 1), suspect: make(chan struct{}, 1), displaced: make(chan struct{}, 1),
		ready: make(chan struct{}),
	}, nil
}

// Run serves until ctx ends, then drains: no new session, a last report, and the sessions' own end or Options.Drain.
// It returns early only where this machine can't run an agent at all (its state folder, its options).
func (a *Agent) Run(ctx context.Context) error {
	a.notify = newNotifier()
	if err := a.store.prepare(); err != nil {
		return err
	}
	a.control = a.opts.control
	if a.control == nil {
		a.control = controlWithoutLogin()
	}
	if a.opts.LoginDir != "" {
		s, err := a.serveLogins()
		if err != nil {
			return err
		}
		defer s.Close()
		a.signIn, a.ledger.owner = s, s.records.ByUID
		closeControl, err := a.openControl()
		if err != nil {
			return err
		}
		defer closeControl()
		if err := a.opts.guarded(); err != nil {
			a.log.Error("this host takes no sessions, because logging in by connection is not safe here: run `agent login install`", "why", err)
		}
	}
	if health, err := a.serveHealth(); err != nil {
		// Windows before 2019 has no Unix sockets; there the service manager looks after the process alone.
		a.log.Warn("`agent healthcheck` will find nothing", "error", err)
	} else {
		defer health.Close()
	}

	if err := a.notify.send("READY=1"); err != nil {
		a.log.Warn("systemd was not told that the agent serves", "error", err)
	}
	close(a.ready)
	// It goes on while the agent drains.
	telling, stopTelling := context.WithCancel(context.WithoutCancel(ctx))
	defer stopTelling()
	go a.keepNotifying(telling)

	m, err := a.membership(ctx, true)
	if err != nil {
		if ctx.Err() != nil {
			return nil // told to stop before there was anything to serve
		}
		return err
	}
	a.adopt(m)
	a.log.Info("session host", "pool", m.Pool, "workspace", m.Workspace, "namespace", m.Namespace, "certificateNotAfter", m.client.NotAfter)

	// The channel, the reports and the probe outlive ctx: a draining host still says how it is.
	serving, stopServing := context.WithCancel(context.WithoutCancel(ctx))
	var wg sync.WaitGroup
	for _, loop := range []func(context.Context){a.keepProbing, a.keepLooking, a.keepReporting, a.keepRenewing, a.keepChannel} {
		wg.Go(func() { loop(serving) })
	}

	<-ctx.Done()
	a.notify.send("STOPPING=1")
	a.log.Info("stopping", "sessions", a.ledger.count(), "drain", a.opts.Drain.String())
	a.ledger.stop()
	a.publishReport()
	drained, cancel := context.WithTimeout(serving, a.opts.Drain)
	if err := a.ledger.wait(drained); err != nil {
		a.log.Warn("sessions cut at the end of the drain", "sessions", a.ledger.count())
	}
	cancel()
	a.ledger.endAll()
	stopServing()
	wg.Wait()
	return nil
}

// adopt makes m the current membership and gives its RDP certificate to the RDP server.
func (a *Agent) adopt(m *member) {
	a.mu.Lock()
	a.member = m
	a.mu.Unlock()
	if a.install == nil || len(m.RDPCertificate) == 0 {
		return
	}
	if err := a.install.Install([]byte(m.RDPCertificate), []byte(m.RDPKey)); err != nil {
		a.log.Error("the RDP certificate could not be installed; clients will not trust this host", "error", err)
		return
	}
	signal(a.suspect)
	a.log.Info("RDP certificate installed", "fingerprint", fingerprint(m.rdp), "notAfter", m.rdp.NotAfter)
}

// current is the membership in force.
func (a *Agent) current() *member {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.member
}

// RenewNow asks for new certificates before their time, as after a leak of the host's keys. It does not wait for them.
func (a *Agent) RenewNow() { signal(a.early) }

// signal wakes the reader of a one-place channel without ever waiting for it.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// sleep waits for d or for ctx, whose error it returns.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}
