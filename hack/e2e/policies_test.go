package e2e

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/hack/desktop/rdpkit"
	"rendezvous.dev/rendezvous/hack/netlab"
	"rendezvous.dev/rendezvous/hack/stage"
)

// place is a network namespace to dial from.
type place struct{ name, netns string }

// podAt is the place of a running pod with these labels.
func podAt(t *testing.T, name, namespace string, labels map[string]string) (place, corev1.Pod) {
	t.Helper()
	var list corev1.PodList
	if err := w.Client.List(t.Context(), &list, client.InNamespace(namespace), client.MatchingLabels(labels)); err != nil {
		t.Fatal(err)
	}
	for _, pod := range list.Items {
		if pod.Status.Phase != corev1.PodRunning || pod.DeletionTimestamp != nil {
			continue
		}
		files, _ := filepath.Glob("/proc/[0-9]*/cgroup")
		for _, file := range files {
			if text, err := os.ReadFile(file); err == nil && strings.Contains(string(text), string(pod.UID)) {
				return place{name, filepath.Join(filepath.Dir(file), "ns", "net")}, pod
			}
		}
		t.Fatalf("no process of pod %s", pod.Name)
	}
	t.Fatalf("no running pod in %s has the labels %v", namespace, labels)
	return place{}, corev1.Pod{}
}

// reaches says why a TCP connection from a place does not come about, or nil.
func (p place) reaches(ctx context.Context, addr string) error {
	return rdpkit.DoIn(p.netns, func() error {
		conn, err := (&net.Dialer{Timeout: 2 * time.Second}).DialContext(ctx, "tcp", addr)
		if err == nil {
			conn.Close()
		}
		return err
	})
}

// listen takes connections at an address until the test ends.
func listen(t *testing.T, in *netlab.Host, addr string) {
	t.Helper()
	var listener net.Listener
	open := func() (err error) {
		listener, err = net.Listen("tcp", addr)
		return err
	}
	if in != nil {
		if err := in.Do(open); err != nil {
			t.Fatal(err)
		}
	} else if err := open(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			conn.Close()
		}
	}()
}

