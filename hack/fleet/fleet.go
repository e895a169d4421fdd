// Package fleet proves that nobody is dropped: many live sessions move checked data through several gateway pods and
// brokers, while everything around them is rolled, scaled, renewed, edited and killed.
//
//	fleet.go     the run, and what it stands on: a namespace of its own, machines outside the cluster
//	steps.go     what happens to it
//	session.go   users: connects, sessions, guests that come and go meanwhile
//	host.go      a machine: a real agent before a server that opens like RDP
//	stream.go    the data, of which both ends check each byte
//	provider.go  an identity provider with enough users
//	tally.go     counting; report.go: table and plot
//
// The product in it is the real one: agents, brokers, gateways and operator. Only the RDP server and the RDP client are
// stand-ins, so that hundreds fit on one machine; what they say to gateway and agent, and each other's TLS, is real.
package fleet

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/controller-runtime/pkg/client"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/hack/netlab"
	"rendezvous.dev/rendezvous/hack/stage"
)

// Names of the fleet's own world. Hosts and users reach it by names in a hosts file of their own.
const (
	Namespace     = "rendezvous-fleet"
	workspaceName = "fleet"
	poolName      = "machines"
	gatewayName   = "gw"
	resourceName  = "desk"
	group         = "fleet"

	brokerHost  = "broker.fleet.test"
	busHost     = "bus.fleet.test"
	gatewayHost = "gw.fleet.test"

	// spare places on each host, for guests and those who change.
	spare = 4
	// settle is what a step gets for what comes late.
	settle = 2 * time.Second
	// cable is the machines' own, beside the stage's.
	cable = 5
	// rdpPort is where the first machine's server listens, on the loopback of the machines' network.
	rdpPort = 40000
)

// Options of a run.
type Options struct {
	// Sessions that must live, on Hosts machines, through Gateways pods and Brokers.
	Sessions, Hosts, Gateways, Brokers int
	// Steps to take, by name; all when empty.
	Steps []string
	// Say prints progress.
	Say func(format string, args ...any)
}

type fleet struct {
	*stage.Stage
	o        Options
	images   map[string]string // another reference to the same program, by component
	provider *provider
	net      *netlab.Host
	dir      string
	roots    *x509.CertPool
	address  map[string]string // Service addresses by name
	http     *http.Client
	hosts    []*host
	guests   []user
	tally    *tally
	exec     func(*exec.Cmd) error // starts a process that dies with this one

	mu       sync.Mutex
	sessions []*session
}

// Run brings a fleet up, takes the steps, and removes it again. The report is there also where sessions were dropped;
// the error says so.
func Run(ctx context.Context, s *stage.Stage, o Options) (r *Report, err error) {
	chosen, err := choose(o.Steps)
	if err != nil {
		return nil, err
	}
	f := &fleet{Stage: s, o: o, tally: &tally{}, address: map[string]string{}}
	defer func() { err = errors.Join(err, f.down(context.WithoutCancel(ctx))) }()
	if err := f.up(ctx); err != nil {
		return nil, err
	}
	users, err := f.users("u", o.Sessions)
	if err == nil {
		f.guests, err = f.users("guest", 40)
	}
	if err != nil {
		return nil, err
	}
	r = newReport(o)
	r.Setup = time.Since(r.Began)
	began := time.Now()
	o.Say("connecting %d users", o.Sessions)
	if err := f.connectAll(ctx, users); err != nil {
		return nil, err
	}
	f.tally.start()
	o.Say("%d sessions live after %.1f s", f.tally.live.Load(), time.Since(began).Seconds())

	watching, stop := context.WithCancel(ctx)
	defer stop()
	go f.watch(watching)
	quiet := step{"nothing, to compare with", func(_ *fleet, ctx context.Context) error { return pause(ctx, 8*time.Second) }}
	for _, st := range append([]step{quiet}, chosen...) {
		var row Row
		row, err = f.take(ctx, st)
		r.Rows = append(r.Rows, row)
		o.Say("%s", row)
		if err != nil {
			break
		}
	}
	r.finish(f)
	if err != nil {
		return r, err
	}
	if r.Dropped > 0 || r.Wrong > 0 {
		return r, fmt.Errorf("fleet: %d sessions dropped, %d with wrong bytes: %v", r.Dropped, r.Wrong, r.Faults)
	}
	return r, nil
}

