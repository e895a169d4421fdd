package orchestrate

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"rendezvous.dev/rendezvous/broker/model"
	"rendezvous.dev/rendezvous/wire/bus"
)

const (
	// gather is how long changes are gathered before they are written.
	gather = 500 * time.Millisecond
	// heartbeatEvery is how often the time of the last heartbeat is written while nothing else changes.
	heartbeatEvery = 5 * time.Minute
	// absence is how long an agent may be off the bus, as when it moves to another broker, before that is written.
	absence      = 5 * time.Second
	writeTimeout = 10 * time.Second
	// gatewayWriteEvery bounds writes of one gateway's sessions.
	gatewayWriteEvery = 30 * time.Second
)

// statusWriter writes what is worth keeping of the live state. It is coarse on purpose: not one write per heartbeat.
type statusWriter struct {
	b    *Orchestrator
	wake chan struct{}

	mu       sync.Mutex
	dirty    map[hostKey]bool
	absentAt map[hostKey]time.Time

	gatewayWritten map[string]time.Time // owned by run
}

func newStatusWriter(b *Orchestrator) *statusWriter {
	return &statusWriter{
		b: b, wake: make(chan struct{}, 1), dirty: map[hostKey]bool{}, absentAt: map[hostKey]time.Time{},
		gatewayWritten: map[string]time.Time{},
	}
}

// changed notes that a host's state may be worth a write.
func (w *statusWriter) changed(k hostKey) {
	w.mu.Lock()
	w.dirty[k] = true
	w.mu.Unlock()
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// left notes that a host's connection to this replica ended. Unless it turns up again, that is worth a write.
func (w *statusWriter) left(k hostKey) { time.AfterFunc(absence, func() { w.changed(k) }) }

// lookForSilence notes hosts that the status calls connected and that are not. The replica that they were on may be
// gone, so any replica may write it; each first gives hosts the time to report to it.
func (w *statusWriter) lookForSilence(snap *model.Snapshot) {
	now := w.b.o.Now()
	for _, h := range snap.Hosts {
		k := hostKey{h.Pool, h.Name}
		timeout := snap.Pools[h.Pool].HeartbeatTimeout
		_, connected := w.b.live.live(k, timeout)
		w.mu.Lock()
		if connected || h.Agent == nil || !h.Agent.Connected || now.Sub(w.b.started) < timeout {
			delete(w.absentAt, k)
			w.mu.Unlock()
			continue
		}
		since, known := w.absentAt[k]
		if !known {
			since, w.absentAt[k] = now, now
		}
		w.mu.Unlock()
		if now.Sub(since) >= absence {
			w.changed(k)
		}
	}
	select {
	case w.wake <- struct{}{}: // for the gateways
	default:
	}
}

// run writes until ctx ends.
func (w *statusWriter) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-w.wake:
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(gather):
		}
		w.mu.Lock()
		dirty := w.dirty
		w.dirty = map[hostKey]bool{}
		w.mu.Unlock()
		snap := w.b.o.Source.Snapshot()
		for k := range dirty {
			w.writeHost(ctx, snap, k)
		}
		w.writeGateways(ctx, snap)
	}
}

