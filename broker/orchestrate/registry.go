package orchestrate

import (
	"iter"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"rendezvous.dev/rendezvous/broker/model"
	"rendezvous.dev/rendezvous/broker/placement"
	"rendezvous.dev/rendezvous/wire/bus"
)

// registry is the live state of hosts and gateways: what they reported, and what was promised since. It is soft: a broker
// that starts learns it from the next reports.
type registry struct {
	// refusedLogins is told of logins that hosts on this broker refused; nil for nobody.
	refusedLogins func(reason string, n uint64)

	now    func() time.Time
	proofs proofSource
	// spelling gives the spelling of a user's name by which everything compares it.
	spelling func(string) string

	mu       sync.Mutex
	hosts    map[hostKey]*liveHost
	gateways map[gatewayKey]liveGateway
	onTheWay map[string]journey // by ticket id
}

type hostKey struct{ pool, host string }

// liveHost is one host's last report and what happened since.
type liveHost struct {
	report bus.HostReport
	proofs checked       // of report; never changed
	budget *rate.Limiter // of proofs that are yet to be looked at
	// sessions are those of report as placement takes them, for the SessionHost with the UID madeFor; nil until somebody
	// asks. Never changed.
	sessions []placement.Session
	madeFor  string
	at       time.Time // when it came; zero where there is none yet
	oldBoots []string  // of the agent's lives before this one, the latest last: what still comes of them is late
	booted   time.Time // when this life was first heard of
	// second is when two lives of the agent were last heard by turns, which one machine doesn't have.
	second time.Time
	// conn names the agent's newest connection, empty where this broker did not see it begin. The brokers tell each other.
	conn  string
	local bool // conn is on this broker
	gone  bool // conn has ended, or the agent said that it leaves; the next conn or a later report takes it back
	// lost is when conn ended. A report that comes at once after it was sent before it.
	lost time.Time
	// promises are sessions that the host accepted, or is being asked for, and has not reported yet.
	promises map[string]promise
	pushed   pushedConfig
}

type promise struct {
	user     string
	until    time.Time
	accepted bool // by the host
	// after is the sequence of the last report that did not know of it, 0 where the host didn't say.
	after uint64
}

// pushedConfig is the last configuration that this broker sent, so that it is not sent with every report meanwhile.
type pushedConfig struct {
	generation int64
	at         time.Time
}

// outlived is how long after an agent's restart the last reports of its life before may still come.
const outlived = 10 * time.Second

// maxBoots bounds the lives of an agent that are remembered.
const maxBoots = 16

// overtaken is how long the news of a connection's end may be ahead of the last report on it: they take different ways.
const overtaken = time.Second

func newRegistry(now func() time.Time) *registry {
	return &registry{now: now, spelling: func(name string) string { return name }, hosts: map[hostKey]*liveHost{}, gateways: map[gatewayKey]liveGateway{}, onTheWay: map[string]journey{}}
}

// host gives the entry of a host. mu is held.
func (r *registry) host(k hostKey) *liveHost {
	h := r.hosts[k]
	if h == nil {
		h = &liveHost{promises: map[string]promise{}}
		r.hosts[k] = h
	}
	return h
}

// report takes in an agent's report. A late one, of this life of the agent or the one before, is dropped.
func (r *registry) report(k hostKey, rep bus.HostReport) bool {
	rep = bounded(rep)
	proofs := r.check(k, rep.Sessions)
	r.mu.Lock()
	defer r.mu.Unlock()
	h := r.host(k)
	if !h.at.IsZero() {
		switch {
		case slices.Contains(h.oldBoots, rep.Boot) && r.now().Sub(h.booted) < outlived:
			return false
		case slices.Contains(h.oldBoots, rep.Boot):
			// It is not late, but lives: another machine has this one's key. Each is heard in its turn.
			h.second = r.now()
			fallthrough
		case rep.Boot != h.report.Boot:
			h.oldBoots = append(h.oldBoots[max(0, len(h.oldBoots)-maxBoots+1):], h.report.Boot)
			h.oldBoots = slices.DeleteFunc(h.oldBoots, func(b string) bool { return b == rep.Boot })
			h.booted = r.now()
			maps.DeleteFunc(h.promises, func(_ string, p promise) bool { return p.accepted }) // by one who is no more
		case rep.Sequence <= h.report.Sequence:
			return false
		}
	}
	if h.local && !h.at.IsZero() { // brokers count once between them, and nothing from before this one began
		r.countRefusedLogins(h.report, rep)
	}
	late := h.conn == "" && h.gone && r.now().Sub(h.lost) < overtaken
	h.report, h.proofs, h.sessions, h.at, h.gone = rep, proofs, nil, r.now(), rep.Leaving || late
	for _, s := range rep.Sessions {
		delete(h.promises, s.SessionID)
	}
	maps.DeleteFunc(h.promises, func(_ string, p promise) bool { return p.known(rep.Sequence) })
	return true
}

