package orchestrate

import (
	"maps"
	"sync"
	"time"

	"rendezvous.dev/rendezvous/broker/model"
	"rendezvous.dev/rendezvous/broker/placement"
	"rendezvous.dev/rendezvous/wire/bus"
)

// gatewaySilence is how long a gateway pod's last report counts.
const gatewaySilence = 30 * time.Second

// registry is the live state of hosts and gateways: what they reported, and what was promised since. It is soft: a broker
// that starts learns it from the next reports.
type registry struct {
	now func() time.Time

	mu       sync.Mutex
	hosts    map[hostKey]*liveHost
	gateways map[gatewayKey]liveGateway
}

type hostKey struct{ pool, host string }

type gatewayKey struct{ gateway, instance string }

type liveGateway struct {
	report bus.GatewayReport
	at     time.Time
}

// liveHost is one host's last report and what happened since.
type liveHost struct {
	report  bus.HostReport
	at      time.Time // when it came; zero where there is none yet
	oldBoot string    // of the agent's life before this one: what still comes of it is late
	// conn names the agent's newest connection, empty where this broker did not see it begin. The brokers tell each other.
	conn  string
	local bool // conn is on this broker
	gone  bool // conn has ended, or the agent said that it leaves; a further report takes it back
	// promises are sessions that the host accepted, or is being asked for, and has not reported yet.
	promises map[string]promise
	pushed   pushedConfig
}

type promise struct {
	user     string
	until    time.Time
	accepted bool // by the host
}

// pushedConfig is the last configuration that this broker sent, so that it is not sent with every report meanwhile.
type pushedConfig struct {
	generation int64
	at         time.Time
}

func newRegistry(now func() time.Time) *registry {
	return &registry{now: now, hosts: map[hostKey]*liveHost{}, gateways: map[gatewayKey]liveGateway{}}
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
	r.mu.Lock()
	defer r.mu.Unlock()
	h := r.host(k)
	if !h.at.IsZero() {
		switch {
		case rep.Boot == h.oldBoot:
			return false
		case rep.Boot != h.report.Boot:
			h.oldBoot = h.report.Boot
		case rep.Sequence <= h.report.Sequence:
			return false
		}
	}
	h.report, h.at, h.gone = rep, r.now(), rep.Leaving
	for _, s := range rep.Sessions {
		delete(h.promises, s.SessionID)
	}
	return true
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
	case h.conn == conn || h.conn == "":
		h.conn, h.local, h.gone = "", false, true
	}
}

// promise counts a session on a host that has yet to report it. Until settle is told whether the host accepted, it may
// come to nothing; then it is taken, or forgotten.
func (r *registry) promise(k hostKey, session, user string, until time.Time) (settle func(accepted bool)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	h := r.host(k)
	h.promises[session] = promise{user: user, until: until}
	return func(accepted bool) {
		r.mu.Lock()
		defer r.mu.Unlock()
		p, there := h.promises[session] // the host's report may have been faster than its answer
		if p.accepted = accepted; there && accepted {
			h.promises[session] = p
			return
		}
		delete(h.promises, session)
	}
}

// connected says whether a host counts as there. mu is held.
func (r *registry) connected(h *liveHost, timeout time.Duration) bool {
	return h != nil && !h.at.IsZero() && !h.gone && r.now().Sub(h.at) < timeout
}

// placementHosts joins what is declared of a pool's hosts with what is live.
func (r *registry) placementHosts(pool *model.Pool, declared []*model.Host) []placement.Host {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := r.now()
	hosts := make([]placement.Host, 0, len(declared))
	for _, d := range declared {
		p := placement.Host{Name: d.Name, AssignedUser: d.AssignedUser, Draining: d.Draining(now)}
		if p.Draining {
			p.DrainReason = d.Drain.Reason
		}
		if h := r.hosts[hostKey{pool.Name, d.Name}]; r.connected(h, pool.HeartbeatTimeout) {
			p.Connected, p.Ready, p.Message = true, h.report.RDPReady, h.report.Message
			for _, s := range h.report.Sessions {
				p.Sessions = append(p.Sessions, placement.Session{User: s.User, Disconnected: s.State == bus.SessionDisconnected})
			}
			for id, pr := range h.promises {
				if now.After(pr.until) {
					delete(h.promises, id)
					continue
				}
				if pr.accepted {
					p.Sessions = append(p.Sessions, placement.Session{User: pr.user})
				} else {
					p.Reserved = append(p.Reserved, placement.Session{User: pr.user})
				}
			}
		}
		hosts = append(hosts, p)
	}
	return hosts
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
}

func (r *registry) gatewayReport(k gatewayKey, rep bus.GatewayReport) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.gateways[k] = liveGateway{rep, r.now()}
}

// gatewayLoad sums a gateway's pods: live sessions, and those on their way. heard is false where no pod reports.
func (r *registry) gatewayLoad(gateway string) (sessions, pending int32, heard bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for k, g := range r.gateways {
		if k.gateway == gateway && r.now().Sub(g.at) < gatewaySilence {
			sessions, pending, heard = sessions+g.report.Sessions, pending+g.report.Pending, true
		}
	}
	return sessions, pending, heard
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
		sessions += len(h.report.Sessions)
		if h.local {
			local++
		}
	}
	return hosts, local, sessions
}
