package controllers

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	certmanager "github.com/cert-manager/cert-manager/pkg/apis/certmanager/v1"
	cmmeta "github.com/cert-manager/cert-manager/pkg/apis/meta/v1"
	"github.com/go-logr/logr"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	ctrlconfig "sigs.k8s.io/controller-runtime/pkg/config"
	"sigs.k8s.io/controller-runtime/pkg/envtest"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"
	"sigs.k8s.io/yaml"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/controllers/render"
)

// world is a kube-apiserver with the operator on it. Neither cert-manager nor the kubelet is there: the tests take their
// part.
type world struct {
	client.Client
	config *rest.Config // an administrator's
	clock  *clock
	oidc   *providers
}

// shared is started by the first test that needs it, and stopped by TestMain.
var shared struct {
	once  sync.Once
	world *world
	err   error
	stop  []func()
}

func TestMain(m *testing.M) {
	code := m.Run()
	for _, stop := range shared.stop {
		stop()
	}
	os.Exit(code)
}

// start gives the shared world, and a namespace of the test's own in it.
func start(t *testing.T) (*world, string) {
	t.Helper()
	if os.Getenv("KUBEBUILDER_ASSETS") == "" {
		if os.Getenv("RDV_REQUIRE_ENVTEST") != "" {
			t.Fatal("KUBEBUILDER_ASSETS is not set: make unit sets it")
		}
		t.Skip("KUBEBUILDER_ASSETS is not set: make unit sets it")
	}
	shared.once.Do(func() { shared.world, shared.err = startWorld() })
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	w := shared.world
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "test-"}}
	if err := w.Create(t.Context(), ns); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, list := range []client.Object{&rdv.Workspace{}, &rdv.HostPool{}, &rdv.SessionHost{}, &rdv.Gateway{}} {
			if err := w.DeleteAllOf(context.Background(), list, client.InNamespace(ns.Name)); err != nil {
				t.Error(err)
			}
		}
	})
	return w, ns.Name
}

func startWorld() (*world, error) {
	crds, err := certManagerCRDs()
	if err != nil {
		return nil, err
	}
	ctrl.SetLogger(logr.Discard())
	env := &envtest.Environment{CRDDirectoryPaths: []string{filepath.Join("..", "config", "crd", "bases"), crds}, ErrorIfCRDPathMissing: true}
	config, err := env.Start()
	if err != nil {
		return nil, err
	}
	shared.stop = append(shared.stop, func() { _ = env.Stop() })
	direct, err := client.New(config, client.Options{Scheme: NewScheme()})
	if err != nil {
		return nil, err
	}
	operator, err := operatorAccount(env, direct)
	if err != nil {
		return nil, err
	}
	mgr, err := ctrl.NewManager(operator, ctrl.Options{
		Scheme: NewScheme(), Metrics: metricsserver.Options{BindAddress: "0"}, Cache: CacheOptions(),
		Controller: ctrlconfig.Controller{MaxConcurrentReconciles: MaxConcurrentReconciles},
	})
	if err != nil {
		return nil, err
	}
	w := &world{Client: direct, config: config, clock: &clock{}, oidc: &providers{answers: map[string]error{}}}
	discovery := NewDiscovery()
	discovery.Fetch, discovery.Now = w.oidc.fetch, w.clock.now
	err = Setup(mgr, Options{
		Render:    render.Options{BrokerImage: "broker:test", GatewayImage: "gateway:test", RelayImage: "relay:test", AgentImage: "agent:test"},
		Discovery: discovery,
		Now:       w.clock.now,
	})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- mgr.Start(ctx) }()
	shared.stop = append([]func(){func() { cancel(); <-done }}, shared.stop...)
	if !mgr.GetCache().WaitForCacheSync(ctx) {
		return nil, errors.New("the caches were not filled")
	}
	return w, nil
}

