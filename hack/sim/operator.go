package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"text/tabwriter"
	"time"

	certmanager "github.com/cert-manager/cert-manager/pkg/apis/certmanager/v1"
	cmmeta "github.com/cert-manager/cert-manager/pkg/apis/meta/v1"
	"github.com/go-logr/logr"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	apiruntime "k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	ctrlconfig "sigs.k8s.io/controller-runtime/pkg/config"
	"sigs.k8s.io/controller-runtime/pkg/envtest"
	"sigs.k8s.io/controller-runtime/pkg/metrics"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/controllers"
	"rendezvous.dev/rendezvous/controllers/render"
)

// operatorCommand is this program as an operator under measurement: a process of its own, for its memory's sake.
const operatorCommand = "operator-process"

// operatorOptions of one run.
type operatorOptions struct {
	Hosts, Pools int
	// Quiet is how long writes are counted once nothing is left to do; every object is looked at again in that time.
	Quiet    time.Duration
	Patience time.Duration
	// Plot is a file for the curve of hosts that take sessions; none where empty.
	Plot string
}

// runOperator starts a kube-apiserver, the operator on it, and what stands for cert-manager and for agents with their
// brokers; it makes pools and measures.
func runOperator(ctx context.Context, o operatorOptions, out io.Writer) error {
	assets := os.Getenv("KUBEBUILDER_ASSETS")
	if assets == "" {
		assets = filepath.Join("..", "..", "bin", "envtest")
	}
	crds, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", "github.com/cert-manager/cert-manager").Output()
	if err != nil {
		return fmt.Errorf("find cert-manager's module: %w", err)
	}
	ctrl.SetLogger(logr.Discard())
	env := &envtest.Environment{
		BinaryAssetsDirectory: assets, ErrorIfCRDPathMissing: true,
		CRDDirectoryPaths: []string{filepath.Join("..", "..", "config", "crd", "bases"), filepath.Join(strings.TrimSpace(string(crds)), "deploy", "crds")},
	}
	config, err := env.Start()
	if err != nil {
		return fmt.Errorf("start a kube-apiserver (make unit puts it into bin/envtest): %w", err)
	}
	defer env.Stop()
	config.QPS = -1
	api, err := client.NewWithWatch(config, client.Options{Scheme: controllers.NewScheme()})
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(ctx)
	world := &cloud{api: api}
	defer func() { stop(); world.work.Wait() }()
	if err := world.start(ctx); err != nil {
		return err
	}
	operator, err := startOperator(ctx, config, o)
	if err != nil {
		return err
	}
	defer operator.kill()

	t := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	defer t.Flush()
	var facts []string
	row := func(what, format string, args ...any) {
		value := fmt.Sprintf(format, args...)
		facts = append(facts, what+": "+value)
		fmt.Fprintf(t, "%s\t%s\n", what, value)
		t.Flush()
	}
	empty, err := operator.stats()
	if err != nil {
		return err
	}
	row("session hosts, pools", "%d pods, %d", o.Hosts, o.Pools)
	begin := time.Now()
	if err := world.declare(ctx, o); err != nil {
		return err
	}
	came, err := world.ready(ctx, o, begin)
	if err != nil {
		return err
	}
	took := time.Since(begin)
	full, err := operator.settled(ctx, o.Patience)
	if err != nil {
		return err
	}
	row("from nothing until all take sessions", "%s (%.0f hosts/s)", took.Round(100*time.Millisecond), float64(o.Hosts)/took.Seconds())
	row("writes of the operator meanwhile", "%d, %.1f per host", full.Writes, float64(full.Writes)/float64(o.Hosts))
	row("reads past its caches meanwhile", "%d, %.1f per host", full.Reads, float64(full.Reads)/float64(o.Hosts))
	row("memory of the operator", "%.0f MiB resident, %.1f KiB of heap per host (%.0f MiB resident without any)",
		float64(full.Resident)/(1<<20), float64(full.Heap-empty.Heap)/float64(o.Hosts)/1024, float64(empty.Resident)/(1<<20))

	quiet, beats := time.Now(), world.beats.Load()
	time.Sleep(o.Quiet)
	after, err := operator.stats()
	if err != nil {
		return err
	}
	if err := world.failed.Load(); err != nil {
		return *err
	}
	beats = world.beats.Load() - beats
	row(fmt.Sprintf("in the next %s: looks at an object", o.Quiet), "%d, with %d heartbeats noted by brokers", after.Reconciles-full.Reconciles, beats)
	row("writes of the operator in that time", "%d", after.Writes-full.Writes)
	row("CPU of the operator in that time", "%.1f%% of one core", 100*(after.CPU-full.CPU).Seconds()/time.Since(quiet).Seconds())
	if o.Plot != "" {
		picture := plot(facts[0]+", by whether they take sessions", o.Hosts, 0, []curve{{facts[1], "#1f5fbf", came}}, facts[2:])
		if err := os.WriteFile(o.Plot, picture, 0o644); err != nil {
			return err
		}
	}
	if n := after.Writes - full.Writes; n > 0 {
		return fmt.Errorf("the operator wrote %d times though nothing was to be done:\n%s", n, strings.Join(after.Last, "\n"))
	}
	return nil
}

