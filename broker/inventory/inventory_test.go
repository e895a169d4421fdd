package inventory

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	cmv1 "github.com/cert-manager/cert-manager/pkg/apis/certmanager/v1"
	cmmeta "github.com/cert-manager/cert-manager/pkg/apis/meta/v1"
	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/envtest"
	ctrllog "sigs.k8s.io/controller-runtime/pkg/log"

	"rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/broker/internal/testca"
	"rendezvous.dev/rendezvous/broker/model"
	"rendezvous.dev/rendezvous/wire/config"
)

const patience = 30 * time.Second

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("never happened: %s", what)
}

// cluster is a kube-apiserver with our kinds and cert-manager's. Its parts run in one test, since it takes seconds to start.
type cluster struct {
	client.Client
	*Inventory
	line *line
}

// line is the inventory's way to the API server.
type line struct {
	mu    sync.Mutex
	conns []net.Conn
	down  bool
}

func (l *line) dial(ctx context.Context, network, address string) (net.Conn, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, network, address)
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil {
		return nil, err
	}
	if l.down {
		conn.Close()
		return nil, errors.New("the line is down")
	}
	l.conns = append(l.conns, conn)
	return conn, nil
}

func (l *line) cut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.down = true
	for _, c := range l.conns {
		c.Close()
	}
}

func start(t *testing.T) *cluster {
	t.Helper()
	if os.Getenv("KUBEBUILDER_ASSETS") == "" {
		if os.Getenv("RDV_REQUIRE_ENVTEST") != "" {
			t.Fatal("KUBEBUILDER_ASSETS is not set: make unit sets it")
		}
		t.Skip("KUBEBUILDER_ASSETS is not set: make unit sets it")
	}
	ctrllog.SetLogger(logr.Discard())
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/cert-manager/cert-manager").Output()
	if err != nil {
		t.Fatal(err)
	}
	env := &envtest.Environment{ErrorIfCRDPathMissing: true, CRDDirectoryPaths: []string{
		filepath.Join("..", "..", "config", "crd", "bases"), filepath.Join(strings.TrimSpace(string(out)), "deploy", "crds"),
	}}
	cfg, err := env.Start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { env.Stop() })
	scheme, err := Scheme()
	if err != nil {
		t.Fatal(err)
	}
	corev1.AddToScheme(scheme)
	direct, err := client.New(cfg, client.Options{Scheme: scheme})
	if err != nil {
		t.Fatal(err)
	}
	if err := direct.Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "ns"}}); err != nil {
		t.Fatal(err)
	}
	l := &line{}
	cfg.Dial = l.dial
	inv, err := New(cfg, "ns", "ws", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	inv.pollEvery, inv.pollMost = 20*time.Millisecond, patience
	return &cluster{Client: direct, Inventory: inv, line: l}
}

func (c *cluster) create(t *testing.T, objs ...client.Object) {
	t.Helper()
	for _, o := range objs {
		if err := c.Create(t.Context(), o); err != nil {
			t.Fatal(err)
		}
	}
}

func (c *cluster) sessionHost(t *testing.T, name string) *v1alpha1.SessionHost {
	t.Helper()
	var h v1alpha1.SessionHost
	if err := c.Get(t.Context(), client.ObjectKey{Namespace: "ns", Name: name}, &h); err != nil {
		t.Fatal(err)
	}
	return &h
}

