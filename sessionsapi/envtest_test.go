package sessionsapi_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/envtest"
	"sigs.k8s.io/yaml"

	"rendezvous.dev/rendezvous/sessionsapi"
	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/refusal"
	"rendezvous.dev/rendezvous/wire/wiretest"
)

// desks stand for the brokers.
type desks struct {
	mu       sync.Mutex
	sessions []sessionsapi.Found
	missing  []string
	done     []string
}

func (d *desks) Sessions(_ context.Context, namespace string) (found []sessionsapi.Found, missing []string, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, s := range d.sessions {
		if namespace == "" || s.Namespace == namespace {
			found = append(found, s)
		}
	}
	return found, d.missing, nil
}

func (d *desks) Act(_ context.Context, namespace, workspace string, req brokerapi.ActRequest) (string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if req.Text == "fail" {
		return "", refusal.New(refusal.HostRefused, "Host h could not show it: no display.")
	}
	d.done = append(d.done, fmt.Sprintf("%s %s/%s/%s %q by %s", req.Act, namespace, workspace, req.SessionID, req.Text, req.By))
	if req.Act == bus.ActEnd {
		for i, s := range d.sessions {
			if s.ID == req.SessionID && s.Namespace == namespace {
				d.sessions = append(d.sessions[:i:i], d.sessions[i+1:]...)
				break
			}
		}
	}
	return "done", nil
}

func (d *desks) set(f func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	f()
}

func (d *desks) acts() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return append([]string(nil), d.done...)
}

// authority signs client certificates.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func issue(t *testing.T, ca *authority, name string, edit ...func(*x509.Certificate)) (*authority, []byte, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		BasicConstraintsValid: true, IsCA: ca == nil, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	for _, e := range edit {
		e(tmpl)
	}
	parent := &authority{tmpl, key}
	if ca != nil {
		parent = ca
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent.cert, key.Public(), parent.key)
	if err != nil {
		t.Fatal(err)
	}
	cert, _ := x509.ParseCertificate(der)
	keyDER, _ := x509.MarshalPKCS8PrivateKey(key)
	return &authority{cert, key}, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})
}

func found(namespace, id, user, pool, host string) sessionsapi.Found {
	return sessionsapi.Found{Namespace: namespace, Workspace: "office", Session: brokerapi.Session{
		ID: id, User: user, Account: strings.Split(user, "@")[0], Resource: "desk", Pool: pool, Host: host, State: "Active", Since: time.Now().Add(-5 * time.Minute),
		Client: "192.0.2.9:50000", Gateway: "gw", Instance: "gw-1", ActivityID: "activity-" + id, Proven: user != "",
	}}
}