// Names in the run's own API server.
const (
	simNamespace = "sim"
	simIssuer    = "sim"
)

func simPool(i int) string { return fmt.Sprintf("pool%02d", i) }

// cloud stands for all that is not the operator: cert-manager, and agents with their brokers.
type cloud struct {
	api  client.WithWatch
	work sync.WaitGroup
	// failed is the first error of a stand-in.
	failed atomic.Pointer[error]
	beats  atomic.Int64 // heartbeats noted
	// enrolled are the UIDs of pods whose agents have come.
	enrolled sync.Map
}

// beatEvery is how often brokers note a heartbeat of a host of which nothing else changes.
const beatEvery = 5 * time.Minute

func (c *cloud) fail(err error) { c.failed.CompareAndSwap(nil, &err) }

// start makes the namespace and an issuer, and has the stand-ins work until ctx ends.
func (c *cloud) start(ctx context.Context) error {
	issuer := &certmanager.ClusterIssuer{
		ObjectMeta: metav1.ObjectMeta{Name: simIssuer},
		Spec:       certmanager.IssuerSpec{IssuerConfig: certmanager.IssuerConfig{SelfSigned: &certmanager.SelfSignedIssuer{}}},
	}
	for _, obj := range []client.Object{&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: simNamespace}}, issuer} {
		if err := c.api.Create(ctx, obj); err != nil {
			return err
		}
	}
	issuer.Status.Conditions = []certmanager.IssuerCondition{{Type: certmanager.IssuerConditionReady, Status: cmmeta.ConditionTrue}}
	if err := c.api.Status().Update(ctx, issuer); err != nil {
		return err
	}
	watch := func(list client.ObjectList, workers int, each func(context.Context, client.Object) error) error {
		w, err := c.api.Watch(ctx, list, client.InNamespace(simNamespace))
		if err != nil {
			return err
		}
		for range workers {
			c.work.Go(func() {
				for event := range w.ResultChan() {
					obj, ok := event.Object.(client.Object)
					if !ok || event.Type != "ADDED" && event.Type != "MODIFIED" {
						continue
					}
					if err := each(ctx, obj); err != nil && ctx.Err() == nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
						c.fail(err)
					}
				}
			})
		}
		c.work.Go(func() { <-ctx.Done(); w.Stop() })
		return nil
	}
	return errors.Join(
		watch(&certmanager.CertificateList{}, 1, c.issue),
		watch(&appsv1.DeploymentList{}, 1, c.run),
		// Agents come with their pods, but their statuses are the hosts'.
		watch(&corev1.PodList{}, 4, func(ctx context.Context, pod client.Object) error {
			if pod.GetLabels()[rdv.LabelSessionHost] == "" || !pod.GetDeletionTimestamp().IsZero() {
				return nil
			}
			if _, twice := c.enrolled.LoadOrStore(pod.GetUID(), true); twice {
				return nil
			}
			return c.enrol(ctx, pod.GetName())
		}),
	)
}

