package fleet

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf16"

	"golang.org/x/sync/errgroup"

	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/wiretest"
)

const (
	// connectTimeout is what a user would wait for.
	connectTimeout = 20 * time.Second
	// atOnce bounds the connects that are in work at one time while the fleet is built up.
	atOnce = 8
)

// user is somebody who works on a desktop.
type user struct {
	name  string
	token string
	tsgu  bool
}

// session is a user's.
type session struct {
	*stream
	user     user
	activity string
	host     string
	closing  atomic.Bool
	ended    chan struct{} // closed when both ways are over
	err      error         // set before ended closes
}

// users makes n users with tokens, half of whom come by MS-TSGU.
func (f *fleet) users(prefix string, n int) ([]user, error) {
	var all []user
	for i := range n {
		u := user{name: fmt.Sprintf("%s%03d@fleet.test", prefix, i), tsgu: i%2 == 0}
		var err error
		if u.token, err = f.provider.token(u.name); err != nil {
			return nil, err
		}
		all = append(all, u)
	}
	return all, nil
}

// connectAll opens a session for each user. Who does not get in tries again a second later, as people do, and is counted;
// who does not within patience fails the run.
func (f *fleet) connectAll(ctx context.Context, users []user) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(atOnce)
	for _, u := range users {
		g.Go(func() error {
			for first := time.Now(); ; {
				began := time.Now()
				s, err := f.connect(ctx, u)
				f.tally.connected(time.Since(began), err)
				if err == nil {
					f.keep(s)
					return nil
				}
				if time.Since(first) > patience || pause(ctx, time.Second) != nil {
					return fmt.Errorf("fleet: %s can't connect: %w", u.name, err)
				}
			}
		})
	}
	return g.Wait()
}

// connect downloads a file, opens the connection that it describes and starts to move data.
func (f *fleet) connect(ctx context.Context, u user) (*session, error) {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	file, err := f.download(ctx, u)
	if err != nil {
		return nil, err
	}
	return f.open(ctx, u, file)
}

// file is what a connection file says.
type file struct{ ticket, target, gateway string }