func TestAgainstAPIServer(t *testing.T) {
	c := start(t)
	told := make(chan struct{}, 100)
	c.OnChange(func() {
		select {
		case told <- struct{}{}:
		default:
		}
	})
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	if c.Snapshot().Workspace != nil {
		t.Fatal("a Workspace out of nothing")
	}
	eventually(t, "the caches are filled", c.Synced)
	eventually(t, "the API server is heard", func() bool { heard, err := c.Heard(); return err == nil && !heard.IsZero() })

	ws := testWorkspace()
	ws.Spec.Signing.IssuerRef.Name, ws.Spec.Certificates.IssuerRef.Name = "ca", "ca"
	pool, other := testPool("pool", "ws"), testPool("other", "else")
	host := testHost("h1", "pool")
	gw := &v1alpha1.Gateway{ObjectMeta: meta("gw"), Spec: v1alpha1.GatewaySpec{Hostname: "gw.example.com"}}
	gw.Spec.Certificates.IssuerRef.Name = "ca"
	elsewhere := testWorkspace()
	elsewhere.Name = "else"
	elsewhere.Spec.Signing.IssuerRef.Name, elsewhere.Spec.Certificates.IssuerRef.Name = "ca", "ca"
	c.create(t, ws, elsewhere, &pool, &other, &host, gw)

	t.Run("the snapshot follows", func(t *testing.T) {
		eventually(t, "everything is there", func() bool {
			s := c.Snapshot()
			return s.Workspace != nil && s.Workspace.Name == "ws" && len(s.Pools) == 1 && s.Hosts["h1"] != nil && len(s.Gateways) == 1
		})
		before := c.Snapshot()
		host.Spec.Drain = &v1alpha1.Drain{Mode: v1alpha1.DrainNoNewSessions, Reason: "why"}
		if err := c.Update(t.Context(), &host); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the drain is there", func() bool { d := c.Snapshot().Hosts["h1"].Drain; return d != nil && d.Reason == "why" })
		if before.Hosts["h1"].Drain != nil {
			t.Error("an older snapshot changed")
		}
		select {
		case <-told:
		default:
			t.Error("nobody was told")
		}
	})

	t.Run("enrolment creates a host once", func(t *testing.T) {
		p, hash := c.Snapshot().Pools["pool"], strings.Repeat("ab", 32)
		count := func(hash string, most, want int) {
			t.Helper()
			if n, err := c.CountHosts(t.Context(), hash, most); err != nil || n != want {
				t.Errorf("counted %d %v, want %d", n, err, want)
			}
		}
		count(hash, 10, 0)
		if err := c.CreateHost(t.Context(), p, "new", hash); err != nil {
			t.Fatal(err)
		}
		if err := c.CreateHost(t.Context(), p, "new", hash); !errors.Is(err, model.ErrExists) {
			t.Errorf("twice: %v", err)
		}
		count(hash, 10, 1)
		count(strings.Repeat("cd", 32), 10, 0)
		if h, _, err := c.GetHost(t.Context(), "new"); err != nil || !h.MadeByToken {
			t.Errorf("%+v %v", h, err)
		}
		if h, _, err := c.GetHost(t.Context(), "h1"); err != nil || h.MadeByToken {
			t.Errorf("one that was declared: %+v %v", h, err)
		}
		h := c.sessionHost(t, "new")
		if len(h.OwnerReferences) != 1 || h.OwnerReferences[0].UID != pool.UID || h.OwnerReferences[0].Controller != nil ||
			h.Labels[v1alpha1.LabelHostPool] != "pool" || h.Spec.HostPoolRef.Name != "pool" {
			t.Errorf("%+v", h)
		}
	})

	t.Run("an enrolment is marked once", func(t *testing.T) {
		_, version, err := c.GetHost(t.Context(), "h1")
		if err != nil {
			t.Fatal(err)
		}
		if err := c.MarkEnrolled(t.Context(), "h1", version, model.Enrolment{TokenHash: "hash", Serial: "ab12", At: time.Now()}); err != nil {
			t.Fatal(err)
		}
		if err := c.MarkEnrolled(t.Context(), "h1", version, model.Enrolment{TokenHash: "other", Serial: "ab12", At: time.Now()}); !errors.Is(err, model.ErrConflict) {
			t.Errorf("the loser of a race: %v", err)
		}
		if h, _, err := c.GetHost(t.Context(), "h1"); err != nil || h.Enrolment.TokenHash != "hash" {
			t.Errorf("%+v %v", h, err)
		}
		if err := c.MarkEnrolled(t.Context(), "none", "", model.Enrolment{TokenHash: "hash", Serial: "ab12", At: time.Now()}); !errors.Is(err, model.ErrNotFound) {
			t.Errorf("a host that isn't there: %v", err)
		}
		if e := c.sessionHost(t, "h1").Status.Enrolment; e.CertificateSerial != "ab12" {
			t.Errorf("%+v", e)
		}
		whole := model.Enrolment{
			TokenHash: "hash", Serial: "ab12", At: time.Unix(1000, 0), HostUID: "uid", Key: "k", NextKey: "n", Renewed: time.Unix(2000, 0), RevokedFor: "why",
		}
		_, version, _ = c.GetHost(t.Context(), "h1")
		if err := c.MarkEnrolled(t.Context(), "h1", version, whole); err != nil {
			t.Fatal(err)
		}
		h, version, err := c.GetHost(t.Context(), "h1")
		if err != nil || h.Enrolment != whole || h.UID != string(c.sessionHost(t, "h1").UID) {
			t.Errorf("%+v %v, want %+v", h, err, whole)
		}
		whole.Key, whole.NextKey, whole.Renewed = "", "", time.Time{} // what is left out goes
		if err := c.MarkEnrolled(t.Context(), "h1", version, whole); err != nil {
			t.Fatal(err)
		}
		if h, _, err := c.GetHost(t.Context(), "h1"); err != nil || h.Enrolment != whole {
			t.Errorf("%+v %v, want %+v", h, err, whole)
		}
	})

	t.Run("writers of a status don't undo each other", func(t *testing.T) {
		h := c.sessionHost(t, "h1")
		h.Status.Conditions = []metav1.Condition{{Type: "Ready", Status: "True", Reason: "Ready", LastTransitionTime: metav1.Now()}}
		if err := c.Status().Update(t.Context(), h); err != nil {
			t.Fatal(err)
		}
		expires := time.Now().Add(time.Hour).Truncate(time.Second)
		for _, s := range []model.AgentStatus{
			{Connected: true, LastHeartbeat: time.Now(), Version: "v1", OS: "linux", RDPReady: true, Sessions: 3, DrainAcknowledged: true, CertificateExpires: expires, CertificateFingerprint: "ff"},
			{Version: strings.Repeat("é", 200), Message: strings.Repeat("x", 2000)},
		} {
			if err := c.WriteAgent(t.Context(), "h1", s); err != nil {
				t.Fatal(err)
			}
			h := c.sessionHost(t, "h1")
			if h.Status.Agent.Connected != s.Connected || h.Status.Agent.Sessions != s.Sessions || h.Status.Enrolment == nil || len(h.Status.Conditions) != 1 {
				t.Errorf("%+v", h.Status)
			}
		}
		version := c.sessionHost(t, "h1").ResourceVersion
		if err := c.WriteAgent(t.Context(), "h1", model.AgentStatus{Version: strings.Repeat("é", 200), Message: strings.Repeat("x", 2000)}); err != nil {
			t.Fatal(err)
		}
		if c.sessionHost(t, "h1").ResourceVersion != version {
			t.Error("writing the same again changed the object")
		}
		_, v, _ := c.GetHost(t.Context(), "h1")
		if err := c.MarkEnrolled(t.Context(), "h1", v, model.Enrolment{TokenHash: "again", Serial: "ab12", At: time.Now()}); err != nil {
			t.Fatal(err)
		}
		if c.sessionHost(t, "h1").Status.Agent == nil {
			t.Error("an enrolment removed the agent's state")
		}
		if err := c.WriteAgent(t.Context(), "none", model.AgentStatus{}); !errors.Is(err, model.ErrNotFound) {
			t.Errorf("a host that isn't there: %v", err)
		}
	})

	t.Run("a host that the operator has not seen is given to nobody", func(t *testing.T) {
		if _, err := c.Assign(t.Context(), "new", "a"); err == nil {
			t.Error("it may be somebody's from before")
		}
	})

	t.Run("a host is given away once", func(t *testing.T) {
		seen := c.sessionHost(t, "new")
		seen.Finalizers = []string{v1alpha1.Finalizer}
		if err := c.Update(t.Context(), seen); err != nil {
			t.Fatal(err)
		}
		defer func() {
			seen := c.sessionHost(t, "new")
			seen.Finalizers = nil
			if err := c.Update(t.Context(), seen); err != nil {
				t.Error(err)
			}
		}()
		var wg sync.WaitGroup
		owners := make([]string, 8)
		for n := range owners {
			wg.Go(func() {
				var err error
				if owners[n], err = c.Assign(t.Context(), "new", string(rune('a'+n))); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		for _, o := range owners {
			if o == "" || o != c.sessionHost(t, "new").Spec.AssignedUser {
				t.Errorf("owners %q, the object says %q", owners, c.sessionHost(t, "new").Spec.AssignedUser)
			}
		}
	})

	t.Run("gateway sessions", func(t *testing.T) {
		other := &Inventory{namespace: c.namespace, workspace: "other", log: c.log, client: c.client}
		for _, step := range []struct {
			by       *Inventory
			sessions int32
			mine     []model.GatewayInstance
			want     []v1alpha1.GatewayInstance
		}{
			{c.Inventory, 5, []model.GatewayInstance{{Name: "10-0-0-1", Workspace: "ws", Sessions: 5}}, []v1alpha1.GatewayInstance{{Name: "10-0-0-1", Workspace: "ws", Sessions: 5}}},
			{other, 7, []model.GatewayInstance{{Name: "10-0-0-1", Workspace: "other", Sessions: 2, Draining: true}}, []v1alpha1.GatewayInstance{
				{Name: "10-0-0-1", Workspace: "ws", Sessions: 5}, {Name: "10-0-0-1", Workspace: "other", Sessions: 2, Draining: true}}},
			{c.Inventory, 2, nil, []v1alpha1.GatewayInstance{{Name: "10-0-0-1", Workspace: "other", Sessions: 2, Draining: true}}},
		} {
			if err := step.by.WriteGateway(t.Context(), "gw", step.sessions, step.mine); err != nil {
				t.Fatal(err)
			}
			var g v1alpha1.Gateway
			if err := c.Get(t.Context(), client.ObjectKeyFromObject(gw), &g); err != nil || g.Status.Sessions != step.sessions || !slices.Equal(g.Status.Instances, step.want) {
				t.Errorf("%d %+v %v, want %d %+v", g.Status.Sessions, g.Status.Instances, err, step.sessions, step.want)
			}
		}
	})

	t.Run("certificates", func(t *testing.T) { c.testSign(t) })

	t.Run("the last snapshot serves while the API server is away", func(t *testing.T) {
		c.line.cut()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		if _, err := c.Assign(ctx, "h1", "alice"); err == nil || errors.Is(err, model.ErrNotFound) {
			t.Errorf("assigned without an API server: %v", err)
		}
		if s := c.Snapshot(); s.Workspace == nil || s.Hosts["h1"] == nil || !c.Synced() {
			t.Errorf("%+v", s)
		}
		eventually(t, "it is missed", func() bool { _, err := c.Heard(); return err != nil })
		if heard, _ := c.Heard(); heard.IsZero() {
			t.Error("it was heard before, and that is forgotten")
		}
	})
}

// testSign plays cert-manager's part.
func (c *cluster) testSign(t *testing.T) {
	ca := testca.New(t, "ca")
	_, key := ca.Issue(testca.Spec{})
	csr := testca.CSR(t, key, "h1")
	for _, tc := range []struct {
		name   string
		answer func(*cmv1.CertificateRequest)
		denied bool
		says   string
	}{
		{"signed", func(r *cmv1.CertificateRequest) {
			r.Status.Certificate, r.Status.CA = ca.SignCSR(r.Spec.Request), ca.PEM
			r.Status.Conditions = []cmv1.CertificateRequestCondition{{Type: cmv1.CertificateRequestConditionReady, Status: cmmeta.ConditionTrue, Reason: cmv1.CertificateRequestReasonIssued}}
		}, false, ""},
		{"denied", func(r *cmv1.CertificateRequest) {
			r.Status.Conditions = []cmv1.CertificateRequestCondition{
				{Type: cmv1.CertificateRequestConditionDenied, Status: cmmeta.ConditionTrue, Reason: "Policy", Message: "not allowed here"},
				{Type: cmv1.CertificateRequestConditionReady, Status: cmmeta.ConditionFalse, Reason: cmv1.CertificateRequestReasonDenied},
			}
		}, true, "not allowed here"},
		{"failed", func(r *cmv1.CertificateRequest) {
			r.Status.Conditions = []cmv1.CertificateRequestCondition{{Type: cmv1.CertificateRequestConditionReady, Status: cmmeta.ConditionFalse, Reason: cmv1.CertificateRequestReasonFailed, Message: "no quota"}}
		}, true, "no quota"},
		{"no answer", func(r *cmv1.CertificateRequest) {
			r.Status.Conditions = []cmv1.CertificateRequestCondition{{Type: cmv1.CertificateRequestConditionReady, Status: cmmeta.ConditionFalse, Reason: cmv1.CertificateRequestReasonPending, Message: "waiting for the issuer"}}
		}, false, "waiting for the issuer"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			played := make(chan struct{})
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			go func() {
				defer close(played)
				eventually(t, "a request appears", func() bool {
					var list cmv1.CertificateRequestList
					if c.List(t.Context(), &list, client.InNamespace("ns")) != nil || len(list.Items) == 0 {
						return false
					}
					r := &list.Items[0]
					if r.Labels[v1alpha1.LabelSessionHost] != "h1" || r.Spec.IssuerRef.Name != "issuer" || r.Spec.Duration.Duration != time.Hour || len(r.Spec.Usages) != 2 {
						t.Errorf("request %+v", r.Spec)
					}
					tc.answer(r)
					return c.Status().Update(t.Context(), r) == nil
				})
				if tc.name == "no answer" {
					time.AfterFunc(500*time.Millisecond, cancel)
				}
			}()
			chain, caPEM, err := c.Sign(ctx, model.CertificateRequest{
				Host: "h1", CSR: csr, Issuer: config.Issuer{Name: "issuer", Kind: "Issuer", Group: "cert-manager.io"}, Duration: time.Hour, Client: true,
			})
			<-played
			if (err == nil) != (tc.says == "") || err != nil && !strings.Contains(err.Error(), tc.says) || errors.Is(err, model.ErrDenied) != tc.denied {
				t.Errorf("got %v", err)
			}
			if err == nil && (len(chain) == 0 || len(caPEM) == 0) {
				t.Error("no certificate")
			}
			var list cmv1.CertificateRequestList
			if err := c.List(t.Context(), &list, client.InNamespace("ns")); err != nil || len(list.Items) != 0 {
				t.Errorf("%d requests were left behind (%v)", len(list.Items), err)
			}
		})
	}
}
