package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	"sigs.k8s.io/controller-runtime/pkg/client"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/hack/netlab"
	"rendezvous.dev/rendezvous/hack/stage"
	"rendezvous.dev/rendezvous/wire/trace"
)

const (
	nearGateway, otherGateway = "gateway-a", "gateway-b"
	// slowCable is the network namespace whose address stands for the other gateway's.
	slowCable = 3
	// far is no group of near's; near is the same.
	farTrip, nearTrip = 60 * time.Millisecond, time.Millisecond
)

// Step 7 with two gateways: of different groups the nearer one serves, full of people as it is; of one group the emptier
// one does. Whether rdv measures, or the gateway that FreeRDP's ARM form asks, all go by the public name of the other
// gateway, which leads over a slow line.
func TestGatewaysOfDifferentLatency(t *testing.T) {
	enrolMachine(t)
	line := secondGateway(t)

	t.Run("far", func(t *testing.T) {
		// The near gateway has a session from here on, and the other none.
		d := showDesktop(t, "linux-desktop", "tsgu", w.podColor)
		if g := servedBy(t, d); g != nearGateway {
			t.Fatalf("%s serves, %s away\n%s", g, farTrip, timeline(t, d))
		}
		t.Run("rdv chooses", func(t *testing.T) {
			d := land(t, "tsgu")
			if g := servedBy(t, d); g != nearGateway {
				t.Errorf("%s serves, %s away\n%s", g, farTrip, timeline(t, d))
			}
			d.Stop()
		})
		t.Run("the entry gateway chooses", func(t *testing.T) {
			waitForLatency(t, func(ms float64) bool { return ms >= float64(farTrip.Milliseconds()) })
			d := land(t, "arm", "--gateway", nearGateway)
			g, _, otherMS := entryChoice(t, d)
			if g != nearGateway || servedBy(t, d) != nearGateway || otherMS < float64(farTrip.Milliseconds()) {
				t.Errorf("%s serves, %.1f ms away\n%s", g, otherMS, timeline(t, d))
			}
			d.Stop()
		})

		line.SetRoundTrip(nearTrip)
		t.Run("near, rdv chooses", func(t *testing.T) {
			untilQuiet(t, "rdv measured them in one group", func() bool {
				waitForSessions(t, map[string]int32{nearGateway: 1, otherGateway: 0})
				d := land(t, "tsgu")
				defer d.Stop()
				story := timeline(t, d)
				if !strings.Contains(story, nearGateway+" 0-10ms") || !strings.Contains(story, otherGateway+" 0-10ms") {
					return false
				}
				if g := servedBy(t, d); g != otherGateway {
					t.Errorf("%s serves, though %s is as near and emptier\n%s", g, otherGateway, story)
				}
				return true
			})
		})
		t.Run("near, the entry gateway chooses", func(t *testing.T) {
			waitForLatency(t, func(ms float64) bool { return ms < 10 })
			untilQuiet(t, "the entry gateway measured the other in its group", func() bool {
				waitForSessions(t, map[string]int32{nearGateway: 1, otherGateway: 0})
				// Where /sec:tls does not stand alone, FreeRDP begins with what its file says, Entra ID, and is asked to come again.
				d := land(t, "arm", "--gateway", nearGateway, "--", "/sec:tls:on,nla:on")
				defer d.Stop()
				if !strings.Contains(d.Output(), "SSL_REQUIRED_BY_SERVER") {
					t.Errorf("FreeRDP did not begin with Entra ID: %s", d.Output())
				}
				g, entry, otherMS := entryChoice(t, d)
				if otherMS >= 10 {
					return false
				}
				if g != otherGateway || entry != nearGateway || servedBy(t, d) != otherGateway {
					t.Errorf("%s serves, though %s is as near and emptier\n%s", g, otherGateway, timeline(t, d))
				}
				return true
			})
		})
	})
}

// untilQuiet repeats what a busy machine's clock may spoil.
func untilQuiet(t *testing.T, what string, try func() bool) {
	t.Helper()
	for range 5 {
		if try() {
			return
		}
	}
	t.Errorf("in five connects it was never the case that %s", what)
}