// countRefusedLogins counts what a host refused between two of its reports.
func (r *registry) countRefusedLogins(before, after bus.HostReport) {
	for _, reason := range bus.LoginReasons {
		n := after.LoginsRefused[reason]
		if before.Boot == after.Boot {
			n -= min(n, before.LoginsRefused[reason])
		}
		if n > 0 && r.refusedLogins != nil {
			r.refusedLogins(reason, n)
		}
	}
}

// presence takes in the begin or end of an agent's connection. An end counts only if it is the newest connection's:
// an agent that moves to another broker may be heard there before it is missed here.
func (r *registry) presence(k hostKey, conn string, local, connected bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	h := r.host(k)
	switch {
	case connected:
		h.conn, h.local = conn, local
		h.gone = h.report.Leaving
	case h.conn == conn || h.conn == "":
		h.conn, h.local, h.gone, h.lost = "", false, true, r.now()
	}
}

// connection names a host's newest connection, empty where none is known.
func (r *registry) connection(k hostKey) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	if h := r.hosts[k]; h != nil {
		return h.conn
	}
	return ""
}

// known says whether the report of that sequence tells all there is of an accepted session, even that it has ended.
func (p promise) known(sequence uint64) bool { return p.accepted && p.after > 0 && sequence > p.after }

// promise counts a session on a host that has yet to report it. Until settle is told whether the host accepted, and
// after which of its reports, it may come to nothing; then it is taken, or forgotten.
func (r *registry) promise(k hostKey, session, user string, until time.Time) (settle func(accepted bool, after uint64)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	h := r.host(k)
	h.promises[session] = promise{user: user, until: until}
	return func(accepted bool, after uint64) {
		r.mu.Lock()
		defer r.mu.Unlock()
		p, there := h.promises[session] // the host's report may have been faster than its answer
		p.accepted, p.after = accepted, after
		if !there || !accepted || p.known(h.report.Sequence) {
			delete(h.promises, session)
			return
		}
		h.promises[session] = p
	}
}

// connected says whether a host counts as there. mu is held.
func (r *registry) connected(h *liveHost, timeout time.Duration) bool {
	return r.connectedAt(h, timeout, r.now())
}

func (r *registry) connectedAt(h *liveHost, timeout time.Duration, now time.Time) bool {
	return h != nil && !h.at.IsZero() && !h.gone && now.Sub(h.at) < timeout
}

// mayReturn says whether a host that takes no session now is likely to in a moment: it isn't connected, or has only just
// come and is yet to be configured. unheard says that it may be there without this broker having heard of it.
func (r *registry) mayReturn(k hostKey, unheard bool) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	h := r.hosts[k]
	if h == nil || h.at.IsZero() {
		return unheard
	}
	coming, since := h.report.ConfigGeneration == 0, h.at
	if h.gone {
		coming, since = true, h.lost
	}
	return coming && !h.report.Leaving && r.now().Sub(since) < returning
}

// missed notes that a host's agent is nowhere to be asked, and gives the sequence of its last report: the next says that
// it is back.
func (r *registry) missed(k hostKey) (sequence uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	h := r.host(k)
	if !h.gone { // its connection may be there, and yet to subscribe
		h.gone, h.lost = true, r.now()
	}
	return h.report.Sequence
}

// without notes that a broker, and with it every connection to it, is gone.
func (r *registry) without(broker string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, h := range r.hosts {
		if name, _, _ := strings.Cut(h.conn, "/"); h.conn != "" && name == broker {
			h.conn, h.local, h.gone, h.lost = "", false, true, r.now()
		}
	}
}

