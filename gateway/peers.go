package gateway

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"

	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/identity"
)

const (
	// pingPath answers 204 on a gateway's own listener.
	pingPath = "/rendezvous/v1/ping"
	// pings are counted in one round, after one that warms the connection. The shortest is the round's: noise only adds.
	pings = 3
	// rounds are looked back on: the shortest of their round trips counts. A way that becomes shorter is so at once; one
	// that becomes longer is believed after this many rounds.
	rounds = 3
	// pingTimeout bounds a round with one peer.
	pingTimeout = 5 * time.Second
	// pingsAtOnce bounds the peers that are measured at one time.
	pingsAtOnce = 8
	// maxPeers bounds the gateways of one workspace that are measured.
	maxPeers = 256
	// maxHostname bounds a gateway's host name, in bytes, as DNS does.
	maxHostname = 253
	// measureSoon is how long to wait for a first answer of a broker that was just joined.
	measureSoon = 2 * time.Second
)

// window is the last rounds with one peer.
type window struct {
	trips []time.Duration // the newest last
	at    time.Time       // of the newest
}

func (w *window) add(trip time.Duration, now time.Time) {
	w.trips = append(w.trips, trip)
	w.trips, w.at = w.trips[max(0, len(w.trips)-rounds):], now
}

func (w *window) shortest() time.Duration {
	shortest := w.trips[0]
	for _, t := range w.trips {
		shortest = min(shortest, t)
	}
	return shortest
}

// peers is the way from this pod to other gateways, as clients would go it: by their public names. Workspaces may share
// gateways; each is measured once.
type peers struct {
	mu      sync.Mutex
	windows map[bus.GatewayAddress]*window
}

// add notes one round with a peer.
func (p *peers) add(peer bus.GatewayAddress, trip time.Duration, now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.windows == nil {
		p.windows = map[bus.GatewayAddress]*window{}
	}
	w := p.windows[peer]
	if w == nil {
		w = &window{}
		p.windows[peer] = w
	}
	w.add(trip, now)
}

// latencies gives the round trips to those of the gateways that answered since, in microseconds.
func (p *peers) latencies(of []bus.GatewayAddress, since time.Time) map[string]int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	found := map[string]int64{}
	for _, g := range of {
		if w := p.windows[g]; w != nil && w.at.After(since) {
			found[g.Name] = w.shortest().Microseconds()
		}
	}
	return found
}

// forget drops who has not answered since.
func (p *peers) forget(since time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for peer, w := range p.windows {
		if !w.at.After(since) {
			delete(p.windows, peer)
		}
	}
}

// patienceWithPeers is how many intervals a peer may be silent before what was measured of it no longer counts.
const patienceWithPeers = rounds + 1

func (g *Gateway) answeredSince() time.Time {
	return time.Now().Add(-patienceWithPeers * g.measureEvery)
}

// measurePeers measures the way to the other gateways, in intervals that differ by up to a fifth, so that pods which
// began together don't go on together.
func (g *Gateway) measurePeers(ctx context.Context) {
	wait := time.Duration(0)
	for sleep(ctx, wait) {
		wait = measureSoon
		if g.measureRound(ctx) {
			wait = g.measureEvery + time.Duration((rand.Float64()-0.5)*0.4*float64(g.measureEvery))
		}
		wait = min(wait, g.measureEvery*6/5)
	}
}

// measureRound asks brokers for the gateways there are, and measures each once. It says whether a broker answered.
func (g *Gateway) measureRound(ctx context.Context) (answered bool) {
	g.mu.Lock()
	self := g.config.Gateway
	workspaces := make([]*workspace, 0, len(g.workspaces))
	for _, w := range g.workspaces {
		workspaces = append(workspaces, w)
	}
	g.mu.Unlock()
	todo := map[bus.GatewayAddress]bool{}
	for _, w := range workspaces {
		others, err := w.others(ctx, self)
		if err != nil {
			w.log.Debug("no word of other gateways", "error", err)
			continue
		}
		answered = true
		w.peers.Store(&others)
		for _, peer := range others {
			todo[peer] = true
		}
	}
	var work sync.WaitGroup
	slots := make(chan struct{}, pingsAtOnce)
	for peer := range todo {
		slots <- struct{}{}
		work.Go(func() {
			defer func() { <-slots }()
			g.measurePeer(ctx, peer)
		})
	}
	work.Wait()
	since := g.answeredSince()
	g.peers.forget(since)
	g.metrics.PeerLatency.Reset()
	for _, w := range workspaces {
		for name, micros := range w.latencies(since) {
			g.metrics.PeerLatency.WithLabelValues(name).Set(float64(micros) / 1e6)
		}
	}
	g.loadChanged()
	return answered
}