// issue is cert-manager.
func (c *cloud) issue(ctx context.Context, obj client.Object) error {
	cert := obj.(*certmanager.Certificate)
	if cert.Status.NotAfter != nil {
		return nil
	}
	secret := &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: cert.Namespace, Name: cert.Spec.SecretName, Labels: cert.Spec.SecretTemplate.Labels,
			Annotations: map[string]string{certmanager.CertificateNameKey: cert.Name},
		},
		Data: map[string][]byte{"ca.crt": []byte("CA"), corev1.TLSCertKey: []byte("x"), corev1.TLSPrivateKeyKey: []byte("x")},
		Type: corev1.SecretTypeTLS,
	}
	if err := c.api.Create(ctx, secret); err != nil && !apierrors.IsAlreadyExists(err) {
		return err
	}
	cert.Status.NotAfter = &metav1.Time{Time: time.Now().Add(1000 * time.Hour)}
	cert.Status.Conditions = []certmanager.CertificateCondition{{Type: certmanager.CertificateConditionReady, Status: cmmeta.ConditionTrue, ObservedGeneration: cert.Generation}}
	return c.api.Status().Update(ctx, cert)
}

// run is the Deployment controller and the kubelet.
func (c *cloud) run(ctx context.Context, obj client.Object) error {
	d := obj.(*appsv1.Deployment)
	if d.Status.ObservedGeneration == d.Generation {
		return nil
	}
	n := *d.Spec.Replicas
	d.Status = appsv1.DeploymentStatus{ObservedGeneration: d.Generation, Replicas: n, ReadyReplicas: n, AvailableReplicas: n}
	return c.api.Status().Update(ctx, d)
}

// enrol is a host's agent and its broker, as far as the host's status shows them: from then on until ctx ends.
func (c *cloud) enrol(ctx context.Context, host string) error {
	err := c.apply(ctx, host, "rendezvous-broker", map[string]any{"enrolment": map[string]any{"time": "2026-05-04T12:00:00Z", "tokenHash": "x"}})
	if err := errors.Join(err, c.report(ctx, host)); err != nil {
		return err
	}
	c.work.Go(func() {
		// The first comes at any time, so that a short run sees some, too.
		for wait := rand.N(beatEvery); ; wait = beatEvery {
			select {
			case <-ctx.Done():
				return
			case <-time.After(wait):
			}
			if err := c.report(ctx, host); err != nil && ctx.Err() == nil {
				c.fail(err)
				return
			}
			c.beats.Add(1)
		}
	})
	return nil
}

func (c *cloud) report(ctx context.Context, host string) error {
	return c.apply(ctx, host, "rendezvous-broker-agent", map[string]any{"agent": map[string]any{
		"connected": true, "rdpReady": true, "version": "sim", "os": "Debian", "lastHeartbeat": time.Now().UTC().Format(time.RFC3339),
	}})
}

func (c *cloud) apply(ctx context.Context, host, manager string, status map[string]any) error {
	u := &unstructured.Unstructured{Object: map[string]any{"status": status}}
	u.SetGroupVersionKind(rdv.GroupVersion.WithKind("SessionHost"))
	u.SetNamespace(simNamespace)
	u.SetName(host)
	return c.api.Status().Apply(ctx, client.ApplyConfigurationFromUnstructured(u), client.FieldOwner(manager), client.ForceOwnership)
}

// declare is what people write: one Workspace, one Gateway, and the pools.
func (c *cloud) declare(ctx context.Context, o operatorOptions) error {
	issuer := rdv.IssuerReference{Kind: certmanager.ClusterIssuerKind, Name: simIssuer}
	ws := &rdv.Workspace{
		ObjectMeta: metav1.ObjectMeta{Namespace: simNamespace, Name: "sim"},
		Spec: rdv.WorkspaceSpec{
			Hostname:     "desk.example.test",
			Identity:     rdv.Identity{OIDC: rdv.OIDC{IssuerURL: "https://id.example.test", ClientID: "rdv"}},
			Signing:      rdv.Signing{IssuerRef: issuer},
			Certificates: rdv.WorkspaceCertificates{IssuerRef: issuer},
		},
	}
	objs := []client.Object{ws, &rdv.Gateway{
		ObjectMeta: metav1.ObjectMeta{Namespace: simNamespace, Name: "gw"},
		Spec:       rdv.GatewaySpec{Hostname: "gw.example.test", Certificates: rdv.GatewayCertificates{IssuerRef: issuer}},
	}}
	for i := range o.Pools {
		objs = append(objs, &rdv.HostPool{
			ObjectMeta: metav1.ObjectMeta{Namespace: simNamespace, Name: simPool(i)},
			Spec: rdv.HostPoolSpec{
				WorkspaceRef: rdv.LocalReference{Name: "sim"}, Type: rdv.Pooled, Replicas: new(int32(o.Hosts / o.Pools)),
				Template: &apiruntime.RawExtension{Raw: []byte(`{"spec":{"containers":[{"name":"desktop","image":"desktop:sim"}]}}`)},
			},
		})
	}
	for _, obj := range objs {
		if err := c.api.Create(ctx, obj); err != nil {
			return err
		}
	}
	return nil
}

