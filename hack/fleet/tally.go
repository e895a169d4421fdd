package fleet

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// tally is what all streams and connects add to, as totals and second by second.
type tally struct {
	checked atomic.Uint64 // bytes, both ways, both ends
	live    atomic.Int64

	mu      sync.Mutex
	row     row // what has happened since the last take
	seconds []second
	began   time.Time
	faults  []string // in words, the first few
}

// row is what one step counted.
type row struct {
	dropped, wrong   int
	connects, failed int
	slowest          time.Duration // connect
	stall            time.Duration
}

// second is one point of the plot.
type second struct {
	Live    int64         `json:"live"`
	Checked uint64        `json:"checkedBytes"`
	Stall   time.Duration `json:"stallNanoseconds"`
}

// took notes a chunk that came late by gap, or not late.
func (t *tally) took(now time.Time, gap time.Duration, bytes int) {
	t.checked.Add(uint64(bytes))
	t.mu.Lock()
	defer t.mu.Unlock()
	t.stalled(now, gap)
}

// stalled notes that a session has stood still for gap. mu is held.
func (t *tally) stalled(now time.Time, gap time.Duration) {
	t.row.stall = max(t.row.stall, gap)
	if p := t.at(now); p != nil {
		p.Stall = max(p.Stall, gap)
	}
}

// at is the point of a moment; nil before the clock runs. mu is held.
func (t *tally) at(now time.Time) *second {
	if t.began.IsZero() {
		return nil
	}
	n := max(int(now.Sub(t.began)/time.Second), 0)
	for len(t.seconds) <= n {
		t.seconds = append(t.seconds, second{Live: t.live.Load(), Checked: t.checked.Load()})
	}
	return &t.seconds[n]
}

// start lets the clock run.
func (t *tally) start() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.began, t.row = time.Now(), row{}
}

// take gives what was counted since the last time.
func (t *tally) take() row {
	t.mu.Lock()
	defer t.mu.Unlock()
	r := t.row
	t.row = row{}
	return r
}

// fault notes a session that ended though nobody wished it to.
func (t *tally) fault(who string, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if errors.Is(err, errWrong) {
		t.row.wrong++
	} else {
		t.row.dropped++
	}
	t.say("%s: %v", who, err)
}

// connected notes a connect that was tried.
func (t *tally) connected(took time.Duration, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err != nil {
		t.row.failed++
		t.say("a new connect failed after %s: %v", took.Round(time.Millisecond), err)
		return
	}
	t.row.connects++
	t.row.slowest = max(t.row.slowest, took)
}

// say keeps what happened in words. mu is held.
func (t *tally) say(format string, args ...any) {
	const most = 40
	if len(t.faults) < most {
		at := ""
		if !t.began.IsZero() {
			at = fmt.Sprintf("%.1f s: ", time.Since(t.began).Seconds())
		}
		t.faults = append(t.faults, at+fmt.Sprintf(format, args...))
	}
}