// secondGateway makes a gateway behind a slow line, and takes both away with the test.
func secondGateway(t *testing.T) *netlab.SlowLine {
	t.Helper()
	ctx := t.Context()
	var first rdv.Gateway
	if err := w.Client.Get(ctx, client.ObjectKey{Namespace: stage.Namespace, Name: nearGateway}, &first); err != nil {
		t.Fatal(err)
	}
	const name, portName = "slow", "https"
	second := &rdv.Gateway{ObjectMeta: meta(otherGateway), Spec: *first.Spec.DeepCopy()}
	second.Spec.Hostname, second.Spec.Region = name+".rdv.test", "far"
	create := func(o client.Object) {
		if err := w.Client.Create(ctx, o); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := w.Client.Delete(context.Background(), o); client.IgnoreNotFound(err) != nil {
				t.Error(err)
			}
		})
	}
	create(second)
	t.Cleanup(func() { // runs before the deletion above; so it deletes, too
		w.Client.Delete(context.Background(), second)
		if err := eventually(context.Background(), 2*time.Minute, func() error {
			if err := w.Client.Get(context.Background(), client.ObjectKeyFromObject(second), second); !apierrors.IsNotFound(err) {
				return fmt.Errorf("Gateway %s is still there: %v", otherGateway, err)
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
	})

	var svc corev1.Service
	if err := eventually(ctx, time.Minute, func() error {
		if err := w.Client.Get(ctx, client.ObjectKeyFromObject(second), &svc); err != nil {
			return err
		}
		if svc.Spec.ClusterIP == "" {
			return errors.New("its Service has no address yet")
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	cable, err := netlab.New(ctx, "slow", slowCable)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cable.Close() })
	line, err := cable.SlowLine(443, svc.Spec.ClusterIP+":443")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(line.Close)
	line.SetRoundTrip(farTrip)

	// The near gateway may go where nobody but its administrator knows the other to be: at no address in a status.
	reach := func(ctx context.Context, network string) error {
		_, err := w.Kubectl(ctx, "", "-n", stage.Namespace, "patch", "gateway", nearGateway, "--type=merge", "-p", `{"spec":{"network":`+network+`}}`)
		return err
	}
	if err := reach(ctx, `{"egress":{"allow":[{"to":[{"ipBlock":{"cidr":"`+cable.Addr+`/32"}}],"ports":[{"port":443}]}]}}`); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := reach(context.WithoutCancel(ctx), "null"); err != nil {
			t.Error(err)
		}
	})

	// The public name leads to the line, for people, agents and the other gateway alike.
	create(&corev1.Service{ObjectMeta: meta(name), Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Name: portName, Port: 443}}}})
	slice := &discoveryv1.EndpointSlice{ObjectMeta: meta(name), AddressType: discoveryv1.AddressTypeIPv4,
		Endpoints: []discoveryv1.Endpoint{{Addresses: []string{cable.Addr}}},
		Ports:     []discoveryv1.EndpointPort{{Name: new(portName), Port: new(int32(443))}}}
	slice.Labels = map[string]string{discoveryv1.LabelServiceName: name}
	create(slice)

	if err := eventually(ctx, 2*time.Minute, func() error {
		if err := w.Client.Get(ctx, client.ObjectKeyFromObject(second), second); err != nil {
			return err
		}
		if c := apimeta.FindStatusCondition(second.Status.Conditions, rdv.ConditionReady); c == nil || c.Status != "True" {
			return fmt.Errorf("Gateway %s is not ready: %+v", otherGateway, c)
		}
		all, err := w.alice.Gateways(ctx)
		if err == nil && len(all) != 2 {
			err = fmt.Errorf("the feed offers %+v", all)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return line
}

// land opens the machine's desktop and waits for its colour. Of args, those before "--" are rdv's, the others FreeRDP's.
func land(t *testing.T, mode string, args ...string) *stage.Desktop {
	t.Helper()
	rdvArgs, freerdp := args, []string(nil)
	for i, a := range args {
		if a == "--" {
			rdvArgs, freerdp = args[:i], args[i+1:]
		}
	}
	notYet(t, w.outColor)
	d, err := w.alice.ConnectWith(t.Context(), append([]string{"machine-desktop", "--mode", mode}, rdvArgs...), freerdp...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Stop)
	waitForDesktop(t, d, w.outColor)
	return d
}

func timeline(t *testing.T, d *stage.Desktop) string {
	t.Helper()
	out, err := w.alice.Rdv(t.Context(), "explain", d.ActivityID)
	if err != nil {
		t.Error(err)
	}
	return out
}

// story waits for a step of a connect's timeline.
func story(t *testing.T, d *stage.Desktop, what string, is func(trace.Event) bool) (found trace.Event) {
	t.Helper()
	if err := eventually(t.Context(), 20*time.Second, func() error {
		out, err := w.alice.Rdv(t.Context(), "explain", d.ActivityID, "-o", "json")
		if err != nil {
			return err
		}
		var events []trace.Event
		if err := json.Unmarshal([]byte(out), &events); err != nil {
			return err
		}
		for _, e := range events {
			if is(e) {
				found = e
				return nil
			}
		}
		return fmt.Errorf("the timeline does not say %s", what)
	}); err != nil {
		t.Fatalf("%v\n%s", err, timeline(t, d))
	}
	return found
}

// servedBy names the gateway on one of whose pods the legs were joined.
func servedBy(t *testing.T, d *stage.Desktop) string {
	t.Helper()
	e := story(t, d, "where the legs were joined", func(e trace.Event) bool { return e.Step == trace.StepJoin && e.Error == "" })
	var pods corev1.PodList
	if err := w.Client.List(t.Context(), &pods, client.InNamespace(stage.Namespace), client.HasLabels{rdv.LabelGateway}); err != nil {
		t.Fatal(err)
	}
	for _, p := range pods.Items {
		if instance := strings.ReplaceAll(p.Status.PodIP, ".", "-"); instance != "" && strings.HasSuffix(e.Detail, " "+instance) {
			return p.Labels[rdv.LabelGateway]
		}
	}
	t.Fatalf("no gateway pod is the one of %q", e.Detail)
	return ""
}

var entryStep = regexp.MustCompile(`^entry gateway (\S+) sends the client to (\S+) \(.*` + otherGateway + ` \d+\+\d+\+\d+ ([0-9.]+)ms`)

// entryChoice is what the broker told an entry gateway, and how far away that one found the other gateway to be.
func entryChoice(t *testing.T, d *stage.Desktop) (chosen, entry string, otherMS float64) {
	t.Helper()
	e := story(t, d, "what the entry gateway was told", func(e trace.Event) bool { return entryStep.MatchString(e.Detail) })
	m := entryStep.FindStringSubmatch(e.Detail)
	ms, err := strconv.ParseFloat(m[3], 64)
	if err != nil || e.Step != trace.StepDialGateway {
		t.Errorf("step %d says %q", e.Step, e.Detail)
	}
	return m[2], m[1], ms
}

var peerLatency = regexp.MustCompile(`(?m)^rendezvous_gateway_peer_latency_seconds\{gateway="` + otherGateway + `"\} (\S+)$`)

// waitForLatency waits until every pod of the near gateway has measured the other accordingly.
func waitForLatency(t *testing.T, ok func(ms float64) bool) {
	t.Helper()
	if err := eventually(t.Context(), 3*time.Minute, func() error {
		var pods corev1.PodList
		if err := w.Client.List(t.Context(), &pods, client.InNamespace(stage.Namespace), client.MatchingLabels{rdv.LabelGateway: nearGateway}); err != nil {
			return err
		}
		for _, p := range pods.Items {
			resp, err := http.Get("http://" + p.Status.PodIP + ":9091/metrics")
			if err != nil {
				return err
			}
			text, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			if err != nil {
				return err
			}
			m := peerLatency.FindSubmatch(text)
			if m == nil {
				return fmt.Errorf("%s has not measured %s", p.Name, otherGateway)
			}
			if s, err := strconv.ParseFloat(string(m[1]), 64); err != nil || !ok(s*1e3) {
				return fmt.Errorf("%s measured %s at %.1f ms (%v)", p.Name, otherGateway, s*1e3, err)
			}
		}
		if len(pods.Items) == 0 {
			return fmt.Errorf("%s has no pods", nearGateway)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

// waitForSessions waits until the feed counts just so many connections.
func waitForSessions(t *testing.T, want map[string]int32) {
	t.Helper()
	if err := eventually(t.Context(), time.Minute, func() error {
		all, err := w.alice.Gateways(t.Context())
		if err != nil {
			return err
		}
		for _, g := range all {
			if g.Connections != want[g.Name] {
				return fmt.Errorf("%s has %d connections, want %d", g.Name, g.Connections, want[g.Name])
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}
