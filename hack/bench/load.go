package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

const (
	gib, mib, kib = 1 << 30, 1 << 20, 1 << 10
	// chunk is what one bulk write holds.
	chunk = 64 * kib
	// warmUp is left out of every measurement.
	warmUp = 300 * time.Millisecond
	// openers is how many sessions are opened at once.
	openers = 8
)

// usage is the CPU time of each process of a stack.
func usage(s stack) (each map[string]time.Duration, sum time.Duration, err error) {
	each = map[string]time.Duration{}
	for _, p := range s.processes() {
		d, err := p.cpu()
		if err != nil {
			return nil, 0, err
		}
		each[p.name] += d
		sum += d
	}
	return each, sum, nil
}

// memory is the resident memory of a stack, in bytes.
func memory(s stack) (sum int64, err error) {
	for _, p := range s.processes() {
		n, err := p.rss()
		if err != nil {
			return 0, err
		}
		sum += n
	}
	return sum, nil
}

// several opens n sessions, openers at a time. What was opened is returned with an error, too.
func (m *meet) several(ctx context.Context, c *contender, n int) ([]*session, error) {
	var (
		mu   sync.Mutex
		all  []*session
		errs error
		left atomic.Int64
		wg   sync.WaitGroup
	)
	left.Store(int64(n))
	for range openers {
		wg.Go(func() {
			for left.Add(-1) >= 0 && ctx.Err() == nil {
				s, _, err := m.open(c, false)
				mu.Lock()
				if err != nil {
					errs = err
					left.Store(0)
				} else {
					all = append(all, s)
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return all, errors.Join(errs, ctx.Err())
}

// closeAll closes sessions, openers at a time.
func closeAll(all []*session) {
	ch := make(chan *session)
	var wg sync.WaitGroup
	for range openers {
		wg.Go(func() {
			for s := range ch {
				s.close()
			}
		})
	}
	for _, s := range all {
		ch <- s
	}
	close(ch)
	wg.Wait()
}

// pause waits, unless ctx ends first.
func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// throughput is CPU seconds per GiB and MiB/s of streams that go one way as fast as they can.
func (m *meet) throughput(ctx context.Context, c *contender, streams int, down bool, d time.Duration) (cpu, rate float64, err error) {
	all, err := m.several(ctx, c, streams)
	defer func() { closeAll(all) }()
	if err != nil {
		return 0, 0, err
	}
	var moved, broken atomic.Int64
	var over atomic.Bool
	var wg sync.WaitGroup
	for _, s := range all {
		from, to := s.client, s.host
		if down {
			from, to = s.host, s.client
		}
		wg.Go(func() {
			buf := make([]byte, chunk)
			for !over.Load() {
				if _, err := from.Write(buf); err != nil {
					if !over.Load() {
						broken.Add(1)
					}
					return
				}
			}
		})
		wg.Go(func() {
			buf := make([]byte, chunk)
			for {
				n, err := to.Read(buf)
				moved.Add(int64(n))
				if err != nil {
					if !over.Load() {
						broken.Add(1)
					}
					return
				}
			}
		})
	}
	pause(ctx, warmUp)
	bytes, began := moved.Load(), time.Now()
	_, used, err := usage(c.stack)
	pause(ctx, d)
	bytes, took := moved.Load()-bytes, time.Since(began)
	_, after, err2 := usage(c.stack)
	over.Store(true)
	for _, s := range all {
		s.client.SetDeadline(time.Now().Add(200 * time.Millisecond)) // the writers have ended by then, and the pipes are empty
		s.host.SetDeadline(time.Now().Add(200 * time.Millisecond))
	}
	wg.Wait()
	if broken.Load() > 0 || bytes == 0 {
		err = errors.Join(err, fmt.Errorf("%s: %d of %d streams broke", c.name, broken.Load(), streams))
	}
	return (after - used).Seconds() / (float64(bytes) / gib), float64(bytes) / mib / took.Seconds(), errors.Join(err, err2)
}

// cellLen is the length of a message, and of the first part of a longer one: length, kind, time.
const cellLen = 64

// Kinds of messages.
const (
	ping   = 1 // is echoed as it is
	update = 2 // is read and dropped
)

func putCell(b []byte, kind byte, length int, at time.Duration) {
	binary.BigEndian.PutUint32(b, uint32(length))
	b[4] = kind
	binary.BigEndian.PutUint64(b[5:], uint64(at))
}

func parseCell(b []byte) (kind byte, length int, at time.Duration) {
	return b[4], int(binary.BigEndian.Uint32(b)), time.Duration(binary.BigEndian.Uint64(b[5:]))
}

// readCells gives each message's first part to f until the stream ends.
func readCells(s io.Reader, f func(cell []byte) error) error {
	r := bufio.NewReaderSize(s, 17*kib)
	var cell [cellLen]byte
	for {
		if _, err := io.ReadFull(r, cell[:]); err != nil {
			return err
		}
		if _, length, _ := parseCell(cell[:]); length > cellLen {
			if _, err := r.Discard(length - cellLen); err != nil {
				return err
			}
		}
		if err := f(cell[:]); err != nil {
			return err
		}
	}
}

// closedLoop is the round trips of one session that sends its next message when it has its last one back.
func (m *meet) closedLoop(ctx context.Context, c *contender, d time.Duration) ([]time.Duration, error) {
	s, _, err := m.open(c, false)
	if err != nil {
		return nil, err
	}
	defer s.close()
	go readCells(s.host, func(cell []byte) error {
		_, err := s.host.Write(cell)
		return err
	})
	var took []time.Duration
	var cell [cellLen]byte
	s.client.SetDeadline(time.Now().Add(d + patience))
	began := time.Now()
	for time.Since(began) < warmUp+d && ctx.Err() == nil {
		at := time.Now()
		putCell(cell[:], ping, cellLen, 0)
		if _, err := s.client.Write(cell[:]); err != nil {
			return nil, err
		}
		if _, err := io.ReadFull(s.client, cell[:]); err != nil {
			return nil, err
		}
		if at.Sub(began) > warmUp {
			took = append(took, time.Since(at))
		}
	}
	slices.Sort(took)
	s.host.SetDeadline(time.Now())
	return took, ctx.Err()
}

// office is sessions that people work in.
type office struct {
	sessions int
	// typing is how often each sends 64 bytes that come back.
	typing time.Duration
	// update bytes reach each client every updating; 0 is none.
	update   int
	updating time.Duration
	// greedy adds one session whose host sends as fast as it can.
	greedy bool
}

// worked is what an office saw.
type worked struct {
	trips []time.Duration // sorted
	cores float64         // CPU time of the stack per time
	rate  float64         // MiB/s of the greedy session
}

// work lets an office work. Messages leave on schedule, whether the last one has come back or not.
func (m *meet) work(ctx context.Context, c *contender, o office, d time.Duration) (*worked, error) {
	n := o.sessions
	if o.greedy {
		n++
	}
	all, err := m.several(ctx, c, n)
	defer func() { closeAll(all) }()
	if err != nil {
		return nil, err
	}
	var (
		wg    sync.WaitGroup
		mu    sync.Mutex
		trips []time.Duration
		moved atomic.Int64
		base  = time.Now()
		over  = make(chan struct{})
		first = new(error)
	)
	failed := func(err error) {
		select {
		case <-over:
		default:
			mu.Lock()
			*first = fmt.Errorf("%s: a session broke: %w", c.name, err)
			mu.Unlock()
		}
	}
	every := func(d time.Duration, f func() error) {
		select {
		case <-over:
			return
		case <-time.After(rand.N(d)):
		}
		t := time.NewTicker(d)
		defer t.Stop()
		for {
			if err := f(); err != nil {
				failed(err)
				return
			}
			select {
			case <-over:
				return
			case <-t.C:
			}
		}
	}
	if o.greedy {
		s := all[len(all)-1]
		wg.Go(func() {
			buf := make([]byte, chunk)
			for {
				if _, err := s.host.Write(buf); err != nil {
					failed(err)
					return
				}
			}
		})
		wg.Go(func() {
			buf := make([]byte, chunk)
			for {
				n, err := s.client.Read(buf)
				moved.Add(int64(n))
				if err != nil {
					failed(err)
					return
				}
			}
		})
	}
	for _, s := range all[:o.sessions] {
		wg.Go(func() { // the host answers
			failed(readCells(s.host, func(cell []byte) error {
				_, err := s.host.Write(cell)
				return err
			}))
		})
		if o.update > 0 {
			wg.Go(func() {
				buf := make([]byte, o.update)
				putCell(buf, update, len(buf), 0)
				every(o.updating, func() error {
					_, err := s.host.Write(buf)
					return err
				})
			})
		}
		wg.Go(func() { // the user types
			var cell [cellLen]byte
			every(o.typing, func() error {
				putCell(cell[:], ping, cellLen, time.Since(base))
				_, err := s.client.Write(cell[:])
				return err
			})
		})
		wg.Go(func() { // and sees what comes back
			var mine []time.Duration
			failed(readCells(s.client, func(cell []byte) error {
				kind, _, sent := parseCell(cell)
				if now := time.Since(base); kind == ping && sent > warmUp && now-sent > 0 {
					mine = append(mine, now-sent)
				}
				return nil
			}))
			mu.Lock()
			defer mu.Unlock()
			trips = append(trips, mine...)
		})
	}
	pause(ctx, warmUp)
	bytes, began := moved.Load(), time.Now()
	_, used, err := usage(c.stack)
	pause(ctx, d)
	bytes, took := moved.Load()-bytes, time.Since(began)
	_, after, err2 := usage(c.stack)
	close(over)
	for _, s := range all {
		s.client.SetDeadline(time.Now())
		s.host.SetDeadline(time.Now())
	}
	wg.Wait()
	slices.Sort(trips)
	return &worked{trips, (after - used).Seconds() / took.Seconds(), float64(bytes) / mib / took.Seconds()}, errors.Join(err, err2, *first, ctx.Err())
}

// settling is how long memory is left to settle before it is read.
const settling = 4 * time.Second

// idle is resident bytes per session of n idle sessions, fresh and after each has carried 128 KiB either way.
func (m *meet) idle(ctx context.Context, c *contender, n int) (fresh, used float64, err error) {
	warm, err := m.several(ctx, c, 20)
	closeAll(warm)
	if err != nil {
		return 0, 0, err
	}
	pause(ctx, time.Second)
	before, err := memory(c.stack)
	if err != nil {
		return 0, 0, err
	}
	all, err := m.several(ctx, c, n)
	defer func() { closeAll(all) }()
	if err != nil {
		return 0, 0, err
	}
	pause(ctx, settling)
	after, err := memory(c.stack)
	if err != nil {
		return 0, 0, err
	}
	if err := carry(all, 128*kib); err != nil {
		return 0, 0, fmt.Errorf("%s: %w", c.name, err)
	}
	pause(ctx, settling)
	later, err := memory(c.stack)
	return float64(after-before) / float64(n), float64(later-before) / float64(n), errors.Join(err, ctx.Err())
}

// carry sends n bytes both ways over each session, one way after the other.
func carry(all []*session, n int) error {
	var next atomic.Int64
	var wg sync.WaitGroup
	var failed atomic.Pointer[error]
	for range openers {
		wg.Go(func() {
			buf, sink := make([]byte, n), make([]byte, n)
			for {
				i := int(next.Add(1)) - 1
				if i >= len(all) {
					return
				}
				s := all[i]
				for _, way := range [][2]stream{{s.host, s.client}, {s.client, s.host}} {
					sent := make(chan error, 1)
					way[1].SetDeadline(time.Now().Add(patience))
					go func() {
						_, err := way[0].Write(buf)
						sent <- err
					}()
					_, err := io.ReadFull(way[1], sink)
					if err = errors.Join(err, <-sent); err != nil {
						failed.Store(&err)
						return
					}
					way[1].SetDeadline(time.Time{})
				}
			}
		})
	}
	wg.Wait()
	if err := failed.Load(); err != nil {
		return *err
	}
	return nil
}

// openedSessions is what it took to open and close sessions.
type openedSessions struct {
	rate    float64                  // per second
	cpu     map[string]time.Duration // per session, by process
	sum     time.Duration
	connect []time.Duration // sorted
}

// setUp opens and closes sessions, workers at a time.
func (m *meet) setUp(ctx context.Context, c *contender, resume bool, d time.Duration) (*openedSessions, error) {
	const workers = 4
	for range workers { // caches of TLS sessions fill
		s, _, err := m.open(c, resume)
		if err != nil {
			return nil, err
		}
		s.close()
	}
	full := clientLegs.full.Load() + hostLegs.full.Load()
	resumed := clientLegs.resumed.Load() + hostLegs.resumed.Load()
	before, beforeSum, err := usage(c.stack)
	if err != nil {
		return nil, err
	}
	var (
		wg   sync.WaitGroup
		mu   sync.Mutex
		o    = &openedSessions{}
		errs error
	)
	began := time.Now()
	for range workers {
		wg.Go(func() {
			for time.Since(began) < d && ctx.Err() == nil {
				s, took, err := m.open(c, resume)
				mu.Lock()
				if err != nil {
					errs = err
					mu.Unlock()
					return
				}
				o.connect = append(o.connect, took)
				mu.Unlock()
				s.close()
			}
		})
	}
	wg.Wait()
	took := time.Since(began)
	pause(ctx, 100*time.Millisecond) // what is left of closing
	after, afterSum, err := usage(c.stack)
	n := len(o.connect)
	if err = errors.Join(err, errs, ctx.Err()); err != nil || n == 0 {
		return nil, errors.Join(err, fmt.Errorf("%s: %d sessions opened", c.name, n))
	}
	full, resumed = clientLegs.full.Load()+hostLegs.full.Load()-full, clientLegs.resumed.Load()+hostLegs.resumed.Load()-resumed
	if resume && full > (full+resumed)/20 || !resume && resumed > 0 {
		return nil, fmt.Errorf("%s: of %d handshakes %d were resumed", c.name, full+resumed, resumed)
	}
	o.rate, o.sum, o.cpu = float64(n)/took.Seconds(), (afterSum-beforeSum)/time.Duration(n), map[string]time.Duration{}
	for name := range after {
		o.cpu[name] = (after[name] - before[name]) / time.Duration(n)
	}
	slices.Sort(o.connect)
	return o, nil
}