// pause waits for d, or until ctx ends.
func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}

// choose finds steps by name.
func choose(names []string) (chosen []step, err error) {
	if len(names) == 0 {
		return steps, nil
	}
	for _, n := range names {
		found := false
		for _, s := range steps {
			if s.name == n {
				chosen, found = append(chosen, s), true
			}
		}
		if !found {
			return nil, fmt.Errorf("fleet: there is no step %q, but: %q", n, StepNames())
		}
	}
	return chosen, nil
}

// take is one step: what happens, with guests meanwhile, and then a tenth of the users leave and come back, so that the
// next step meets sessions on old pods and on new ones.
func (f *fleet) take(ctx context.Context, st step) (Row, error) {
	r := Row{Step: st.name, Began: time.Since(f.tally.began).Seconds(), Sessions: int(f.tally.live.Load())}
	checked := f.tally.checked.Load()
	guesting, stop := context.WithCancel(ctx)
	var guests sync.WaitGroup
	guests.Go(func() { f.probe(guesting) })
	limited, cancel := context.WithTimeoutCause(ctx, stepLimit, fmt.Errorf("fleet: step %q is not over after %s", st.name, stepLimit))
	err := st.do(f, limited)
	cancel()
	if err == nil {
		err = pause(ctx, settle)
	}
	stop()
	guests.Wait()
	if err == nil {
		err = f.replace(ctx, f.release(max(1, f.o.Sessions/10), anyone))
	}
	live, going, perr := f.pods(ctx, rdv.LabelGateway, gatewayName)
	r.fill(f.tally.take(), time.Since(f.tally.began).Seconds(), f.tally.checked.Load()-checked)
	r.Pods, r.Draining = len(live), going
	return r, errors.Join(err, perr)
}

func meta(name string) metav1.ObjectMeta { return metav1.ObjectMeta{Namespace: Namespace, Name: name} }

// up makes all that a run needs.
func (f *fleet) up(ctx context.Context) error {
	f.exec = starter()
	f.roots = x509.NewCertPool()
	f.roots.AppendCertsFromPEM(f.CompanyCA)
	f.http = &http.Client{Timeout: connectTimeout, Transport: &http.Transport{
		DialContext: f.dial, TLSClientConfig: f.TLS(), MaxIdleConnsPerHost: atOnce, IdleConnTimeout: 5 * time.Second,
	}}
	if err := f.removeObjects(ctx); err != nil { // of a run that was killed
		return err
	}
	var err error
	if f.images, err = f.VariantImages(ctx, "fleet", "relay", "gateway", "broker"); err != nil {
		return err
	}
	cfg, err := clientcmd.BuildConfigFromFlags("", f.Kubeconfig)
	if err != nil {
		return err
	}
	node, err := url.Parse(cfg.Host)
	if err != nil {
		return err
	}
	if f.provider, err = newProvider(node.Hostname()); err != nil {
		return err
	}
	f.o.Say("workspace with %d brokers, gateway with %d pods, pool of %d machines", f.o.Brokers, f.o.Gateways, f.o.Hosts)
	if err := f.createObjects(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, 3*time.Minute, errors.New("fleet: the cluster's part is not ready after 3 minutes"))
	defer cancel()
	if err := errors.Join(f.ready(ctx, &rdv.Workspace{ObjectMeta: meta(workspaceName)}), f.ready(ctx, &rdv.Gateway{ObjectMeta: meta(gatewayName)})); err != nil {
		return err
	}
	for name, service := range map[string]string{brokerHost: workspaceName + "-broker", busHost: workspaceName + "-bus", gatewayHost: gatewayName} {
		var s corev1.Service
		if err := f.Client.Get(ctx, client.ObjectKey{Namespace: Namespace, Name: service}, &s); err != nil {
			return err
		}
		f.address[name] = s.Spec.ClusterIP
	}
	f.o.Say("enrolling the machines")
	if err := f.enrol(ctx); err != nil {
		return err
	}
	return f.hostsReady(ctx)
}