// operatorAccount is the operator's service account, with the rights of config/rbac and no others.
func operatorAccount(env *envtest.Environment, admin client.Client) (*rest.Config, error) {
	for file, obj := range map[string]client.Object{"role.yaml": &rbacv1.ClusterRole{}, "role_binding.yaml": &rbacv1.ClusterRoleBinding{}} {
		text, err := os.ReadFile(filepath.Join("..", "config", "rbac", file))
		if err != nil {
			return nil, err
		}
		if err := yaml.UnmarshalStrict(text, obj); err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		if err := admin.Create(context.Background(), obj); err != nil {
			return nil, err
		}
	}
	user, err := env.AddUser(envtest.User{Name: "system:serviceaccount:rendezvous-system:rendezvous-manager"}, nil)
	if err != nil {
		return nil, err
	}
	return user.Config(), nil
}

// certManagerCRDs finds cert-manager's CRDs in its Go module.
func certManagerCRDs() (string, error) {
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/cert-manager/cert-manager").Output()
	if err != nil {
		return "", fmt.Errorf("find cert-manager's module: %w", err)
	}
	return filepath.Join(strings.TrimSpace(string(out)), "deploy", "crds"), nil
}

// clock is the operator's clock: the real one, put forward.
type clock struct {
	mu      sync.Mutex
	forward time.Duration
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return time.Now().Add(c.forward)
}

func (c *clock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.forward += d
}

// providers are the identity providers: each answers, unless an error is set.
type providers struct {
	mu      sync.Mutex
	answers map[string]error
}

func (p *providers) fetch(_ context.Context, issuer, _ string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.answers[issuer]
}

func (p *providers) answer(issuer string, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.answers[issuer] = err
}

// eventually waits until check is content.
func eventually(t *testing.T, check func() error) {
	t.Helper()
	var err error
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		if err = check(); err == nil {
			return
		}
	}
	t.Fatalf("it never came about: %v", err)
}

func (w *world) create(t *testing.T, objs ...client.Object) {
	t.Helper()
	for _, obj := range objs {
		if err := w.Create(t.Context(), obj); err != nil {
			t.Fatal(err)
		}
	}
}

// read gets an object by name, and fails the test without it.
func read[T client.Object](t *testing.T, w *world, ns, name string, into T) T {
	t.Helper()
	if err := w.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: name}, into); err != nil {
		t.Fatal(err)
	}
	return into
}

// appears waits for an object.
func appears[T client.Object](t *testing.T, w *world, ns, name string, into T) T {
	t.Helper()
	eventually(t, func() error { return w.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: name}, into) })
	return into
}

// vanishes waits until an object is gone.
func (w *world) vanishes(t *testing.T, obj client.Object, ns, name string) {
	t.Helper()
	eventually(t, func() error {
		err := w.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: name}, obj)
		if apierrors.IsNotFound(err) {
			return nil
		}
		return fmt.Errorf("%T %s is still there (%v)", obj, name, err)
	})
}

// patch merges JSON into an object.
func (w *world) patch(t *testing.T, obj client.Object, ns, name, patch string) {
	t.Helper()
	obj.SetNamespace(ns)
	obj.SetName(name)
	if err := w.Patch(t.Context(), obj, client.RawPatch("application/merge-patch+json", []byte(patch))); err != nil {
		t.Fatal(err)
	}
}

// patchStatus merges JSON into an object's status, as its brokers or its controllers would.
func (w *world) patchStatus(t *testing.T, obj client.Object, ns, name, patch string) {
	t.Helper()
	obj.SetNamespace(ns)
	obj.SetName(name)
	err := w.Status().Patch(t.Context(), obj, client.RawPatch("application/merge-patch+json", []byte(patch)), client.FieldOwner("rendezvous-broker"))
	if err != nil {
		t.Fatal(err)
	}
}

// event waits for an event about the object of that name.
func (w *world) event(t *testing.T, ns, name, reason, words string) {
	t.Helper()
	eventually(t, func() error {
		list := &eventsv1.EventList{}
		if err := w.List(t.Context(), list, client.InNamespace(ns)); err != nil {
			return err
		}
		for _, e := range list.Items {
			if e.Regarding.Name == name && e.Reason == reason && strings.Contains(e.Note, words) {
				return nil
			}
		}
		return fmt.Errorf("no event %s about %s with %q", reason, name, words)
	})
}

// poke has the operator look at an object again.
func (w *world) poke(t *testing.T, obj client.Object, ns, name string) {
	t.Helper()
	w.patch(t, obj, ns, name, fmt.Sprintf(`{"metadata":{"annotations":{"test/poke":"%d"}}}`, time.Now().UnixNano()))
}

