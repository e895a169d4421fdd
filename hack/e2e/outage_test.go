package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/controller-runtime/pkg/client"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/hack/desktop/rdpkit"
	"rendezvous.dev/rendezvous/hack/stage"
	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/config"
	"rendezvous.dev/rendezvous/wire/refusal"
)

// ticketFile is where alice keeps a connection file that she has downloaded.
const ticketFile = "/root/downloaded.rdp"

// While the API server is away, brokers go on from what they know, and say so.
func TestKubernetesAway(t *testing.T) {
	brokers := brokerPods(t)
	if len(brokers) == 0 {
		t.Fatal("there is no broker")
	}
	keepFile(t, signedIn(t))
	back := cutOffPods(t)
	for _, b := range brokers {
		waitForMetric(t, b, "rendezvous_broker_kubernetes_up", 0)
	}
	connectFromFile(t)
	showDesktop(t, "linux-desktop", "raw", w.podColor).Stop() // with a feed asked now
	heard, err := metric(t.Context(), brokers[0], "rendezvous_broker_kubernetes_heard_timestamp_seconds")
	if err != nil || heard == 0 || time.Since(time.Unix(int64(heard), 0)) < 5*time.Second {
		t.Errorf("the API server was heard at %v, %v", heard, err)
	}
	back()
	for _, b := range brokers {
		waitForMetric(t, b, "rendezvous_broker_kubernetes_up", 1)
	}
	// What could not be written is written now: the desktop that was left.
	if err := eventually(t.Context(), time.Minute, func() error {
		var sh rdv.SessionHost
		err := w.Client.Get(t.Context(), client.ObjectKey{Namespace: stage.Namespace, Name: "linux-0"}, &sh)
		if err == nil && (sh.Status.Agent == nil || sh.Status.Agent.Sessions == 0) {
			err = fmt.Errorf("the host's status has no session: %+v", sh.Status.Agent)
		}
		return err
	}); err != nil {
		t.Error(err)
	}
}

// While the identity provider is away, tickets serve, and tokens where its keys are known; the Workspace says what is
// wrong. A broker that starts meanwhile serves tickets, too.
func TestIdentityProviderAway(t *testing.T) {
	ws := &rdv.Workspace{ObjectMeta: meta("demo")}
	inHand := signedIn(t)
	keepFile(t, inHand)
	back := withoutEndpoints(t, "dex", "dex")
	keepFile(t, inHand)
	connectFromFile(t)
	says(t, ws, rdv.ConditionIdentityReady, metav1.ConditionFalse, "spec.identity.oidc.issuerURL", stage.Issuer)
	for _, b := range brokerPods(t) {
		waitForMetric(t, b, "rendezvous_broker_identity_up", 0)
	}

	t.Run("brokers that start meanwhile serve tickets", func(t *testing.T) {
		if err := w.Client.DeleteAllOf(t.Context(), &corev1.Pod{}, client.InNamespace(stage.Namespace),
			client.MatchingLabels{rdv.LabelWorkspace: "demo", rdv.LabelComponent: "broker"}); err != nil {
			t.Fatal(err)
		}
		if err := eventually(t.Context(), 2*time.Minute, func() error {
			// One from before, which serves on for a moment, still knows the provider's keys.
			for _, p := range listBrokers(t) {
				if !p.DeletionTimestamp.IsZero() {
					return fmt.Errorf("broker %s, from before, is still there", p.Name)
				}
			}
			return brokersKnow(t.Context(), "linux-0")
		}); err != nil {
			t.Fatal(err)
		}
		connectFromFile(t)
		// A token can't be checked by those who have never heard the provider.
		if e := feedRefusal(t, inHand); e.Code != refusal.IdentityAway {
			t.Errorf("a token is refused with %q: %s", e.Code, e.Message)
		} else if !strings.Contains(e.Message, stage.Issuer) || !strings.Contains(e.Message, "IdentityReady") {
			t.Errorf("the refusal does not say where to look: %s", e.Message)
		}
	})

	back()
	says(t, ws, rdv.ConditionIdentityReady, metav1.ConditionTrue)
	for _, b := range brokerPods(t) {
		waitForMetric(t, b, "rendezvous_broker_identity_up", 1)
	}
	keepFile(t, signedIn(t))
}

// signedIn is a token of alice.
func signedIn(t *testing.T) string {
	t.Helper()
	tok, err := w.Token(t.Context(), "alice", "rdv")
	if err != nil {
		t.Fatal(err)
	}
	return tok
}

// feedFile asks the feed for the file of linux-desktop.
func feedFile(t *testing.T, token string) (int, []byte) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, stage.WorkspaceURL+brokerapi.PathResources+"/linux-desktop.rdp", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+token)
	resp, err := w.HTTP().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, body
}

// keepFile puts a connection file with a fresh ticket on alice's machine.
func keepFile(t *testing.T, token string) {
	t.Helper()
	status, body := feedFile(t, token)
	if status != http.StatusOK {
		t.Fatalf("the feed answers %d: %s", status, body)
	}
	if err := w.alice.WriteFile(ticketFile, body, 0o600); err != nil {
		t.Fatal(err)
	}
}

