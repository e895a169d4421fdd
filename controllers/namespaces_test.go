package controllers

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	certmanager "github.com/cert-manager/cert-manager/pkg/apis/certmanager/v1"
	cmmeta "github.com/cert-manager/cert-manager/pkg/apis/meta/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	ctrlconfig "sigs.k8s.io/controller-runtime/pkg/config"
	"sigs.k8s.io/controller-runtime/pkg/envtest"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"
	"sigs.k8s.io/yaml"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/controllers/render"
)

func TestNamespaces(t *testing.T) {
	for list, want := range map[string][]string{"": nil, " , ": nil, "b, a,b": {"a", "b"}} {
		if got, err := Namespaces(list); err != nil || !slices.Equal(got, want) {
			t.Errorf("%q: %q, %v", list, got, err)
		}
	}
	if _, err := Namespaces("a,B_"); err == nil {
		t.Error("B_ passes for a namespace")
	}
}

// The operator with the rights of config/namespaced, and no others: it does its work in its namespace, and knows no other.
func TestHeldToNamespaces(t *testing.T) {
	assets := os.Getenv("KUBEBUILDER_ASSETS")
	if assets == "" {
		if os.Getenv("RDV_REQUIRE_ENVTEST") != "" {
			t.Fatal("KUBEBUILDER_ASSETS is not set: make unit sets it")
		}
		t.Skip("KUBEBUILDER_ASSETS is not set: make unit sets it")
	}
	crds, err := certManagerCRDs()
	if err != nil {
		t.Fatal(err)
	}
	env := &envtest.Environment{CRDDirectoryPaths: []string{filepath.Join("..", "config", "crd", "bases"), crds}, ErrorIfCRDPathMissing: true}
	config, err := env.Start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = env.Stop() })
	admin, err := client.New(config, client.Options{Scheme: NewScheme()})
	if err != nil {
		t.Fatal(err)
	}
	w := &world{Client: admin, clock: &clock{}, oidc: &providers{answers: map[string]error{}}}
	const mine, others = "rendezvous-demo", "others"
	for _, ns := range []string{mine, others} {
		w.create(t, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: ns}})
	}
	manifests, err := exec.CommandContext(t.Context(), filepath.Join(assets, "kubectl"), "kustomize", filepath.Join("..", "config", "namespaced")).Output()
	if err != nil {
		t.Fatal(err)
	}
	granted := 0
	for text := range bytes.SplitSeq(manifests, []byte("\n---\n")) {
		var kind metav1.TypeMeta
		if err := yaml.Unmarshal(text, &kind); err != nil {
			t.Fatal(err)
		}
		obj := map[string]client.Object{
			"Role": &rbacv1.Role{}, "RoleBinding": &rbacv1.RoleBinding{}, "ClusterRole": &rbacv1.ClusterRole{}, "ClusterRoleBinding": &rbacv1.ClusterRoleBinding{},
		}[kind.Kind]
		if obj == nil {
			continue
		}
		if err := yaml.UnmarshalStrict(text, obj); err != nil {
			t.Fatal(err)
		}
		if obj.GetNamespace() == "rendezvous-system" {
			continue // the Lease
		}
		if kind.Kind == "ClusterRoleBinding" {
			t.Errorf("ClusterRoleBinding %s is among them", obj.GetName())
		}
		w.create(t, obj)
		granted++
	}
	if granted < 2 {
		t.Fatal("the manifests grant nothing")
	}
	user, err := env.AddUser(envtest.User{Name: "system:serviceaccount:rendezvous-system:rendezvous-manager"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	mgr, err := ctrl.NewManager(user.Config(), ctrl.Options{
		Scheme: NewScheme(), Metrics: metricsserver.Options{BindAddress: "0"}, Cache: CacheOptions(mine),
		Controller: ctrlconfig.Controller{MaxConcurrentReconciles: MaxConcurrentReconciles, SkipNameValidation: new(true)},
	})
	if err != nil {
		t.Fatal(err)
	}
	noClusterIssuers, err := MayNotReadClusterIssuers(t.Context(), mgr.GetClient())
	if err != nil || !noClusterIssuers {
		t.Fatalf("a Role lets it read ClusterIssuers: %v, %v", !noClusterIssuers, err)
	}
	discovery := NewDiscovery()
	discovery.Fetch, discovery.Now = w.oidc.fetch, w.clock.now
	err = Setup(mgr, Options{
		Render:    render.Options{BrokerImage: "broker:test", GatewayImage: "gateway:test", RelayImage: "relay:test", AgentImage: "agent:test"},
		Discovery: discovery, Now: w.clock.now, NoClusterIssuers: noClusterIssuers,
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- mgr.Start(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	if !mgr.GetCache().WaitForCacheSync(ctx) {
		t.Fatal("the caches were not filled: a right is missing")
	}

	pool := func(ns string) *rdv.HostPool {
		pool := poolWithHomes(ns, rdv.Personal)
		pool.Spec.Accounts = &rdv.Accounts{Policy: rdv.AccountsCreate}
		return pool
	}
	w.create(t, newWorkspace(others, "company"), newGateway(others, "company"), pool(others))
	w.create(t, newWorkspace(mine, "company"), newGateway(mine, "company"), pool(mine))
	w.issueAll(t, mine, "demo")
	w.issue(t, mine, "gw-tls")
	w.issue(t, mine, "gw.demo.identity")
	w.run(t, mine, "demo-broker")
	w.run(t, mine, "gw")
	appears(t, w, mine, "linux-0", &corev1.Pod{})
	w.is(t, &rdv.Workspace{}, mine, "demo", rdv.ConditionReady, metav1.ConditionTrue, rdv.ReasonReady, "")
	w.is(t, &rdv.Gateway{}, mine, "gw", rdv.ConditionReady, metav1.ConditionTrue, rdv.ReasonReady, "")
	w.is(t, &rdv.HostPool{}, mine, "linux", rdv.ConditionReferencesResolved, metav1.ConditionTrue, rdv.ReasonReady, "")
	for kind, obj := range map[string]client.Object{"Workspace": &rdv.Workspace{}, "HostPool": &rdv.HostPool{}, "Gateway": &rdv.Gateway{}} {
		name := map[string]string{"Workspace": "demo", "HostPool": "linux", "Gateway": "gw"}[kind]
		if read(t, w, others, name, obj); len(obj.GetFinalizers()) > 0 {
			t.Errorf("the %s of another namespace was touched: %q", kind, obj.GetFinalizers())
		}
	}
	// Caches hold what is the operator's own.
	w.create(t, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: mine, Name: "foreign"}}, &certmanager.Certificate{
		ObjectMeta: metav1.ObjectMeta{Namespace: mine, Name: "foreign"},
		Spec:       certmanager.CertificateSpec{SecretName: "x", DNSNames: []string{"x"}, IssuerRef: cmmeta.IssuerReference{Name: "x"}},
	})
	w.settled(t, mine)
	for _, obj := range []client.Object{metadataOf(secretKind), &certmanager.Certificate{}} {
		if err := mgr.GetClient().Get(t.Context(), client.ObjectKey{Namespace: mine, Name: "foreign"}, obj); client.IgnoreNotFound(err) != nil || err == nil {
			t.Errorf("a foreign %T is in the cache: %v", obj, err)
		}
	}
	// Deletion asks about the namespace.
	w.report(t, mine, "linux-0", true, 1, false)
	w.deletes(t, &rdv.SessionHost{}, mine, "linux-0")
	w.is(t, &rdv.SessionHost{}, mine, "linux-0", rdv.ConditionDraining, metav1.ConditionTrue, rdv.ReasonTerminating, "1 session")
	w.report(t, mine, "linux-0", true, 0, true)
	w.vanishes(t, &corev1.Pod{}, mine, "linux-0")
}
