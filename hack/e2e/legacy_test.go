package e2e

import (
	"fmt"
	"io"
	"maps"
	"net/http"
	"strconv"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"rendezvous.dev/rendezvous/wire/config"
)

// FreeRDP without WebSocket sees its desktop, and types, whether its two connections reach one pod of the gateway or two.
// Which they reach is the Service's to say, so it connects until both have been.
func TestLegacyTransport(t *testing.T) {
	const most = 16 // with two pods, one in 32,000 runs sees only one of the two ways
	t.Cleanup(func() {
		patchGateway(t, `{"spec":{"replicas":1}}`)
	})
	patchGateway(t, `{"spec":{"replicas":2}}`)
	pods := servingPods(t, 2)
	for i := 0; ; i++ {
		before := pairs(t, pods)
		d := showDesktop(t, "linux-desktop", "tsgu", w.podColor, "/gateway:type:http,no-websockets")
		answers(t, d, fmt.Sprintf("legacy-%d", i))
		assertTimeline(t, d.ActivityID)
		after := pairs(t, pods)
		if maps.Equal(after, before) {
			t.Fatal("the desktop is there, but no relay has paired channels: was it WebSocket?")
		}
		d.Stop()
		if after["here"] > 0 && after["peer"] > 0 {
			t.Logf("%d connects: %v", i+1, after)
			break
		}
		if i == most {
			t.Fatalf("%d connects, but not both ways were seen: %v", i, after)
		}
	}
	patchGateway(t, `{"spec":{"replicas":1}}`)
	servingPods(t, 1) // the others know one
}

// pairs is how many channels the relays have paired, by result.
func pairs(t *testing.T, pods map[string]corev1.Pod) map[string]int {
	t.Helper()
	sum := map[string]int{}
	for name, p := range pods {
		resp, err := http.Get(fmt.Sprintf("http://%s:%d/metrics", p.Status.PodIP, config.PortMetrics))
		if err != nil {
			t.Fatalf("metrics of %s: %v", name, err)
		}
		text, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil {
			t.Fatalf("metrics of %s: %v", name, err)
		}
		for line := range strings.Lines(string(text)) {
			rest, ok := strings.CutPrefix(line, `rendezvous_relay_pairs_total{result="`)
			if !ok {
				continue
			}
			result, value, _ := strings.Cut(strings.TrimSpace(rest), `"} `)
			n, err := strconv.Atoi(value)
			if err != nil {
				t.Fatal(err)
			}
			sum[result] += n
		}
	}
	return sum
}
