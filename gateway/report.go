package gateway

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"google.golang.org/grpc"

	"rendezvous.dev/rendezvous/wire/admission"
	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/trace"
)

// Report is admission.AdmissionServer's. The relay opens each stream with a snapshot, so what was missed while no stream
// was up is made good.
func (g *Gateway) Report(stream grpc.BidiStreamingServer[admission.RelayReport, admission.RelayCommand]) error {
	commands := make(chan *admission.RelayCommand, 64)
	g.mu.Lock()
	g.commands = commands
	g.mu.Unlock()
	defer func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		if g.commands == commands {
			g.commands = nil
		}
	}()
	received := make(chan error, 1)
	go func() {
		for {
			m, err := stream.Recv()
			if err != nil {
				received <- err
				return
			}
			g.reported(m)
		}
	}()
	g.log.Info("the relay reports")
	for {
		select {
		case <-received: // the relay ended the stream; it dials again if it lives
			return nil
		case <-g.stopping:
			return nil
		case c := <-commands:
			if err := stream.Send(c); err != nil {
				return err
			}
		}
	}
}

// reported takes one message of the relay.
func (g *Gateway) reported(m *admission.RelayReport) {
	if batch := m.GetBatch(); batch != nil {
		for _, m := range batch.Reports {
			g.reported(m)
		}
		return
	}
	if step := m.GetStep(); step != nil {
		g.forward(step)
		return
	}
	g.mu.Lock()
	switch m := m.Report.(type) {
	case *admission.RelayReport_Snapshot:
		if m.Snapshot.Instance != g.instance {
			g.log.Error("the relay calls itself by another name; do both containers see the same POD_IP?", "relay", m.Snapshot.Instance, "gateway", g.instance)
		}
		g.draining = false // a relay that drains says so again after its snapshot
		clear(g.live)
		for _, s := range m.Snapshot.Sessions {
			g.live[s.SessionId] = s
		}
	case *admission.RelayReport_Started:
		g.live[m.Started.SessionId] = m.Started
	case *admission.RelayReport_Ended:
		delete(g.live, m.Ended.GetSession().GetSessionId())
	case *admission.RelayReport_Draining:
		g.draining = true
	}
	g.metrics.Sessions.Set(float64(len(g.live)))
	g.mu.Unlock()
	g.loadChanged()
}

// forward puts a step of the relay's on its workspace's timeline. Where the relay never heard the answer to its Connect, it
// knows neither workspace nor the ticket's activity.
func (g *Gateway) forward(s *admission.Step) {
	e := trace.Event{ActivityID: s.ActivityId, Step: int(s.Step), Component: "relay/" + g.instance, At: s.At.AsTime(),
		Duration: time.Duration(s.DurationMicros) * time.Microsecond, Detail: s.Detail, Error: s.Error}
	if s.ClientAddr != "" {
		g.forwardAnonymous(e, s.ClientAddr)
		return
	}
	g.mu.Lock()
	o := g.owners.get(s.ActivityId)
	w := g.workspaces[cmp.Or(s.Workspace, o.workspace)]
	g.mu.Unlock()
	if w == nil {
		return
	}
	if s.Workspace == "" {
		e.ActivityID = o.activity
	}
	if w.name == o.workspace {
		e.User = o.user
	}
	w.trace(e)
}

// forwardAnonymous tells every workspace of a client that was refused before anybody knew whose it is: its user, who is
// shown nothing but a failure by many clients, finds it by time and address.
func (g *Gateway) forwardAnonymous(e trace.Event, addr string) {
	e.ClientAddr = addr
	g.mu.Lock()
	all := slices.Collect(maps.Values(g.workspaces))
	g.mu.Unlock()
	for _, w := range all {
		w.trace(e)
	}
}

// end has the relay end a session, where it is the workspace's.
func (g *Gateway) end(workspace string, cmd bus.EndSession) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	s := g.live[cmd.SessionID]
	if s == nil || s.Workspace != workspace {
		return fmt.Errorf("gateway: workspace %s has no session %q on this pod", workspace, cmd.SessionID)
	}
	if g.commands == nil {
		return fmt.Errorf("gateway: the relay is away; session %q goes on", cmd.SessionID)
	}
	select {
	case g.commands <- &admission.RelayCommand{Command: &admission.RelayCommand_End{End: &admission.End{SessionId: cmd.SessionID, Reason: cmd.Reason}}}:
		return nil
	default:
		return fmt.Errorf("gateway: the relay takes no more commands; session %q goes on", cmd.SessionID)
	}
}

// loadChanged has the load reported soon.
func (g *Gateway) loadChanged() {
	select {
	case g.changed <- struct{}{}:
	default:
	}
}

// settle is how long changes are gathered before they are reported.
const settle = 100 * time.Millisecond

// reportLoad tells every workspace's brokers how busy this pod is, every reportEvery and soon after a change.
func (g *Gateway) reportLoad(ctx context.Context) {
	tick := time.NewTicker(g.reportEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-g.changed:
			if !sleep(ctx, settle) {
				return
			}
		}
		g.publishLoad()
	}
}

// publishLoad reports now. A bus that is away is passed over: an old report is worth nothing.
func (g *Gateway) publishLoad() (told []*workspace) {
	g.mu.Lock()
	report := bus.GatewayReport{Gateway: g.config.Gateway, Instance: g.instance, Sessions: int32(len(g.live)), Pending: g.connects.Load(),
		MaxSessions: g.config.MaxSessions, Draining: g.draining, At: time.Now()}
	for _, w := range g.workspaces {
		if nc := w.nc.Load(); nc != nil && nc.IsConnected() {
			told = append(told, w)
		}
	}
	g.owners.expire(time.Now())
	g.mu.Unlock()
	since := g.answeredSince()
	for _, w := range told {
		report.Latencies = w.latencies(since)
		w.publish(bus.GatewayReportSubject(report.Gateway, report.Instance), report)
	}
	return told
}

// leave reports, as the container ends, that this pod takes no new sessions: Kubernetes ends it before the relay, whose own
// word about its drain then finds nobody. A container that only restarts takes it back with its first report.
func (g *Gateway) leave() {
	g.mu.Lock()
	g.draining = true
	g.mu.Unlock()
	for _, w := range g.publishLoad() {
		w.nc.Load().FlushTimeout(time.Second)
	}
}

// Owners of activities are remembered for the time that a connect may take.
const (
	ownerLife = 5 * time.Minute
	maxOwners = 10000
)

// ownerTable remembers whose an activity is, for the events that the relay reports without knowing a user.
type ownerTable struct{ m map[string]owner }

type owner struct {
	activity  string // the ticket's own, or the same
	workspace string
	user      string
	at        time.Time
}

func (t *ownerTable) put(activity string, o owner) {
	if t.m == nil {
		t.m = map[string]owner{}
	}
	if len(t.m) < maxOwners {
		t.m[activity] = o
	}
}

func (t *ownerTable) get(activity string) owner { return t.m[activity] }

func (t *ownerTable) expire(now time.Time) {
	for id, o := range t.m {
		if now.Sub(o.at) > ownerLife {
			delete(t.m, id)
		}
	}
}