// conditions of any of the four kinds.
func (w *world) conditions(t *testing.T, obj client.Object, ns, name string) ([]metav1.Condition, error) {
	if err := w.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: name}, obj); err != nil {
		return nil, err
	}
	switch o := obj.(type) {
	case *rdv.Workspace:
		return o.Status.Conditions, nil
	case *rdv.HostPool:
		return o.Status.Conditions, nil
	case *rdv.SessionHost:
		return o.Status.Conditions, nil
	case *rdv.Gateway:
		return o.Status.Conditions, nil
	}
	return nil, fmt.Errorf("%T has no conditions", obj)
}

// is waits until a condition has this status, this reason, and a message that holds these words, for the spec as it is.
func (w *world) is(t *testing.T, obj client.Object, ns, name, condition string, status metav1.ConditionStatus, reason, words string) {
	t.Helper()
	eventually(t, func() error { return w.isNow(t, obj, ns, name, condition, status, reason, words) })
}

// isNow is an error unless the condition is as wanted, and about the spec of now.
func (w *world) isNow(t *testing.T, obj client.Object, ns, name, condition string, status metav1.ConditionStatus, reason, words string) error {
	t.Helper()
	all, err := w.conditions(t, obj, ns, name)
	if err != nil {
		return err
	}
	c := meta.FindStatusCondition(all, condition)
	if c == nil || c.Status != status || c.Reason != reason || !strings.Contains(c.Message, words) || c.ObservedGeneration != obj.GetGeneration() {
		return fmt.Errorf("%T %s: %s is %+v, want %s %s %q", obj, name, condition, c, status, reason, words)
	}
	return nil
}

// issuer makes a ClusterIssuer that is ready.
func (w *world) issuer(t *testing.T, name string) {
	t.Helper()
	issuer := &certmanager.ClusterIssuer{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec:       certmanager.IssuerSpec{IssuerConfig: certmanager.IssuerConfig{SelfSigned: &certmanager.SelfSignedIssuer{}}},
	}
	w.create(t, issuer)
	t.Cleanup(func() { _ = w.Delete(context.Background(), issuer) })
	w.issuerReady(t, name, cmmeta.ConditionTrue, "")
}

func (w *world) issuerReady(t *testing.T, name string, status cmmeta.ConditionStatus, message string) {
	t.Helper()
	w.patchStatus(t, &certmanager.ClusterIssuer{}, "", name,
		fmt.Sprintf(`{"status":{"conditions":[{"type":"Ready","status":%q,"message":%q}]}}`, status, message))
}

// issue takes cert-manager's part for one Certificate: its Secret, and the word that it is ready.
func (w *world) issue(t *testing.T, ns, name string) {
	t.Helper()
	cert := appears(t, w, ns, name, &certmanager.Certificate{})
	secret := &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: ns, Name: cert.Spec.SecretName,
			Labels:      maps.Clone(cert.Spec.SecretTemplate.Labels),
			Annotations: map[string]string{certmanager.CertificateNameKey: name},
		},
		Data: map[string][]byte{"ca.crt": []byte("CA of " + cert.Spec.IssuerRef.Name), corev1.TLSCertKey: []byte("x"), corev1.TLSPrivateKeyKey: []byte("x")},
		Type: corev1.SecretTypeTLS,
	}
	if err := w.Create(t.Context(), secret); err != nil && !apierrors.IsAlreadyExists(err) {
		t.Fatal(err)
	}
	w.patchStatus(t, &certmanager.Certificate{}, ns, name, fmt.Sprintf(
		`{"status":{"notAfter":"2030-01-01T00:00:00Z","conditions":[{"type":"Ready","status":"True","reason":"Ready","message":"","observedGeneration":%d}]}}`, cert.Generation))
}

// issueAll issues every Certificate of the Workspace.
func (w *world) issueAll(t *testing.T, ns, workspace string) {
	t.Helper()
	for _, name := range []string{"-internal-ca", "-tls", "-broker-identity", "-tickets", "-signing", "-operator-identity"} {
		w.issue(t, ns, workspace+name)
	}
}

