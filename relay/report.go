package relay

import (
	"context"
	"math/rand/v2"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	"rendezvous.dev/rendezvous/wire/admission"
	"rendezvous.dev/rendezvous/wire/refusal"
	"rendezvous.dev/rendezvous/wire/trace"
)

// maxReports bounds what waits for a gateway container that is away. What is lost of sessions, the next snapshot makes
// good; what is lost of timelines stays lost.
const maxReports = 2048

// reporter tells the gateway container what happens, on one stream that it dials again whenever it breaks. Nothing waits for it.
type reporter struct {
	r     *Relay
	queue chan *admission.RelayReport
	lost  chan struct{} // of one: a session's report was dropped, a snapshot is due
	// strangers bounds what is reported of them.
	strangers rate

	mu       sync.Mutex
	deadline *timestamppb.Timestamp // set while draining
}

func newReporter(r *Relay) *reporter {
	return &reporter{r: r, queue: make(chan *admission.RelayReport, maxReports), lost: make(chan struct{}, 1), strangers: rate{most: maxStrangers}}
}

func (p *reporter) started(s *session) {
	p.put(&admission.RelayReport{Report: &admission.RelayReport_Started{Started: s.report()}}, true)
}

func (p *reporter) ended(s *session, reason string) {
	p.put(&admission.RelayReport{Report: &admission.RelayReport_Ended{Ended: &admission.Ended{Session: s.report(), Reason: reason}}}, true)
}

func (p *reporter) draining(deadline time.Time) {
	p.mu.Lock()
	p.deadline = timestamppb.New(deadline)
	p.mu.Unlock()
	p.put(p.drainReport(), true)
}

func (p *reporter) drainReport() *admission.RelayReport {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.deadline == nil {
		return nil
	}
	return &admission.RelayReport{Report: &admission.RelayReport_Draining{Draining: &admission.Draining{Deadline: p.deadline}}}
}

func (p *reporter) step(activity, workspace string, n int, at time.Time, d time.Duration, detail string, code refusal.Code) {
	p.put(&admission.RelayReport{Report: &admission.RelayReport_Step{Step: &admission.Step{ActivityId: activity, Workspace: workspace,
		Step: uint32(n), Name: trace.Titles[n], At: timestamppb.New(at), DurationMicros: d.Microseconds(), Detail: detail, Error: string(code)}}}, false)
}

// maxStrangers refusals of clients that nobody knows are reported in a second, so that a flood of them is not passed on to
// every broker. The log has them all.
const maxStrangers = 10

// reportStranger reports the refusal of a client that nobody knows yet, for its user to find by time and address, or, where
// the address is a node's, by time alone.
func (r *Relay) reportStranger(v *visitor, activity string, e *refusal.Error) {
	addr, detail := trace.UnknownClient, e.Message
	if e.Code == refusal.TicketInvalid { // its message may be of the stranger's making, and others read this
		detail = "The ticket was refused: it is altered, or another workspace's. Download the connection file again."
	}
	if a := v.comparable(); a.IsValid() && !v.tcp.unbelieved {
		addr = a.String()
	}
	if v.tcp.peer || v.tcp.joining || !r.reports.strangers.allow(time.Now()) {
		return
	}
	r.reports.put(&admission.RelayReport{Report: &admission.RelayReport_Step{Step: &admission.Step{ActivityId: activity,
		Step: trace.StepDialGateway, Name: trace.Titles[trace.StepDialGateway], At: timestamppb.New(v.accepted), DurationMicros: time.Since(v.accepted).Microseconds(),
		Detail: detail, Error: string(e.Code), ClientAddr: addr}}}, false)
}

// rate lets through so many events in a second.
type rate struct {
	most int

	mu     sync.Mutex
	second int64
	seen   int
}

func (r *rate) allow(now time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if s := now.Unix(); s != r.second {
		r.second, r.seen = s, 0
	}
	r.seen++
	return r.seen <= r.most
}