// Each way that our pods need is open where policies hold, and what they have no business with is closed. What is closed to
// one is open to another, so that no row holds because nobody listens.
func TestNetworkPolicies(t *testing.T) {
	ctx := t.Context()
	const metadata = "169.254.169.254"
	run := func(line ...string) error { return exec.CommandContext(ctx, line[0], line[1:]...).Run() }
	if err := run("ip", "addr", "replace", metadata+"/32", "dev", "rdv-node0"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = exec.Command("ip", "addr", "del", metadata+"/32", "dev", "rdv-node0").Run()
	})
	listen(t, nil, metadata+":80")
	world, err := netlab.New(ctx, "world", 40)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { world.Close() })
	listen(t, world, world.Addr+":443")

	desktop, _ := podAt(t, "session host", stage.Namespace, map[string]string{rdv.LabelHostPool: "linux"})
	relay, relayPod := podAt(t, "gateway", stage.Namespace, map[string]string{rdv.LabelGateway: "gateway-a"})
	broker, brokerPod := podAt(t, "broker", stage.Namespace, map[string]string{rdv.LabelComponent: "broker"})
	operator, operatorPod := podAt(t, "operator", "rendezvous-system", map[string]string{"app.kubernetes.io/component": "manager"})
	stranger, strangerPod := podAt(t, "pod of another namespace", "dex", nil)
	var brokers corev1.PodList
	if err := w.Client.List(ctx, &brokers, client.InNamespace(stage.Namespace), client.MatchingLabels{rdv.LabelComponent: "broker"}); err != nil {
		t.Fatal(err)
	}
	other := ""
	for _, pod := range brokers.Items {
		if pod.Name != brokerPod.Name && pod.DeletionTimestamp == nil {
			other = pod.Status.PodIP
		}
	}
	if other == "" {
		t.Fatal("there is no second broker")
	}
	var api corev1.Service
	if err := w.Client.Get(ctx, client.ObjectKey{Namespace: "default", Name: "kubernetes"}, &api); err != nil {
		t.Fatal(err)
	}
	at := func(ip string, port int) string { return net.JoinHostPort(ip, strconv.Itoa(port)) }
	apiServer, brokerIP, relayIP := at(api.Spec.ClusterIP, 443), brokerPod.Status.PodIP, relayPod.Status.PodIP

	for _, tc := range []struct {
		from place
		what string
		to   string
		open bool
	}{
		{desktop, "the feed", at(brokerIP, 8443), true},
		{desktop, "the bus", at(brokerIP, 4222), true},
		{desktop, "the bus by WebSocket", at(brokerIP, 8444), true},
		{desktop, "a gateway", at(relayIP, 8443), true},
		{desktop, "the world", at(world.Addr, 443), true},
		{desktop, "cloud metadata", at(metadata, 80), false},
		{desktop, "the API server", apiServer, false},
		{desktop, "the API server at its node", "10.89.0.1:6443", false},
		{desktop, "the kubelet", "10.89.0.1:10250", false},
		{desktop, "a pod of another namespace", at(strangerPod.Status.PodIP, 5556), false},
		{desktop, "a broker's metrics", at(brokerIP, 9090), false},
		{desktop, "a relay's metrics", at(relayIP, 9090), false},
		{desktop, "the routes of brokers", at(brokerIP, 6222), false},
		{desktop, "the sessions of a broker", at(brokerIP, 8445), false},
		{desktop, "the operator's metrics", at(operatorPod.Status.PodIP, 9090), false},

		{relay, "the bus", at(brokerIP, 4222), true},
		{relay, "a gateway", at(relayIP, 8443), true},
		{relay, "the feed", at(brokerIP, 8443), false},
		{relay, "the bus by WebSocket", at(brokerIP, 8444), false},
		{relay, "the world", at(world.Addr, 443), false},
		{relay, "cloud metadata", at(metadata, 80), false},
		{relay, "the API server", apiServer, false},
		{relay, "the identity provider", at(strangerPod.Status.PodIP, 5556), false},

		{broker, "the API server", apiServer, true},
		{broker, "the identity provider", at(strangerPod.Status.PodIP, 5556), true},
		{broker, "the routes of brokers", at(other, 6222), true},
		{broker, "cloud metadata", at(metadata, 80), false},

		{operator, "the API server", apiServer, true},
		{operator, "the identity provider", at(strangerPod.Status.PodIP, 5556), true},
		{operator, "the sessions of a broker", at(brokerIP, 8445), true},
		{operator, "cloud metadata", at(metadata, 80), false},
		{operator, "a broker's metrics", at(brokerIP, 9090), false},

		{stranger, "the feed", at(brokerIP, 8443), true},
		{stranger, "a gateway", at(relayIP, 8443), true},
		{stranger, "the API server", apiServer, true},
		{stranger, "cloud metadata", at(metadata, 80), true},
		{stranger, "the world", at(world.Addr, 443), true},
		{stranger, "the sessions of a broker", at(brokerIP, 8445), false},
		{stranger, "the routes of brokers", at(brokerIP, 6222), false},
		{stranger, "a broker's metrics", at(brokerIP, 9090), false},
	} {
		t.Run(tc.from.name+" to "+tc.what, func(t *testing.T) {
			t.Parallel()
			if err := eventually(ctx, 20*time.Second, func() error {
				err := tc.from.reaches(ctx, tc.to)
				switch {
				case tc.open:
					return err
				case err == nil:
					return errors.New("it is open")
				}
				return nil
			}); err != nil {
				t.Errorf("%s to %s (%s): %v", tc.from.name, tc.what, tc.to, err)
			}
		})
	}
}

// Metrics are for the namespaces that say so; a pool may open what its desktops need.
func TestNetworkPoliciesFollow(t *testing.T) {
	ctx := t.Context()
	stranger, strangerPod := podAt(t, "pod of another namespace", "dex", nil)
	_, brokerPod := podAt(t, "broker", stage.Namespace, map[string]string{rdv.LabelComponent: "broker"})
	desktop, _ := podAt(t, "session host", stage.Namespace, map[string]string{rdv.LabelHostPool: "linux"})
	metrics := net.JoinHostPort(brokerPod.Status.PodIP, "9090")
	provider := net.JoinHostPort(strangerPod.Status.PodIP, "5556")
	opens := func(from place, to string) {
		t.Helper()
		if err := eventually(ctx, 30*time.Second, func() error { return from.reaches(ctx, to) }); err != nil {
			t.Fatalf("%s to %s: %v", from.name, to, err)
		}
	}
	kubectl := func(args ...string) {
		t.Helper()
		if out, err := w.Kubectl(ctx, "", args...); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	kubectl("label", "namespace", "dex", "metrics=enabled", "--overwrite")
	t.Cleanup(func() {
		if _, err := w.Kubectl(context.WithoutCancel(ctx), "", "label", "namespace", "dex", "metrics-"); err != nil {
			t.Error(err)
		}
	})
	opens(stranger, metrics)

	allow := fmt.Sprintf(`{"spec":{"network":{"egress":{"allow":[{"to":[{"ipBlock":{"cidr":"%s/32"}}]}]}}}}`, strangerPod.Status.PodIP)
	kubectl("-n", stage.Namespace, "patch", "hostpool", "linux", "--type=merge", "-p", allow)
	t.Cleanup(func() {
		if _, err := w.Kubectl(context.WithoutCancel(ctx), "", "-n", stage.Namespace, "patch", "hostpool", "linux", "--type=merge", "-p", `{"spec":{"network":null}}`); err != nil {
			t.Error(err)
		}
	})
	opens(desktop, provider)
}