// run takes the kubelet's part for a Deployment: all its pods are ready.
func (w *world) run(t *testing.T, ns, name string) {
	t.Helper()
	d := appears(t, w, ns, name, &appsv1.Deployment{})
	n := *d.Spec.Replicas
	w.patchStatus(t, d, ns, name, fmt.Sprintf(`{"status":{"observedGeneration":%d,"replicas":%d,"readyReplicas":%d,"availableReplicas":%d}}`, d.Generation, n, n, n))
}

func clusterIssuer(name string) rdv.IssuerReference {
	return rdv.IssuerReference{Kind: certmanager.ClusterIssuerKind, Name: name}
}

func newWorkspace(ns, issuer string) *rdv.Workspace {
	return &rdv.Workspace{
		ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "demo"},
		Spec: rdv.WorkspaceSpec{
			Hostname:     "desk.example.test",
			Identity:     rdv.Identity{OIDC: rdv.OIDC{IssuerURL: "https://" + ns + ".example.test", ClientID: "rdv"}},
			Signing:      rdv.Signing{IssuerRef: clusterIssuer(issuer)},
			Certificates: rdv.WorkspaceCertificates{IssuerRef: clusterIssuer(issuer)},
		},
	}
}

func newGateway(ns, issuer string) *rdv.Gateway {
	return &rdv.Gateway{
		ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "gw"},
		Spec:       rdv.GatewaySpec{Hostname: "gw.example.test", Certificates: rdv.GatewayCertificates{IssuerRef: clusterIssuer(issuer)}},
	}
}

func newPool(ns string) *rdv.HostPool {
	return &rdv.HostPool{
		ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "linux"},
		Spec:       rdv.HostPoolSpec{WorkspaceRef: rdv.LocalReference{Name: "demo"}, Type: rdv.Pooled},
	}
}

// versions are the resource versions of everything in a namespace that the operator has to do with.
func (w *world) versions(t *testing.T, ns string) map[string]string {
	t.Helper()
	out := map[string]string{}
	for _, list := range []client.ObjectList{
		&rdv.WorkspaceList{}, &rdv.HostPoolList{}, &rdv.SessionHostList{}, &rdv.GatewayList{},
		&appsv1.DeploymentList{}, &corev1.ServiceList{}, &corev1.ConfigMapList{}, &corev1.SecretList{}, &corev1.ServiceAccountList{}, &corev1.PodList{},
		&certmanager.CertificateList{}, &certmanager.IssuerList{},
	} {
		if err := w.List(t.Context(), list, client.InNamespace(ns)); err != nil {
			t.Fatal(err)
		}
		if err := meta.EachListItem(list, func(o runtime.Object) error {
			obj := o.(client.Object)
			out[fmt.Sprintf("%T/%s", obj, obj.GetName())] = obj.GetResourceVersion()
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	return out
}

// settled waits until nothing has been written for a while, and gives the versions then.
func (w *world) settled(t *testing.T, ns string) map[string]string {
	t.Helper()
	before := w.versions(t, ns)
	for calm := 0; calm < 5; {
		time.Sleep(200 * time.Millisecond)
		now := w.versions(t, ns)
		if maps.Equal(before, now) {
			calm++
			continue
		}
		before, calm = now, 0
	}
	return before
}

// changed names what differs between two versions.
func changed(before, after map[string]string) map[string]bool {
	diff := map[string]bool{}
	for name, version := range before {
		if after[name] != version {
			diff[name] = true
		}
	}
	for name := range after {
		if _, ok := before[name]; !ok {
			diff[name] = true
		}
	}
	return diff
}

// onlyChanges waits until what is wanted has changed since before, and then says what else has, apart from the object that
// was edited. It gives the versions now.
func (w *world) onlyChanges(t *testing.T, step, ns string, before map[string]string, edited string, want ...string) map[string]string {
	t.Helper()
	eventually(t, func() error {
		diff := changed(before, w.versions(t, ns))
		for _, name := range want {
			if !diff[name] {
				return fmt.Errorf("%s: %s is not changed", step, name)
			}
		}
		return nil
	})
	after := w.settled(t, ns)
	diff := changed(before, after)
	for _, name := range append(want, edited) {
		delete(diff, name)
	}
	if len(diff) > 0 {
		t.Errorf("%s: changed besides: %v", step, slices.Sorted(maps.Keys(diff)))
	}
	return after
}