func (p *reporter) put(m *admission.RelayReport, matters bool) {
	select {
	case p.queue <- m:
	default:
		if matters {
			select {
			case p.lost <- struct{}{}:
			default:
			}
		}
	}
}

// run keeps a stream up until ctx is done, and then sends what is left.
func (p *reporter) run(ctx context.Context) {
	const first, last = 100 * time.Millisecond, 2 * time.Second
	delay := first
	for {
		began := time.Now()
		err := p.stream(ctx)
		if ctx.Err() != nil {
			return
		}
		if time.Since(began) > last {
			delay = first
		}
		p.r.log.Warn("no stream to the gateway container", "error", err, "again", delay.String())
		select {
		case <-ctx.Done():
			return
		case <-time.After(delay + rand.N(delay)):
		}
		delay = min(2*delay, last)
	}
}

// stream opens one stream, sends a snapshot, then what is queued, and obeys commands, until the stream breaks or stop is done.
func (p *reporter) stream(stop context.Context) error {
	ctx, cancel := context.WithCancel(context.WithoutCancel(stop))
	defer cancel()
	stream, err := p.r.admission.Report(ctx)
	if err != nil {
		return err
	}
	if err := p.snapshot(stream); err != nil {
		return err
	}
	received := make(chan error, 1)
	go func() { received <- p.obey(stream) }()
	for {
		select {
		case err := <-received:
			return err
		case <-p.lost:
			if err := p.snapshot(stream); err != nil {
				return err
			}
		case m := <-p.queue:
			select {
			case <-time.After(gather):
			case <-stop.Done():
			}
			if err := stream.Send(p.batch(m)); err != nil {
				return err
			}
		case <-stop.Done():
			return p.finish(stream, received)
		}
	}
}

// Reports go in batches: each message wakes two processes, and a connect has six reports.
const (
	gather     = 20 * time.Millisecond
	maxBatched = 256
)

// batch is first and what else is queued.
func (p *reporter) batch(first *admission.RelayReport) *admission.RelayReport {
	all := []*admission.RelayReport{first}
	for len(all) < maxBatched {
		select {
		case m := <-p.queue:
			all = append(all, m)
			continue
		default:
		}
		break
	}
	if len(all) == 1 {
		return first
	}
	return &admission.RelayReport{Report: &admission.RelayReport_Batch{Batch: &admission.Batch{Reports: all}}}
}

// finish sends what is queued and waits a moment for it to arrive.
func (p *reporter) finish(stream grpc.BidiStreamingClient[admission.RelayReport, admission.RelayCommand], received <-chan error) error {
	for len(p.queue) > 0 {
		if err := stream.Send(p.batch(<-p.queue)); err != nil {
			return err
		}
	}
	if err := stream.CloseSend(); err != nil {
		return err
	}
	select {
	case err := <-received:
		return err
	case <-time.After(time.Second):
		return nil
	}
}

func (p *reporter) snapshot(stream grpc.BidiStreamingClient[admission.RelayReport, admission.RelayCommand]) error {
	snap := &admission.Snapshot{Instance: p.r.instance}
	for _, s := range p.r.live() {
		snap.Sessions = append(snap.Sessions, s.report())
	}
	if err := stream.Send(&admission.RelayReport{Report: &admission.RelayReport_Snapshot{Snapshot: snap}}); err != nil {
		return err
	}
	if m := p.drainReport(); m != nil {
		return stream.Send(m)
	}
	return nil
}

func (p *reporter) obey(stream grpc.BidiStreamingClient[admission.RelayReport, admission.RelayCommand]) error {
	for {
		m, err := stream.Recv()
		if err != nil {
			return err
		}
		if e := m.GetEnd(); e != nil {
			reason := e.Reason
			if reason == "" {
				reason = "An administrator ended the session."
			}
			go p.r.End(e.SessionId, refusal.EndedByAdmin, reason)
		}
	}
}