// download gets a fresh connection file.
func (f *fleet) download(ctx context.Context, u user) (file, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+brokerHost+brokerapi.PathResources+"/"+resourceName+".rdp?"+url.Values{"gateway": {gatewayName}}.Encode(), nil)
	if err != nil {
		return file{}, err
	}
	req.Header.Set("Authorization", "Bearer "+u.token)
	resp, err := f.http.Do(req)
	if err != nil {
		return file{}, fmt.Errorf("feed: %w", err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil || resp.StatusCode != http.StatusOK {
		return file{}, fmt.Errorf("feed: %s: %.300s %w", resp.Status, body, err)
	}
	said := properties(body)
	have := file{ticket: said["gatewayaccesstoken"], target: said["full address"], gateway: said["gatewayhostname"]}
	if have.ticket == "" || have.target == "" || have.gateway == "" {
		return file{}, fmt.Errorf("feed: the file lacks ticket, address or gateway: %v", said)
	}
	return have, nil
}

// properties reads an .rdp file: UTF-16 with a byte-order mark, NAME:TYPE:VALUE lines.
func properties(data []byte) map[string]string {
	units := make([]uint16, len(data)/2)
	for i := range units {
		units[i] = uint16(data[2*i]) | uint16(data[2*i+1])<<8
	}
	all := map[string]string{}
	for line := range strings.Lines(strings.TrimPrefix(string(utf16.Decode(units)), "\ufeff")) {
		if p := strings.SplitN(strings.TrimSpace(line), ":", 3); len(p) == 3 {
			all[p[0]] = p[2]
		}
	}
	return all
}

// open goes through the gateway to a host, checks that it is one of the pool's, and starts to move data.
func (f *fleet) open(ctx context.Context, u user, have file) (s *session, err error) {
	raw, err := f.dial(ctx, "tcp", have.gateway)
	if err != nil {
		return nil, fmt.Errorf("gateway: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { raw.SetDeadline(time.Now()) })
	defer func() {
		if !stop() && err == nil {
			err = ctx.Err()
		}
		if err != nil {
			raw.Close()
		}
	}()
	host, _, _ := strings.Cut(have.gateway, ":")
	outer := tls.Client(raw, &tls.Config{RootCAs: f.roots, ServerName: host})
	if err := outer.HandshakeContext(ctx); err != nil {
		return nil, fmt.Errorf("gateway: TLS: %w", err)
	}
	var way *wiretest.Client
	if u.tsgu {
		way, err = wiretest.OpenTSGU(outer, host, have.ticket, have.target)
	} else {
		way, err = wiretest.OpenRaw(outer, host, have.ticket)
	}
	if err != nil {
		return nil, fmt.Errorf("gateway: %w", err)
	}
	inner, err := negotiate(way, &tls.Config{RootCAs: f.roots, ServerName: have.target})
	if err != nil {
		return nil, fmt.Errorf("desktop: %w (activity %s)", err, way.Activity)
	}
	var seed [helloLength]byte
	rand.Read(seed[:])
	if _, err := inner.Write(seed[:]); err != nil {
		return nil, fmt.Errorf("desktop: %w (activity %s)", err, way.Activity)
	}
	s = &session{stream: newStream(inner, seed, true, f.tally), user: u, activity: way.Activity, ended: make(chan struct{})}
	for _, name := range inner.ConnectionState().PeerCertificates[0].DNSNames {
		if first, ok := strings.CutSuffix(name, "."+have.target); ok {
			s.host = first
		}
	}
	f.tally.live.Add(1)
	go f.run(s, way)
	return s, nil
}

// run moves a session's data until it ends, and says so where nobody wished it to.
func (f *fleet) run(s *session, way *wiretest.Client) {
	defer close(s.ended)
	defer f.tally.live.Add(-1)
	sent := make(chan error, 1)
	go func() {
		err := s.send()
		if err != nil {
			way.Conn.Close() // receive need not wait for what will not come
		}
		sent <- err
	}()
	s.err = s.receive()
	if s.err == nil && !s.closing.Load() {
		s.err = errors.New("the host ended the session")
	}
	if s.err != nil {
		way.Conn.Close()
	}
	s.err = errors.Join(s.err, <-sent)
	way.Close()
	if s.err != nil {
		f.tally.fault(fmt.Sprintf("%s on %s (activity %s, %d bytes checked)", s.user.name, s.host, s.activity, s.checked.Load()), s.err)
	}
}

// end has a session say its last word and waits for the host's.
func (s *session) end() error {
	if s.closing.CompareAndSwap(false, true) {
		close(s.stop)
	}
	<-s.ended
	return s.err
}

// keep adds a session to those that must live.
func (f *fleet) keep(s *session) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.sessions = append(f.sessions, s)
}

// release takes out sessions that match, n at most, longest-lived first.
func (f *fleet) release(n int, match func(*session) bool) (out []*session) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var rest []*session
	for _, s := range f.sessions {
		if len(out) < n && match(s) {
			out = append(out, s)
		} else {
			rest = append(rest, s)
		}
	}
	f.sessions = rest
	return out
}

// anyone matches every session.
func anyone(*session) bool { return true }

// replace ends sessions as their users would, and lets the same users come back: to pods that are there now. Those that
// were dropped come back too.
func (f *fleet) replace(ctx context.Context, old []*session) error {
	var all sync.WaitGroup
	for _, s := range old {
		all.Go(func() { s.end() })
	}
	all.Wait()
	var users []user
	for _, s := range old {
		users = append(users, s.user)
	}
	return f.connectAll(ctx, users)
}

// watch looks at sessions that stand still: what does not come is in nobody's count until it does.
func (f *fleet) watch(ctx context.Context) {
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		f.mu.Lock()
		var oldest int64
		for _, s := range f.sessions {
			select {
			case <-s.ended:
				continue
			default:
			}
			if at := s.heard.Load(); oldest == 0 || at < oldest {
				oldest = at
			}
		}
		f.mu.Unlock()
		now := time.Now()
		f.tally.mu.Lock()
		gap := time.Duration(0)
		if oldest > 0 {
			gap = max(0, now.Sub(time.Unix(0, oldest))-pace)
		}
		f.tally.stalled(now, gap)
		f.tally.mu.Unlock()
	}
}

// probe has somebody new come every half second, move a little data and go, while a step is under way.
func (f *fleet) probe(ctx context.Context) {
	var all sync.WaitGroup
	defer all.Wait()
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	for n := 0; ; n++ {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		u := f.guests[n%len(f.guests)]
		all.Go(func() {
			began := time.Now()
			s, err := f.connect(context.WithoutCancel(ctx), u)
			f.tally.connected(time.Since(began), err)
			if err == nil {
				time.Sleep(2 * pace)
				s.end()
			}
		})
	}
}
