package orchestrate

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"rendezvous.dev/rendezvous/wire/bus"
)

// Brokers that meet tell each other of the agents on them. Without it a broker that has just started, or whose agents
// were back before its routes were, would know the others' hosts from their next reports only, ten seconds later.

const (
	subjectHello = "rdv.hello"
	subjectHosts = "rdv.hosts" // and a broker's name: for that one alone
	helloEvery   = time.Second
	// estranged is after which silence a broker counts as gone, with the connections to it. When it is heard again, it is
	// met anew: reports were missed.
	estranged = 3 * helloEvery
	// hostsMessageSize is what a message holds, in bytes, or else a single report.
	hostsMessageSize = 256 << 10
)

// helloMessage says that a broker is there. Boot tells its lives apart.
type helloMessage struct {
	Broker string    `json:"broker"`
	Boot   time.Time `json:"boot"`
}

// hostsMessage is a part of the agents on a broker, and what they said last.
type hostsMessage struct {
	Broker string            `json:"broker"`
	Hosts  []json.RawMessage `json:"hosts"` // hostSeen
}

// hostSeen is an agent's connection and its last report. Of the report's sessions only checked facts are told: of one
// without a good proof no more than that it takes a place.
type hostSeen struct {
	Conn   string         `json:"conn"`
	Report bus.HostReport `json:"report"`
}

// peers are the brokers that were met.
type peers struct {
	mu  sync.Mutex
	met map[string]peer
}

type peer struct {
	boot  time.Time
	heard time.Time
}

// meet notes a hello, and says whether it is one to answer.
func (p *peers) meet(h helloMessage, now time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	last, known := p.met[h.Broker]
	p.met[h.Broker] = peer{h.Boot, now}
	return !known || !last.boot.Equal(h.Boot)
}

// lost gives the brokers that were not heard for too long, once.
func (p *peers) lost(now time.Time) (names []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for name, last := range p.met {
		if now.Sub(last.heard) > estranged {
			names = append(names, name)
			delete(p.met, name)
		}
	}
	return names
}

// sayHello tells the others, again and again, that this broker is there, and sees who is not any more.
func (b *Orchestrator) sayHello(ctx context.Context) {
	tick := time.NewTicker(helloEvery)
	defer tick.Stop()
	for {
		b.publish(subjectHello, helloMessage{b.o.Name, b.started})
		for _, name := range b.peers.lost(b.o.Now()) {
			b.o.Log.Info("lost a broker", "broker", name)
			b.live.without(name)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (b *Orchestrator) onHello(_ context.Context, m *nats.Msg) {
	var h helloMessage
	if !b.decode(m, &h) || h.Broker == b.o.Name || !b.peers.meet(h, b.o.Now()) {
		return
	}
	b.tellStanding(h.Broker)
	mine := b.live.mine()
	b.o.Log.Info("met a broker", "broker", h.Broker, "hosts", len(mine))
	msg, size := hostsMessage{Broker: b.o.Name}, 0
	send := func() {
		if len(msg.Hosts) > 0 {
			b.publish(fmt.Sprintf("%s.%s", subjectHosts, h.Broker), msg)
		}
		msg.Hosts, size = nil, 0
	}
	for _, s := range mine {
		data, err := s.encode()
		if err != nil {
			b.o.Log.Error("can't introduce a host", "pool", s.Report.Pool, "host", s.Report.Host, "error", err)
			continue
		}
		if size+len(data) > hostsMessageSize {
			send()
		}
		msg.Hosts, size = append(msg.Hosts, data), size+len(data)
	}
	send()
}

// encode gives at most maxIntroduced bytes: the sessions that have no room are told as places that are taken, and whose
// they are by the host's next report.
func (s hostSeen) encode() ([]byte, error) {
	for named := len(s.Report.Sessions); ; named /= 2 {
		for i := range s.Report.Sessions[named:] {
			told := &s.Report.Sessions[named+i]
			*told = anonymous(told)
		}
		data, err := json.Marshal(s)
		if err != nil || len(data) <= maxIntroduced || named == 0 {
			return data, err
		}
	}
}

func (b *Orchestrator) onHosts(_ context.Context, m *nats.Msg) {
	var msg hostsMessage
	if !b.decode(m, &msg) {
		return
	}
	for _, data := range msg.Hosts {
		var s hostSeen
		if err := json.Unmarshal(data, &s); err != nil {
			b.o.Log.Warn("message is not what its subject says", "subject", m.Subject, "error", err)
			continue
		}
		b.live.introduce(hostKey{s.Report.Pool, s.Report.Host}, s)
	}
}

// mine lists the agents on this broker.
func (r *registry) mine() (all []hostSeen) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, h := range r.hosts {
		if h.local && !h.gone && !h.at.IsZero() {
			all = append(all, hostSeen{h.conn, h.checkedReport()})
		}
	}
	return all
}

// introduce takes another broker's word on an agent of its own, unless the news that this one has left was faster.
func (r *registry) introduce(k hostKey, s hostSeen) {
	r.mu.Lock()
	h := r.host(k)
	left := h.conn == "" && r.now().Sub(h.lost) <= overtaken
	if h.conn == "" && !left {
		h.conn, h.local = s.Conn, false
	}
	over := slices.Contains(h.oldBoots, s.Report.Boot) // of a life that ended before the one that is known here
	r.mu.Unlock()
	if !left && !over {
		r.report(k, s.Report)
	}
}