// best finds the host to ask. asked has those that refused, with the sequence of the report after which to ask again, or
// 0 for never.
func (r *registry) best(pool *model.Pool, hosts []poolHost, user string, asked map[string]uint64) (placement.Candidate, bool, placement.Why) {
	rules := placement.Pool{
		Name: pool.Name, Personal: pool.Personal, Automatic: pool.Automatic, DepthFirst: pool.DepthFirst, MaxSessions: pool.MaxSessions,
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return placement.Best(rules, r.placementHosts(pool, hosts), user, func(host string) bool {
		after, was := asked[host]
		return was && (after == 0 || r.hosts[hostKey{pool.Name, host}].report.Sequence <= after)
	})
}

// poolHost is a host as declared, with its entry here.
type poolHost struct {
	*model.Host
	live *liveHost
}

// join gives each pool's hosts with their entries.
func (r *registry) join(declared map[string]*model.Host) map[string][]poolHost {
	r.mu.Lock()
	defer r.mu.Unlock()
	pools := map[string][]poolHost{}
	for _, h := range declared {
		pools[h.Pool] = append(pools[h.Pool], poolHost{h, r.host(hostKey{h.Pool, h.Name})})
	}
	return pools
}

// placementHosts gives hosts as placement takes them. mu is held, also while they are read.
func (r *registry) placementHosts(pool *model.Pool, hosts []poolHost) iter.Seq[placement.Host] {
	now := r.now()
	return func(yield func(placement.Host) bool) {
		for _, d := range hosts {
			p := placement.Host{Name: d.Name, AssignedUser: d.AssignedUser, Draining: d.Draining(now)}
			if p.Draining {
				p.DrainReason = d.Drain.Reason
			}
			if h := d.live; r.connectedAt(h, pool.HeartbeatTimeout, now) {
				p.Connected, p.Ready, p.Message = true, h.report.RDPReady, h.report.Message
				if p.Ready && h.report.Logins != (pool.Accounts != nil) {
					p.Ready, p.Message = false, otherLogin(pool)
				}
				p.Sessions, p.Reserved = h.taken(d.UID, now, r.spelling)
			}
			if !yield(p) {
				return
			}
		}
	}
}

// otherLogin says what is wrong where a host and its pool don't agree on how people log in.
func otherLogin(pool *model.Pool) string {
	if pool.Accounts != nil {
		return "the HostPool has spec.accounts, and the agent is not set up to log people in by their connections: run `agent service install` with a current agent, or wait until the pod is replaced"
	}
	return "the agent logs people in by their connections, and the HostPool has no spec.accounts"
}

// taken gives the sessions that a host, whose SessionHost has this UID, reports or has accepted since, and those that it
// is only being asked for.
func (h *liveHost) taken(uid string, now time.Time, spelling func(string) string) (sessions, reserved []placement.Session) {
	sessions = slices.Clip(h.placementSessions(uid, now, spelling))
	for id, p := range h.promises {
		switch {
		case now.After(p.until):
			delete(h.promises, id)
		case p.accepted:
			sessions = append(sessions, placement.Session{User: p.user, Sent: true})
		default:
			reserved = append(reserved, placement.Session{User: p.user, Sent: true})
		}
	}
	return sessions, reserved
}

// live gives a copy of a host's state.
func (r *registry) live(k hostKey, timeout time.Duration) (h liveHost, connected bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	e := r.hosts[k]
	if e == nil {
		return liveHost{}, false
	}
	c := *e
	c.promises = maps.Clone(e.promises)
	return c, r.connected(e, timeout)
}

// shouldPush says whether a configuration is to be sent now to a host on this broker, and notes that it was.
func (r *registry) shouldPush(k hostKey, generation int64, again time.Duration) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	h := r.hosts[k]
	if h == nil || h.at.IsZero() || !h.local || h.report.ConfigGeneration == generation {
		return false
	}
	now := r.now()
	if h.pushed.generation == generation && now.Sub(h.pushed.at) < again {
		return false
	}
	h.pushed = pushedConfig{generation, now}
	return true
}

// prune forgets hosts that are neither declared nor heard any more.
func (r *registry) prune(declared func(hostKey) bool, silence time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for k, h := range r.hosts {
		if !declared(k) && r.now().Sub(h.at) > silence {
			delete(r.hosts, k)
		}
	}
	for k, g := range r.gateways {
		if r.now().Sub(g.at) > silence {
			delete(r.gateways, k)
		}
	}
	now := r.now()
	maps.DeleteFunc(r.onTheWay, func(_ string, j journey) bool { return now.After(j.until) })
}

// counts of hosts that are there, on this broker, and of sessions that they report.
func (r *registry) counts() (hosts, local, sessions int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, h := range r.hosts {
		if h.at.IsZero() || h.gone {
			continue
		}
		hosts++
		sessions += int(sessionsOn(h.report))
		if h.local {
			local++
		}
	}
	return hosts, local, sessions
}