// dial reaches the fleet's own names.
func (f *fleet) dial(ctx context.Context, network, address string) (net.Conn, error) {
	name, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	if ip := f.address[name]; ip != "" {
		name = ip
	}
	return (&net.Dialer{Timeout: 10 * time.Second}).DialContext(ctx, network, net.JoinHostPort(name, port))
}

func (f *fleet) createObjects(ctx context.Context) error {
	company := rdv.IssuerReference{Kind: "ClusterIssuer", Name: "rdv-demo-ca"}
	// Little is reserved, so that new pods find room beside those that drain, on one small node.
	small := corev1.ResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("5m"), corev1.ResourceMemory: resource.MustParse("32Mi")}}
	for _, obj := range []client.Object{
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: Namespace}},
		&rdv.Workspace{ObjectMeta: meta(workspaceName), Spec: rdv.WorkspaceSpec{
			DisplayName: "Fleet", Hostname: brokerHost,
			Identity:     rdv.Identity{OIDC: rdv.OIDC{IssuerURL: f.provider.issuer, ClientID: clientID, CABundle: f.provider.ca}},
			Certificates: rdv.WorkspaceCertificates{IssuerRef: company},
			Signing:      rdv.Signing{IssuerRef: company},
			Resources: []rdv.Resource{{
				Name: resourceName, Type: rdv.ResourceDesktop, HostPoolRef: rdv.LocalReference{Name: poolName}, Access: rdv.Access{Groups: []string{group}},
			}},
			Broker: rdv.Broker{Replicas: new(int32(f.o.Brokers)), Resources: small, Bus: rdv.BusExposure{Hostname: busHost}},
		}},
		&rdv.HostPool{ObjectMeta: meta(poolName), Spec: rdv.HostPoolSpec{
			WorkspaceRef: rdv.LocalReference{Name: workspaceName}, Type: rdv.Pooled,
			MaxSessionsPerHost: new(int32((f.o.Sessions+f.o.Hosts-1)/f.o.Hosts + spare)),
			RDPCertificate:     &rdv.RDPCertificate{IssuerRef: company},
		}},
		&rdv.Gateway{ObjectMeta: meta(gatewayName), Spec: rdv.GatewaySpec{
			Hostname: gatewayHost, Replicas: new(int32(f.o.Gateways)), Certificates: rdv.GatewayCertificates{IssuerRef: company},
			Relay:     rdv.Relay{Resources: small, Drain: rdv.RelayDrain{DeadlineSeconds: new(int32(3600))}},
			Admission: rdv.Admission{Resources: small},
		}},
	} {
		if err := f.Client.Create(ctx, obj); err != nil {
			return fmt.Errorf("fleet: %w", err)
		}
	}
	return nil
}