// ready waits until the pools say that all hosts take sessions, and gives how many did when.
func (c *cloud) ready(ctx context.Context, o operatorOptions, begin time.Time) (came []point, err error) {
	for deadline := time.Now().Add(o.Patience); ; time.Sleep(500 * time.Millisecond) {
		if err := c.failed.Load(); err != nil {
			return nil, *err
		}
		var pools rdv.HostPoolList
		if err := c.api.List(ctx, &pools, client.InNamespace(simNamespace)); err != nil {
			return nil, err
		}
		ready, said := 0, ""
		for _, p := range pools.Items {
			ready += int(p.Status.ReadyHosts)
			if cond := meta.FindStatusCondition(p.Status.Conditions, rdv.ConditionReady); cond != nil {
				said = cond.Message
			}
		}
		came = append(came, point{time.Since(begin), ready})
		if ready == o.Hosts/o.Pools*o.Pools {
			return came, nil
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("%d of %d hosts take sessions after %s: %s", ready, o.Hosts, o.Patience, said)
		}
	}
}

// operatorProcess is the operator under measurement.
type operatorProcess struct {
	cmd  *exec.Cmd
	in   io.WriteCloser
	next func(any) error
}

// operatorConfig is what that process reads first.
type operatorConfig struct {
	Kubeconfig []byte
	Resync     time.Duration
}

// operatorStats is what that process says of itself.
type operatorStats struct {
	Writes, Reads, Reconciles int64
	Heap, Resident            int64 // bytes
	CPU                       time.Duration
	Last                      []string // writes
}

func startOperator(ctx context.Context, config *rest.Config, o operatorOptions) (*operatorProcess, error) {
	kubeconfig, err := clientcmd.Write(clientcmdapi.Config{
		Clusters:  map[string]*clientcmdapi.Cluster{"sim": {Server: config.Host, CertificateAuthorityData: config.CAData}},
		AuthInfos: map[string]*clientcmdapi.AuthInfo{"sim": {ClientCertificateData: config.CertData, ClientKeyData: config.KeyData}},
		Contexts:  map[string]*clientcmdapi.Context{"sim": {Cluster: "sim", AuthInfo: "sim"}}, CurrentContext: "sim",
	})
	if err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	p := &operatorProcess{cmd: exec.CommandContext(ctx, self, operatorCommand)}
	p.cmd.Stderr = os.Stderr
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	p.next = lines(stdout)
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	return p, json.NewEncoder(p.in).Encode(operatorConfig{kubeconfig, o.Quiet / 2})
}

func (p *operatorProcess) kill() {
	p.cmd.Process.Kill()
	p.cmd.Wait() // says that it was killed
}

// requests are its stats as far as they are known at once.
func (p *operatorProcess) requests() (operatorStats, error) { return p.ask("requests") }

func (p *operatorProcess) stats() (operatorStats, error) { return p.ask("all") }

func (p *operatorProcess) ask(question string) (s operatorStats, err error) {
	if _, err = fmt.Fprintln(p.in, question); err == nil {
		err = p.next(&s)
	}
	if err != nil {
		return s, fmt.Errorf("the operator's process: %w", err)
	}
	return s, nil
}