// TestKubectl is the API behind a real API server, asked by kubectl and by the plugin, with the rights of config/.
func TestKubectl(t *testing.T) {
	assets := os.Getenv("KUBEBUILDER_ASSETS")
	if assets == "" {
		if os.Getenv("RDV_REQUIRE_ENVTEST") != "" {
			t.Fatal("KUBEBUILDER_ASSETS is not set: make unit sets it")
		}
		t.Skip("KUBEBUILDER_ASSETS is not set: make unit sets it")
	}
	dir := t.TempDir()
	ca, caPEM, _ := issue(t, nil, "front-proxy-ca")
	_, proxyPEM, proxyKey := issue(t, ca, "front-proxy-client")
	for name, data := range map[string][]byte{"ca.crt": caPEM, "proxy.crt": proxyPEM, "proxy.key": proxyKey} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	env := &envtest.Environment{}
	args := env.ControlPlane.GetAPIServer().Configure()
	for flag, value := range map[string]string{
		"requestheader-client-ca-file": filepath.Join(dir, "ca.crt"), "requestheader-allowed-names": "front-proxy-client",
		"requestheader-username-headers": "X-Remote-User", "requestheader-group-headers": "X-Remote-Group", "requestheader-extra-headers-prefix": "X-Remote-Extra-",
		"proxy-client-cert-file": filepath.Join(dir, "proxy.crt"), "proxy-client-key-file": filepath.Join(dir, "proxy.key"),
	} {
		args.Set(flag, value)
	}
	config, err := env.Start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { env.Stop() })
	admin, err := client.New(config, client.Options{Scheme: clientgoscheme.Scheme})
	if err != nil {
		t.Fatal(err)
	}
	create := func(o client.Object) {
		t.Helper()
		if err := admin.Create(t.Context(), o); err != nil {
			t.Fatal(err)
		}
	}
	apply := func(file string) {
		t.Helper()
		text, err := os.ReadFile(filepath.Join("..", "config", file))
		if err != nil {
			t.Fatal(err)
		}
		for doc := range strings.SplitSeq(string(text), "\n---\n") {
			o := &unstructured.Unstructured{}
			if err := yaml.Unmarshal([]byte(doc), &o.Object); err != nil {
				t.Fatal(err)
			}
			if len(o.Object) > 0 {
				create(o)
			}
		}
	}
	for _, ns := range []string{"rendezvous-system", "team", "other"} {
		create(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: ns}})
	}
	for _, f := range []string{"rbac/role.yaml", "rbac/role_binding.yaml", "rbac/user_roles.yaml", "sessions/rbac.yaml", "sessions/apiservice.yaml"} {
		apply(f)
	}
	// Nothing forwards to Services here, so this one names the test's own listener.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close()
	port := l.Addr().(*net.TCPAddr).Port
	create(&corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "rendezvous-system", Name: "rendezvous-sessions"}, Spec: corev1.ServiceSpec{
		Type: corev1.ServiceTypeExternalName, ExternalName: "localhost", Ports: []corev1.ServicePort{{Port: int32(port)}},
	}})
	svc := &unstructured.Unstructured{}
	svc.SetAPIVersion("apiregistration.k8s.io/v1")
	svc.SetKind("APIService")
	svc.SetName(sessionsapi.APIService)
	if err := admin.Patch(t.Context(), svc, client.RawPatch("application/merge-patch+json", fmt.Appendf(nil, `{"spec":{"service":{"port":%d}}}`, port))); err != nil {
		t.Fatal(err)
	}

	// The operator, with its own rights.
	account, err := env.AddUser(envtest.User{Name: "system:serviceaccount:rendezvous-system:rendezvous-manager"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	operator, err := client.New(account.Config(), client.Options{Scheme: clientgoscheme.Scheme})
	if err != nil {
		t.Fatal(err)
	}
	d := &desks{sessions: []sessionsapi.Found{
		found("team", "s-alice", "alice@example.com", "linux", "linux-0"), found("team", "s-bob", "bob@example.com", "linux", "linux-1"),
		found("team", "unknown-1", "", "linux", "linux-1"), found("other", "s-carol", "carol@example.com", "linux", "linux-0"),
	}}
	auth := &sessionsapi.Authenticator{Reader: operator}
	server := &sessionsapi.Server{
		Addr: addr, Namespace: "rendezvous-system", Service: "rendezvous-sessions", Client: operator, Reader: operator, Log: slog.New(slog.DiscardHandler),
		Handler: sessionsapi.Handler(sessionsapi.Options{Brokers: d, Authenticate: auth.Authenticate, Allowed: sessionsapi.Authorizer{Client: operator}.Allowed}),
	}
	ctx, stop := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- server.Start(ctx) }()
	defer func() {
		stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	}()

	// Two people: one may look, the other may act, in one namespace.
	user := func(name, role string) func(argv ...string) (string, error) {
		u, err := env.AddUser(envtest.User{Name: name, Groups: []string{"people"}}, nil)
		if err != nil {
			t.Fatal(err)
		}
		kubeconfig, err := u.KubeConfig()
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(dir, name+".kubeconfig")
		if err := os.WriteFile(file, kubeconfig, 0o600); err != nil {
			t.Fatal(err)
		}
		create(&rbacv1.RoleBinding{ObjectMeta: metav1.ObjectMeta{Namespace: "team", Name: name}, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: role},
			Subjects: []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: "User", Name: name}}})
		return func(argv ...string) (string, error) {
			cmd := exec.CommandContext(t.Context(), argv[0], argv[1:]...)
			cmd.Env = append(os.Environ(), "KUBECONFIG="+file, "HOME="+dir)
			out, err := cmd.CombinedOutput()
			return string(out), err
		}
	}
	kubectl := filepath.Join(assets, "kubectl")
	viewer, editor := user("vera", "rendezvous-viewer"), user("eddie", "rendezvous-editor")
	plugin := filepath.Join(dir, "kubectl-rdv")
	if out, err := exec.Command("go", "build", "-o", plugin, "../cmd/kubectl-rdv").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	var out string
	for end := time.Now().Add(60 * time.Second); ; time.Sleep(500 * time.Millisecond) {
		if out, err = viewer(kubectl, "get", "sessions", "-n", "team", "-o", "wide"); err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("the API never came: %v\n%s", err, out)
		}
	}
	t.Logf("kubectl get sessions -n team -o wide\n%s", out)
	for _, want := range []string{"NAME", "USER", "s-alice", "alice@example.com", "<unknown>", "192.0.2.9:50000", "activity-s-bob", "5m"} {
		if !strings.Contains(out, want) {
			t.Errorf("the list lacks %q", want)
		}
	}
	if strings.Contains(out, "carol") {
		t.Error("another namespace's session is shown")
	}
	check := func(who func(...string) (string, error), ok bool, want string, argv ...string) {
		t.Helper()
		out, err := who(argv...)
		if (err == nil) != ok || !strings.Contains(out, want) {
			t.Errorf("%s: %v\n%s\nwant %q", strings.Join(argv[1:], " "), err, out, want)
		}
	}
	check(viewer, false, "forbidden", kubectl, "get", "sessions", "-A")
	check(viewer, false, "forbidden", kubectl, "get", "sessions", "-n", "other")
	check(viewer, false, `User "vera" cannot delete resource "sessions"`, kubectl, "delete", "session", "s-alice", "-n", "team")
	check(viewer, false, "sessions/message", plugin, "message", "s-alice", "-n", "team", "--text", "hello")
	if done := d.acts(); len(done) > 0 {
		t.Fatalf("a viewer did %q", done)
	}
	check(viewer, true, `"user": "alice@example.com"`, kubectl, "get", "session", "s-alice", "-n", "team", "-o", "json")
	check(viewer, false, `"s-carol" not found`, kubectl, "get", "session", "s-carol", "-n", "team")
	check(viewer, false, "is not a field of sessions", kubectl, "get", "sessions", "-n", "team", "--field-selector", "color=red")
	if out, err := viewer(kubectl, "get", "sessions", "-n", "team", "--field-selector", "user=bob@example.com", "-l", "rendezvous.dev/hostpool=linux", "-o", "name"); err != nil || strings.TrimSpace(out) != "session.live.rendezvous.dev/s-bob" {
		t.Errorf("selected: %v %q", err, out)
	}

	// A watch tells of the end.
	watching, stopWatching := context.WithCancel(t.Context())
	watch := exec.CommandContext(watching, kubectl, "get", "sessions", "-n", "team", "-w", "--output-watch-events")
	watch.Env = append(os.Environ(), "KUBECONFIG="+filepath.Join(dir, "vera.kubeconfig"), "HOME="+dir)
	var seen wiretest.Log
	watch.Stdout, watch.Stderr = &seen, &seen
	if err := watch.Start(); err != nil {
		t.Fatal(err)
	}
	within(t, "the watch's first list", func() bool { return strings.Contains(seen.String(), "s-bob") })
	time.Sleep(1500 * time.Millisecond)

	check(editor, true, "shown the message", plugin, "message", "-n", "team", "--field-selector", "user=alice@example.com", "--text", "Save your work.\nWe restart at 12:00.")
	check(editor, false, "no display", plugin, "message", "s-bob", "-n", "team", "--text", "fail")
	check(editor, false, "no text", plugin, "message", "s-bob", "-n", "team", "--text", " ")
	check(editor, false, "which sessions?", plugin, "disconnect", "-n", "team")
	check(editor, true, "(dry run)", plugin, "logoff", "--all", "-n", "team", "--dry-run")
	check(editor, true, "disconnected", plugin, "disconnect", "session/s-bob", "-n", "team")
	check(editor, true, "Success", kubectl, "create", "--raw", "/apis/live.rendezvous.dev/v1alpha1/namespaces/team/sessions/s-bob/disconnect", "-f", os.DevNull)
	check(viewer, true, "yes", kubectl, "auth", "can-i", "list", "sessions.live.rendezvous.dev", "-n", "team")
	check(viewer, false, "no", kubectl, "auth", "can-i", "delete", "sessions.live.rendezvous.dev", "-n", "team")
	check(editor, true, "(server dry run)", kubectl, "delete", "session", "s-bob", "-n", "team", "--dry-run=server")
	check(editor, true, "deleted", kubectl, "delete", "session", "s-alice", "-n", "team", "--timeout=20s")
	check(editor, true, "deleted", kubectl, "delete", "sessions", "-n", "team", "--field-selector", "user=bob@example.com", "--timeout=20s")
	check(editor, false, "forbidden", kubectl, "delete", "session", "s-carol", "-n", "other")
	want := []string{
		`message team/office/s-alice "Save your work.\nWe restart at 12:00." by eddie`, `disconnect team/office/s-bob "" by eddie`,
		`disconnect team/office/s-bob "" by eddie`,
		`end team/office/s-alice "" by eddie`, `end team/office/s-bob "" by eddie`,
	}
	if done := d.acts(); strings.Join(done, "\n") != strings.Join(want, "\n") {
		t.Errorf("done:\n%s\nwant:\n%s", strings.Join(done, "\n"), strings.Join(want, "\n"))
	}
	within(t, "the ends in the watch", func() bool { return strings.Count(seen.String(), "DELETED") == 2 })
	d.set(func() {
		d.sessions = append(d.sessions, found("team", "s-dora", "dora@example.com", "linux", "linux-2"))
	})
	within(t, "a new session in the watch", func() bool { return strings.Contains(seen.String(), "s-dora") })
	t.Logf("kubectl get sessions -w --output-watch-events\n%s", seen.String())
	stopWatching()
	watch.Wait()

	d.set(func() {
		d.missing = []string{"sessions of Workspace team/lab can't be listed now: its brokers don't answer"}
	})
	check(viewer, true, "Warning: sessions of Workspace team/lab can't be listed now", kubectl, "get", "sessions", "-n", "team")
	check(viewer, false, "can't be listed now", kubectl, "get", "session", "s-gone", "-n", "team")

	// Nobody comes past the API server.
	_, strangerPEM, strangerKey := issue(t, nil, "front-proxy-client")
	_, wrongPEM, wrongKey := issue(t, ca, "somebody-else")
	for name, pair := range map[string][2][]byte{"no certificate": {}, "another CA's": {strangerPEM, strangerKey}, "another name": {wrongPEM, wrongKey}, "the front proxy's": {proxyPEM, proxyKey}} {
		conf := &tls.Config{InsecureSkipVerify: true}
		if pair[0] != nil {
			cert, err := tls.X509KeyPair(pair[0], pair[1])
			if err != nil {
				t.Fatal(err)
			}
			conf.Certificates = []tls.Certificate{cert}
		}
		hc := &http.Client{Transport: &http.Transport{TLSClientConfig: conf}}
		req, _ := http.NewRequest("GET", "https://"+addr+"/apis/live.rendezvous.dev/v1alpha1/sessions", nil)
		req.Header.Set("X-Remote-User", "system:admin")
		req.Header.Set("X-Remote-Group", "system:masters")
		res, err := hc.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if want := map[bool]int{true: 200, false: 401}[name == "the front proxy's"]; res.StatusCode != want {
			t.Errorf("%s: %d, want %d", name, res.StatusCode, want)
		}
		hc.CloseIdleConnections()
	}
}

func within(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			t.Errorf("not seen: %s", what)
			return
		}
	}
}