// feedRefusal is why the feed gives no file.
func feedRefusal(t *testing.T, token string) *refusal.Error {
	t.Helper()
	status, body := feedFile(t, token)
	if status == http.StatusOK {
		t.Fatal("the feed gives a file")
	}
	var e brokerapi.ErrorBody
	if err := json.Unmarshal(body, &e); err != nil || e.Error == nil {
		t.Fatalf("the feed answers %d without saying why: %s", status, body)
	}
	return e.Error
}

// connectFromFile starts alice's RDP client on the file that she has, and waits for the desktop.
func connectFromFile(t *testing.T) {
	t.Helper()
	notYet(t, w.podColor)
	p, err := w.alice.Start(rdpkit.FreeRDP(ticketFile, "/p:any")...)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Stop()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if _, err := w.alice.WaitForColor(ctx, w.podColor, 0.3); err != nil {
		t.Fatalf("no desktop from a file in hand: %v\n%s", err, tail(p.Output(), 30))
	}
}

// brokerPods are the addresses of the demo's brokers.
func brokerPods(t *testing.T) (ips []string) {
	t.Helper()
	for _, p := range listBrokers(t) {
		if p.DeletionTimestamp.IsZero() && p.Status.PodIP != "" {
			ips = append(ips, p.Status.PodIP)
		}
	}
	return ips
}

// listBrokers is the demo's broker pods, also those on their way out.
func listBrokers(t *testing.T) []corev1.Pod {
	t.Helper()
	var pods corev1.PodList
	if err := w.Client.List(t.Context(), &pods, client.InNamespace(stage.Namespace), client.MatchingLabels{rdv.LabelWorkspace: "demo", rdv.LabelComponent: "broker"}); err != nil {
		t.Fatal(err)
	}
	return pods.Items
}

// metric reads one number of a pod.
func metric(ctx context.Context, ip, name string) (float64, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+net.JoinHostPort(ip, strconv.Itoa(config.PortMetrics))+"/metrics", nil)
	if err != nil {
		return 0, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(body)) {
		if value, ok := strings.CutPrefix(strings.TrimSpace(line), name+" "); ok {
			return strconv.ParseFloat(value, 64)
		}
	}
	return 0, fmt.Errorf("%s has no metric %s", ip, name)
}

func waitForMetric(t *testing.T, ip, name string, want float64) {
	t.Helper()
	if err := eventually(t.Context(), 2*time.Minute, func() error {
		got, err := metric(t.Context(), ip, name)
		if err == nil && got != want {
			err = fmt.Errorf("%s: %s is %v, want %v", ip, name, got, want)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
}

// cutOffPods keeps the API server from all pods, those with open connections too, until back is called.
func cutOffPods(t *testing.T) (back func()) {
	t.Helper()
	cfg, err := clientcmd.BuildConfigFromFlags("", w.Kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	server, err := url.Parse(cfg.Host)
	if err != nil {
		t.Fatal(err)
	}
	const table = "inet rdv-e2e-outage"
	nft := func(ctx context.Context, rules string) {
		if out, err := exec.CommandContext(ctx, "nft", rules).CombinedOutput(); err != nil {
			t.Errorf("nft: %v: %s", err, out)
		}
	}
	// Pods reach the API server by its Service, which is rewritten to the server's own address.
	nft(t.Context(), fmt.Sprintf("table %s { chain cut { type filter hook input priority -10; iifname \"rdv-pods0\" ip daddr %s tcp dport %s reject with tcp reset; }; }",
		table, server.Hostname(), server.Port()))
	gone := false
	back = func() {
		if !gone {
			gone = true
			nft(context.WithoutCancel(t.Context()), "delete table "+table)
		}
	}
	t.Cleanup(back)
	return back
}

// withoutEndpoints takes a Service's pods from it, until back is called: who calls is turned away, and the pods keep
// what they know.
func withoutEndpoints(t *testing.T, namespace, name string) (back func()) {
	t.Helper()
	key := client.ObjectKey{Namespace: namespace, Name: name}
	selector := func(ctx context.Context, change func(map[string]string)) {
		if err := eventually(ctx, 10*time.Second, func() error {
			var s corev1.Service
			if err := w.Client.Get(ctx, key, &s); err != nil {
				return err
			}
			change(s.Spec.Selector)
			return w.Client.Update(ctx, &s)
		}); err != nil {
			t.Error(err)
		}
	}
	selector(t.Context(), func(m map[string]string) { m[stage.AwayLabel] = "away" })
	gone := false
	back = func() {
		if !gone {
			gone = true
			selector(context.WithoutCancel(t.Context()), func(m map[string]string) { delete(m, stage.AwayLabel) })
		}
	}
	t.Cleanup(back)
	if err := eventually(t.Context(), 30*time.Second, func() error {
		resp, err := w.HTTP().Get(stage.Issuer + "/.well-known/openid-configuration")
		if err == nil {
			resp.Body.Close()
			return errors.New("the provider still answers")
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return back
}
