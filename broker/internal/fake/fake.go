// Package fake is a declared world in memory, with the semantics of the API server that the broker counts on, for tests.
package fake

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strconv"
	"sync"
	"time"

	"rendezvous.dev/rendezvous/broker/model"
)

// World implements broker.Inventory.
type World struct {
	// Signer answers Sign; nil fails.
	Signer func(model.CertificateRequest) ([]byte, error)
	// Away, while set, fails every write.
	Away error
	// BeforeMark is called in MarkEnrolled before it looks, so that a test can interfere.
	BeforeMark func()

	mu       sync.Mutex
	snap     *model.Snapshot
	version  map[string]int
	agents   []AgentWrite
	gateways map[string]int32
	madeBy   map[string]string            // host to token hash
	accounts map[string]map[string]string // by pool
	signed   int
	onChange []func()
	made     int
}

// AgentWrite is one WriteAgent.
type AgentWrite struct {
	Host   string
	Status model.AgentStatus
}

// New makes a world. The snapshot's maps are copied, so that a change makes a new one.
func New(s *model.Snapshot) *World {
	w := &World{snap: clone(s), version: map[string]int{}, gateways: map[string]int32{}, madeBy: map[string]string{}}
	for name := range w.snap.Hosts {
		w.editHost(w.snap, name, func(*model.Host) {})
	}
	for name, p := range w.snap.Pools {
		if p.MaxHosts == 0 {
			c := *p
			c.MaxHosts = 100 // the API's default
			w.snap.Pools[name] = &c
		}
	}
	return w
}

func clone(s *model.Snapshot) *model.Snapshot {
	c := *s
	c.Pools, c.Hosts = maps.Clone(s.Pools), maps.Clone(s.Hosts)
	if c.Pools == nil {
		c.Pools = map[string]*model.Pool{}
	}
	if c.Hosts == nil {
		c.Hosts = map[string]*model.Host{}
	}
	return &c
}

// Edit changes the world and tells who wants to know.
func (w *World) Edit(f func(*model.Snapshot)) {
	w.mu.Lock()
	next := clone(w.snap)
	f(next)
	w.snap = next
	told := w.onChange
	w.mu.Unlock()
	for _, t := range told {
		t()
	}
}

// EditHost replaces a host by a changed copy; one that isn't there is made.
func (w *World) EditHost(name string, f func(*model.Host)) {
	w.Edit(func(s *model.Snapshot) { w.editHost(s, name, f) })
}

func (w *World) editHost(s *model.Snapshot, name string, f func(*model.Host)) {
	h := model.Host{Name: name}
	if old := s.Hosts[name]; old != nil {
		h = *old
	}
	f(&h)
	if h.UID == "" { // it is new
		w.made++
		h.UID = fmt.Sprint("uid-", w.made)
	}
	s.Hosts[name] = &h
	w.version[name]++
}

func (w *World) Snapshot() *model.Snapshot {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.snap
}

func (w *World) OnChange(f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.onChange = append(w.onChange, f)
}

func (w *World) Run(ctx context.Context) error { <-ctx.Done(); return nil }
func (w *World) Synced() bool                  { return true }
func (w *World) Heard() (time.Time, error)     { return time.Now(), w.Away }

func (w *World) CreateHost(_ context.Context, pool *model.Pool, host, tokenHash string) error {
	if w.Away != nil {
		return w.Away
	}
	if w.Snapshot().Hosts[host] != nil {
		return model.ErrExists
	}
	w.EditHost(host, func(h *model.Host) { h.Pool, h.MadeByToken = pool.Name, true })
	w.mu.Lock()
	w.madeBy[host] = tokenHash
	w.mu.Unlock()
	return nil
}

func (w *World) CountHosts(_ context.Context, tokenHash string, most int) (n int, err error) {
	if w.Away != nil {
		return 0, w.Away
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for host, hash := range w.madeBy {
		if hash == tokenHash && w.snap.Hosts[host] != nil {
			n++
		}
	}
	return min(n, most), nil
}

func (w *World) GetHost(_ context.Context, host string) (*model.Host, string, error) {
	if w.Away != nil {
		return nil, "", w.Away
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	h := w.snap.Hosts[host]
	if h == nil {
		return nil, "", model.ErrNotFound
	}
	return h, strconv.Itoa(w.version[host]), nil
}

func (w *World) MarkEnrolled(_ context.Context, host, version string, e model.Enrolment) error {
	if w.Away != nil {
		return w.Away
	}
	if w.BeforeMark != nil {
		w.BeforeMark()
	}
	conflict := false
	if w.Snapshot().Hosts[host] == nil {
		return model.ErrNotFound
	}
	w.Edit(func(s *model.Snapshot) {
		if conflict = strconv.Itoa(w.version[host]) != version; !conflict {
			w.editHost(s, host, func(h *model.Host) { h.Enrolment = e })
		}
	})
	if conflict {
		return model.ErrConflict
	}
	return nil
}

func (w *World) WriteAgent(_ context.Context, host string, status model.AgentStatus) error {
	if w.Away != nil {
		return w.Away
	}
	w.mu.Lock()
	w.agents = append(w.agents, AgentWrite{host, status})
	w.mu.Unlock()
	w.EditHost(host, func(h *model.Host) { h.Agent = &status })
	return nil
}

// AgentWrites gives all of WriteAgent so far.
func (w *World) AgentWrites() []AgentWrite {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]AgentWrite(nil), w.agents...)
}

func (w *World) Assign(_ context.Context, host, user string) (owner string, err error) {
	if w.Away != nil {
		return "", w.Away
	}
	w.Edit(func(s *model.Snapshot) {
		if s.Hosts[host] == nil {
			err = model.ErrNotFound
			return
		}
		if owner = s.Hosts[host].AssignedUser; owner == "" {
			owner = user
			w.editHost(s, host, func(h *model.Host) { h.AssignedUser = user })
		}
	})
	return owner, err
}

func (w *World) ReadAccounts(_ context.Context, pool string) (map[string]string, string, error) {
	if w.Away != nil {
		return nil, "", w.Away
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return maps.Clone(w.accounts[pool]), strconv.Itoa(len(w.accounts[pool])), nil
}

func (w *World) AddAccount(_ context.Context, pool, version, name, value string) error {
	if w.Away != nil {
		return w.Away
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if version != strconv.Itoa(len(w.accounts[pool])) {
		return model.ErrConflict
	}
	if w.accounts == nil {
		w.accounts = map[string]map[string]string{}
	}
	if w.accounts[pool] == nil {
		w.accounts[pool] = map[string]string{}
	}
	w.accounts[pool][name] = value
	return nil
}

func (w *World) WriteGateway(_ context.Context, gateway string, sessions int32, mine []model.GatewayInstance) error {
	if w.Away != nil {
		return w.Away
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.gateways[gateway] = sessions
	return nil
}

// GatewaySessions gives the last write for a gateway.
func (w *World) GatewaySessions(gateway string) (int32, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	n, ok := w.gateways[gateway]
	return n, ok
}

func (w *World) Sign(_ context.Context, r model.CertificateRequest) (chain, ca []byte, err error) {
	if w.Away != nil {
		return nil, nil, w.Away
	}
	if w.Signer == nil {
		return nil, nil, errors.New("nobody signs here")
	}
	w.mu.Lock()
	w.signed++
	w.mu.Unlock()
	chain, err = w.Signer(r)
	return chain, nil, err
}

// Signed counts certificates.
func (w *World) Signed() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.signed
}