// writeHost writes a host's state where it is this replica's to write and differs from what stands there.
func (w *statusWriter) writeHost(ctx context.Context, snap *model.Snapshot, k hostKey) {
	pool, host := declared(snap, k)
	if host == nil {
		return
	}
	live, connected := w.b.live.live(k, pool.HeartbeatTimeout)
	if connected && !live.local {
		return
	}
	var last model.AgentStatus
	if host.Agent != nil {
		last = *host.Agent
	}
	want := agentStatus(live, connected, last, hostConfig(pool, host, w.b.o.Now()))
	if want.RDPReady && live.report.Logins != (pool.Accounts != nil) {
		want.RDPReady, want.Message = false, otherLogin(pool)
	}
	want.SecondMachine = last.SecondMachine
	if live.second.Sub(last.SecondMachine) >= heartbeatEvery {
		want.SecondMachine = live.second.Truncate(time.Second)
	}
	if want.DrainAcknowledged && connected {
		want.AcknowledgedGeneration = host.Generation
	}
	if !worthWriting(last, want) {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	err := w.b.o.Writer.WriteAgent(ctx, k.host, want)
	w.count("sessionhost", err)
	if err != nil && !errors.Is(err, model.ErrNotFound) {
		w.b.o.Log.Warn("can't write a host's state; trying again", "host", k.host, "error", err)
		time.AfterFunc(absence, func() { w.changed(k) })
	}
}

// agentStatus is what to write of a host: of an absent one, what was known last.
func agentStatus(h liveHost, connected bool, last model.AgentStatus, cfg bus.HostConfig) model.AgentStatus {
	if !connected {
		last.Connected, last.RDPReady, last.Message = false, false, ""
		return last
	}
	r := h.report
	s := model.AgentStatus{
		Connected: true, LastHeartbeat: h.at.Truncate(time.Second), Version: r.AgentVersion, OS: r.OS, RDPReady: r.RDPReady, Message: r.Message,
		Sessions: sessionsOn(r), CertificateFingerprint: r.CertificateFingerprint,
		// An agent that holds the configuration with the drain refuses new sessions.
		DrainAcknowledged: cfg.Draining && r.ConfigGeneration == cfg.Generation,
	}
	if t, err := time.Parse(time.RFC3339, r.CertificateNotAfter); err == nil {
		s.CertificateExpires = t
	}
	return s
}

// sessionsOn counts the sessions that a host knows to be there.
func sessionsOn(r bus.HostReport) (n int32) {
	for _, s := range r.Sessions {
		if !s.Assumed {
			n++
		}
	}
	return n
}

// worthWriting says whether two states differ in more than a recent heartbeat.
func worthWriting(last, want model.AgentStatus) bool {
	if want.LastHeartbeat.Sub(last.LastHeartbeat) >= heartbeatEvery {
		return true
	}
	if !last.CertificateExpires.Equal(want.CertificateExpires) || !last.SecondMachine.Equal(want.SecondMachine) {
		return true
	}
	last.LastHeartbeat, last.CertificateExpires, last.SecondMachine = want.LastHeartbeat, want.CertificateExpires, want.SecondMachine
	return last != want
}

// writeGateways writes the sessions through each gateway, by pod, seldom.
func (w *statusWriter) writeGateways(ctx context.Context, snap *model.Snapshot) {
	now := w.b.o.Now()
	young := now.Sub(w.b.started) < gatewaySilence // not everyone has been heard yet
	for _, g := range snap.Gateways {
		mine := w.b.live.instances(w.b.o.Workspace, g)
		written, sessions := ownInstances(w.b.o.Workspace, g)
		for _, i := range mine {
			sessions += i.Sessions
		}
		switch {
		case young && (len(mine) == 0 || sessions < g.Sessions):
			continue
		case sessions == g.Sessions && slices.Equal(mine, written), now.Sub(w.gatewayWritten[g.Name]) < gatewayWriteEvery:
			continue
		}
		ctx, cancel := context.WithTimeout(ctx, writeTimeout)
		err := w.b.o.Writer.WriteGateway(ctx, g.Name, sessions, mine)
		cancel()
		w.count("gateway", err)
		w.gatewayWritten[g.Name] = now
		if err != nil && !errors.Is(err, model.ErrNotFound) {
			w.b.o.Log.Warn("can't write a gateway's sessions", "gateway", g.Name, "error", err)
		}
	}
}

func (w *statusWriter) count(object string, err error) {
	result := "ok"
	if err != nil {
		result = "error"
	}
	w.b.o.Metrics.Writes.WithLabelValues(object, result).Inc()
}