// enrol makes machines of processes: agents in a network of their own into which nothing can dial.
func (f *fleet) enrol(ctx context.Context) (err error) {
	if f.net, err = netlab.New(ctx, "fleet", cable); err != nil {
		return err
	}
	if err := f.net.NoInbound(ctx); err != nil {
		return err
	}
	if f.dir, err = os.MkdirTemp("", "rdv-fleet-"); err != nil {
		return err
	}
	// `ip netns exec` lays these files over those in /etc.
	etc := filepath.Join("/etc/netns", f.net.Name)
	var names string
	for name, ip := range f.address {
		names += ip + " " + name + "\n"
	}
	var secret corev1.Secret
	if err := eventually(ctx, func() error {
		return f.Client.Get(ctx, client.ObjectKey{Namespace: Namespace, Name: poolName + "-registration"}, &secret)
	}); err != nil {
		return err
	}
	token, ca := filepath.Join(f.dir, "token"), filepath.Join(f.dir, "ca.crt")
	if err := errors.Join(os.MkdirAll(etc, 0o755), os.WriteFile(filepath.Join(etc, "hosts"), []byte(names), 0o644),
		os.WriteFile(token, secret.Data["token"], 0o600), os.WriteFile(ca, f.CompanyCA, 0o600)); err != nil {
		return err
	}
	for i := range f.o.Hosts {
		name := fmt.Sprintf("host-%02d", i)
		h := &host{name: name, dir: filepath.Join(f.dir, name), tally: f.tally}
		address := fmt.Sprintf("127.0.0.1:%d", rdpPort+i)
		h.argv = []string{"ip", "netns", "exec", f.net.Name, f.Tool("agent"), "run", "--broker", "https://" + brokerHost, "--token-file", token, "--ca-file", ca,
			"--host", name, "--state-dir", filepath.Join(h.dir, "state"), "--rdp-addr", address, "--rdp-cert-dir", filepath.Join(h.dir, "cert"), "--drain-seconds", "3600"}
		if err := os.MkdirAll(filepath.Join(h.dir, "cert"), 0o755); err != nil {
			return err
		}
		if err := f.net.Do(func() (err error) {
			h.listener, err = net.Listen("tcp", address)
			return err
		}); err != nil {
			return err
		}
		f.hosts = append(f.hosts, h)
		go h.serve()
		if err := h.start(f.exec); err != nil {
			return err
		}
	}
	return nil
}

// starter gives a function that starts processes which die with this one: the kernel ties them to the thread that
// started them, so that one must live as long.
func starter() func(*exec.Cmd) error {
	type job struct {
		cmd    *exec.Cmd
		result chan error
	}
	jobs := make(chan job)
	go func() {
		runtime.LockOSThread()
		for j := range jobs {
			j.result <- j.cmd.Start()
		}
	}()
	return func(cmd *exec.Cmd) error {
		j := job{cmd, make(chan error, 1)}
		jobs <- j
		return <-j.result
	}
}

// down ends what still lives and removes all that was made.
func (f *fleet) down(ctx context.Context) error {
	f.o.Say("removing the fleet")
	var all sync.WaitGroup
	for _, s := range f.release(1<<20, anyone) {
		all.Go(func() { s.end() })
	}
	all.Wait()
	var g errgroup.Group
	for _, h := range f.hosts {
		g.Go(func() error { h.close(); return nil })
	}
	g.Wait()
	errs := []error{f.removeObjects(ctx)}
	if f.provider != nil {
		f.provider.close()
	}
	if f.net != nil {
		errs = append(errs, os.RemoveAll(filepath.Join("/etc/netns", f.net.Name)), f.net.Close())
	}
	if f.dir != "" {
		errs = append(errs, os.RemoveAll(f.dir))
	}
	return errors.Join(errs...)
}

// removeObjects deletes the namespace, the operator's objects first, and waits until it is gone.
func (f *fleet) removeObjects(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, 3*time.Minute, fmt.Errorf("fleet: namespace %s is not gone after 3 minutes", Namespace))
	defer cancel()
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: Namespace}}
	if err := f.Client.Get(ctx, client.ObjectKeyFromObject(ns), ns); err != nil {
		return client.IgnoreNotFound(err)
	}
	for _, obj := range []client.Object{&rdv.Gateway{}, &rdv.SessionHost{}, &rdv.HostPool{}, &rdv.Workspace{}} {
		if err := f.Client.DeleteAllOf(ctx, obj, client.InNamespace(Namespace)); err != nil {
			return err
		}
	}
	if err := client.IgnoreNotFound(f.Client.Delete(ctx, ns)); err != nil {
		return err
	}
	return eventually(ctx, func() error {
		err := f.Client.Get(ctx, client.ObjectKeyFromObject(ns), ns)
		if err == nil {
			return fmt.Errorf("namespace %s is still there", Namespace)
		}
		return client.IgnoreNotFound(err)
	})
}