// settled waits until the operator has written nothing for five seconds, and gives its stats.
func (p *operatorProcess) settled(ctx context.Context, patience time.Duration) (operatorStats, error) {
	before, err := p.requests()
	calm := time.Now()
	for deadline := time.Now().Add(patience); err == nil && time.Since(calm) < 5*time.Second; {
		time.Sleep(250 * time.Millisecond)
		var now operatorStats
		if now, err = p.requests(); now.Writes != before.Writes {
			calm = time.Now()
		}
		before = now
		if ctx.Err() != nil || time.Now().After(deadline) {
			return before, fmt.Errorf("the operator still writes after %s:\n%s", patience, strings.Join(before.Last, "\n"))
		}
	}
	if err != nil {
		return before, err
	}
	return p.stats()
}

// counter counts what goes to the API server.
type counter struct {
	writes, reads atomic.Int64
	mu            sync.Mutex
	last          []string // writes
}

func (c *counter) count(r *http.Request) {
	switch {
	case r.Method != http.MethodGet:
		c.writes.Add(1)
		c.mu.Lock()
		defer c.mu.Unlock()
		c.last = append(c.last[max(0, len(c.last)-9):], r.Method+" "+r.URL.Path)
	case r.URL.Query().Get("watch") == "":
		c.reads.Add(1)
	}
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// runOperatorProcess is the operator as cmd/manager runs it, but for the Lease; it answers each line of in with its stats.
func runOperatorProcess(ctx context.Context, in io.Reader, out io.Writer) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	asked := bufio.NewReader(in)
	first, err := asked.ReadBytes('\n')
	if err != nil {
		return err
	}
	var o operatorConfig
	if err := json.Unmarshal(first, &o); err != nil {
		return err
	}
	config, err := clientcmd.RESTConfigFromKubeConfig(o.Kubeconfig)
	if err != nil {
		return err
	}
	config.QPS = -1 // as ctrl.GetConfig has it: the API server's own fairness decides
	requests := &counter{}
	config.Wrap(func(next http.RoundTripper) http.RoundTripper {
		return roundTripper(func(r *http.Request) (*http.Response, error) {
			requests.count(r)
			return next.RoundTrip(r)
		})
	})
	ctrl.SetLogger(logr.Discard())
	cached := controllers.CacheOptions()
	cached.SyncPeriod = &o.Resync
	mgr, err := ctrl.NewManager(config, ctrl.Options{
		Scheme: controllers.NewScheme(), Metrics: metricsserver.Options{BindAddress: "0"}, Cache: cached,
		Controller: ctrlconfig.Controller{MaxConcurrentReconciles: controllers.MaxConcurrentReconciles},
	})
	if err != nil {
		return err
	}
	discovery := controllers.NewDiscovery()
	discovery.Fetch = func(context.Context, string, string) error { return nil }
	err = controllers.Setup(mgr, controllers.Options{
		Render:    render.Options{BrokerImage: "broker:sim", GatewayImage: "gateway:sim", RelayImage: "relay:sim", AgentImage: "agent:sim"},
		Discovery: discovery,
	})
	if err != nil {
		return err
	}
	failed := make(chan error, 1)
	go func() { failed <- mgr.Start(ctx) }()
	if !mgr.GetCache().WaitForCacheSync(ctx) {
		return errors.New("the caches were not filled")
	}
	answer := json.NewEncoder(out)
	for {
		question, err := asked.ReadString('\n')
		if err != nil {
			return nil // whoever started this process is gone
		}
		select {
		case err := <-failed:
			return fmt.Errorf("the manager ended: %w", err)
		default:
		}
		s := operatorStats{Writes: requests.writes.Load(), Reads: requests.reads.Load()}
		requests.mu.Lock()
		s.Last = slices.Clone(requests.last)
		requests.mu.Unlock()
		if strings.TrimSpace(question) == "all" {
			if err := s.measure(); err != nil {
				return err
			}
		}
		if err := answer.Encode(s); err != nil {
			return err
		}
	}
}

// measure fills in what takes a while to find out.
func (s *operatorStats) measure() error {
	s.Resident = resident()
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	s.Heap = int64(m.HeapInuse)
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		return err
	}
	s.CPU = time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
	families, err := metrics.Registry.Gather()
	if err != nil {
		return err
	}
	for _, f := range families {
		if f.GetName() == "controller_runtime_reconcile_total" {
			for _, m := range f.GetMetric() {
				s.Reconciles += int64(m.GetCounter().GetValue())
			}
		}
	}
	return nil
}
