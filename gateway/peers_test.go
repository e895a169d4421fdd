package gateway

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/config"
)

func TestShortestOfTheLastRounds(t *testing.T) {
	const ms = time.Millisecond
	peer, gone := bus.GatewayAddress{Name: "b"}, bus.GatewayAddress{Name: "gone"}
	now := time.Unix(1000, 0)
	var p peers
	p.add(gone, ms, now)
	for i, step := range []struct{ trip, want time.Duration }{
		{30 * ms, 30 * ms}, {34 * ms, 30 * ms}, {5 * ms, 5 * ms}, // shorter at once
		{40 * ms, 5 * ms}, {41 * ms, 5 * ms}, {42 * ms, 40 * ms}, // longer when it lasts
	} {
		now = now.Add(time.Second)
		p.add(peer, step.trip, now)
		got := p.latencies([]bus.GatewayAddress{peer, gone, {Name: "never heard"}}, now.Add(-time.Second))
		if len(got) != 1 || got["b"] != step.want.Microseconds() {
			t.Errorf("round %d, %s: %v, want b %s", i, step.trip, got, step.want)
		}
	}
	p.forget(now.Add(-time.Second))
	if len(p.windows) != 1 {
		t.Errorf("%d peers are kept, want b alone", len(p.windows))
	}
}

// pingable is a gateway's public listener as far as measuring goes.
func pingable(t *testing.T, answer http.HandlerFunc) bus.GatewayAddress {
	s := httptest.NewTLSServer(answer)
	t.Cleanup(s.Close)
	addr := netip.MustParseAddrPort(s.Listener.Addr().String())
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
	return bus.GatewayAddress{Name: "b", Hostname: addr.Addr().String(), Port: int32(addr.Port()), CABundle: string(ca)}
}

func TestPing(t *testing.T) {
	var asked atomic.Int32
	good := pingable(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != pingPath {
			t.Errorf("asked for %s", r.URL.Path)
		}
		asked.Add(1)
		w.WriteHeader(http.StatusNoContent)
	})
	if trip, err := newPinger().ping(t.Context(), good); err != nil || trip <= 0 {
		t.Errorf("a good gateway: %s, %v", trip, err)
	}
	if asked.Load() != 1+pings {
		t.Errorf("%d requests, want %d", asked.Load(), 1+pings)
	}
	for what, c := range map[string]struct {
		peer bus.GatewayAddress
		want string
	}{
		"no gateway":         {pingable(t, http.NotFound), "404"},
		"an unknown CA":      {func() bus.GatewayAddress { g := good; g.CABundle = ""; return g }(), "certificate"},
		"a bundle of rubble": {func() bus.GatewayAddress { g := good; g.CABundle = "rubble"; return g }(), "no certificate"},
		"nobody":             {func() bus.GatewayAddress { g := good; g.Port = closedPort(t); return g }(), "refused"},
	} {
		if trip, err := newPinger().ping(t.Context(), c.peer); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %s, %v, want %s", what, trip, err, c.want)
		}
	}
}

func closedPort(t *testing.T) int32 {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return int32(l.Addr().(*net.TCPAddr).Port)
}

// Gateways of a workspace are measured and published with the load, those of each workspace to its own brokers only.
func TestPeersAreMeasuredAndPublished(t *testing.T) {
	dir := t.TempDir()
	one, two := newWorld(t, dir, "one"), newWorld(t, dir, "two")
	for w, names := range map[*world][]string{one: {"gateway-a", "b", "shared", "silent", "no label, and " + strings.Repeat("long", 100)}, two: {"gateway-a", "shared"}} {
		w.broker.QueueSubscribe(bus.SubjectGateways, bus.Brokers, func(m *nats.Msg) {
			var reply bus.GatewaysReply
			for _, n := range names {
				reply.Gateways = append(reply.Gateways, bus.GatewayAddress{Name: n, Hostname: n + ".example.com", Port: 443})
			}
			data, _ := json.Marshal(reply)
			m.Respond(data)
		})
		w.broker.Flush()
	}
	reports := map[*world]*atomic.Pointer[bus.GatewayReport]{one: {}, two: {}}
	for w, last := range reports {
		w.broker.Subscribe(bus.AllGatewayReports, func(m *nats.Msg) {
			var r bus.GatewayReport
			if err := json.Unmarshal(m.Data, &r); err != nil {
				t.Error(err)
			}
			last.Store(&r)
		})
		w.broker.Flush()
	}
	var silent atomic.Bool
	start(t, dir, []config.GatewayWorkspace{one.spec(), two.spec()}, func(o *Options) {
		o.MeasureEvery = 100 * time.Millisecond
		o.Ping = func(_ context.Context, peer bus.GatewayAddress) (time.Duration, error) {
			switch {
			case peer.Name == "gateway-a":
				t.Error("it measures the way to itself")
			case peer.Name == "silent" || silent.Load():
				return 0, errors.New("no answer")
			case peer.Name == "shared":
				return 20 * time.Millisecond, nil
			}
			return 3 * time.Millisecond, nil
		}
	})
	published := func(w *world, want map[string]int64) func() bool {
		return func() bool {
			r := reports[w].Load()
			return r != nil && fmt.Sprint(r.Latencies) == fmt.Sprint(want)
		}
	}
	eventually(t, "workspace one hears of b and shared", published(one, map[string]int64{"b": 3000, "shared": 20000}))
	eventually(t, "workspace two hears of shared", published(two, map[string]int64{"shared": 20000}))
	silent.Store(true)
	eventually(t, "who is silent for long has no latency", published(one, nil))
}