func (g *Gateway) measurePeer(ctx context.Context, peer bus.GatewayAddress) {
	ctx, cancel := context.WithTimeout(ctx, pingTimeout)
	defer cancel()
	trip, err := g.ping(ctx, peer)
	if err != nil {
		if ctx.Err() != context.Canceled {
			g.metrics.Pings.WithLabelValues("error").Inc()
			g.log.Info("another gateway does not answer", "gateway", peer.Name, "hostname", peer.Hostname, "error", err)
		}
		return
	}
	g.metrics.Pings.WithLabelValues("ok").Inc()
	g.peers.add(peer, trip, time.Now())
}

// others asks a broker for the workspace's gateways, and leaves out this one.
func (w *workspace) others(ctx context.Context, self string) ([]bus.GatewayAddress, error) {
	nc := w.nc.Load()
	if nc == nil || !nc.IsConnected() {
		return nil, errors.New("the bus is not connected")
	}
	data, err := json.Marshal(bus.GatewaysRequest{Gateway: self})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, pingTimeout)
	defer cancel()
	m, err := nc.RequestWithContext(ctx, bus.SubjectGateways, data)
	if err != nil {
		return nil, err
	}
	var reply bus.GatewaysReply
	if err := json.Unmarshal(m.Data, &reply); err != nil {
		return nil, err
	}
	var others []bus.GatewayAddress
	for _, a := range reply.Gateways {
		// Its name becomes a metric's label.
		if a.Name != self && len(others) < maxPeers && identity.IsLabel(a.Name) && len(a.Hostname) <= maxHostname {
			others = append(others, a)
		}
	}
	return others, nil
}

// latencies gives the round trips to the workspace's other gateways that answered since.
func (w *workspace) latencies(since time.Time) map[string]int64 {
	others := w.peers.Load()
	if others == nil {
		return nil
	}
	return w.g.peers.latencies(*others, since)
}

// pinger measures round trips over connections that stay open for one round. It keeps TLS sessions: the next round's
// handshake is cheap for both sides.
type pinger struct{ sessions tls.ClientSessionCache }

func newPinger() *pinger { return &pinger{tls.NewLRUClientSessionCache(maxPeers)} }

// ping gives the shortest round trip to a peer's own listener.
func (p *pinger) ping(ctx context.Context, peer bus.GatewayAddress) (time.Duration, error) {
	conf := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: peer.Hostname, ClientSessionCache: p.sessions}
	if peer.CABundle != "" {
		conf.RootCAs = x509.NewCertPool()
		if !conf.RootCAs.AppendCertsFromPEM([]byte(peer.CABundle)) {
			return 0, fmt.Errorf("the CA bundle of gateway %s holds no certificate", peer.Name)
		}
	}
	addr := net.JoinHostPort(peer.Hostname, strconv.Itoa(int(peer.Port)))
	t := &http.Transport{TLSClientConfig: conf, MaxConnsPerHost: 1}
	defer t.CloseIdleConnections()
	var shortest time.Duration
	for i := range 1 + pings {
		began := time.Now()
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+addr+pingPath, nil)
		if err != nil {
			return 0, err
		}
		res, err := t.RoundTrip(req)
		if err != nil {
			return 0, err
		}
		io.Copy(io.Discard, io.LimitReader(res.Body, 4<<10))
		res.Body.Close()
		if res.StatusCode/100 != 2 {
			return 0, fmt.Errorf("%s answered %s to %s", addr, res.Status, pingPath)
		}
		if took := time.Since(began); i == 1 || i > 1 && took < shortest {
			shortest = took
		}
	}
	return shortest, nil
}
