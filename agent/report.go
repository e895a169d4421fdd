package agent

import (
	"context"
	"encoding/json"
	"runtime"
	"time"

	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/trace"
)

// Bounds of bus.HostConfig.ReportEvery, and its value before a broker has spoken.
const (
	reportEveryDefault = 10 * time.Second
	reportEveryMin     = time.Second
	reportEveryMax     = 5 * time.Minute
)

// keepReporting sends presence at each interval and at once after a change.
func (a *Agent) keepReporting(ctx context.Context) {
	for {
		a.publishReport()
		config, _ := a.ledger.inForce()
		every := reportEveryDefault
		if config.ReportEvery > 0 {
			every = min(max(time.Duration(config.ReportEvery)*time.Second, reportEveryMin), reportEveryMax)
		}
		tick := time.NewTimer(every)
		select {
		case <-ctx.Done():
			tick.Stop()
			return
		case <-a.changed:
		case <-tick.C:
		}
		tick.Stop()
	}
}

// publishReport sends one report, where there is a channel; the next channel begins with one.
func (a *Agent) publishReport() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.conn == nil || a.member == nil {
		return
	}
	a.sequence++
	config, stopping := a.ledger.inForce()
	r := bus.HostReport{
		Pool: a.member.Pool, Host: a.member.Host, Boot: a.boot, Sequence: a.sequence, ConfigGeneration: config.Generation,
		AgentVersion: a.opts.Version, OS: runtime.GOOS + "/" + runtime.GOARCH, RDPReady: a.probed.ready && config.Generation > 0, Message: a.probed.why,
		Sessions: a.ledger.Sessions(), Load: load(), Leaving: stopping, Logins: a.signIn != nil, LoginsRefused: a.signIn.refusals(),
	}
	switch {
	case r.RDPReady || r.Message != "":
	case !a.probed.ready:
		r.Message = "the RDP server has not been asked yet"
	default: // a session would be refused
		r.Message = "the brokers have not told the host its limits yet"
	}
	if c := a.probed.served; c != nil {
		r.CertificateFingerprint, r.CertificateNotAfter = fingerprint(c), c.NotAfter.UTC().Format(time.RFC3339)
	}
	data, err := json.Marshal(r)
	if err == nil {
		err = a.conn.Publish(bus.ReportSubject(r.Pool, r.Host), data)
	}
	if err != nil {
		a.log.Warn("report not sent", "error", err)
	}
}

// trace publishes one step of a connect. A step is worth having and never worth failing for.
func (a *Agent) trace(e trace.Event) {
	a.mu.Lock()
	conn, m := a.conn, a.member
	a.mu.Unlock()
	if conn == nil || m == nil {
		return
	}
	e.Component = "agent/" + m.Host
	data, err := json.Marshal(e)
	if err == nil {
		err = conn.Publish(bus.TraceSubject(m.id()), data)
	}
	if err != nil {
		a.log.Warn("trace not sent", "activity", e.ActivityID, "error", err)
	}
}
