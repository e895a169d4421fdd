package plan

import (
	"testing"
	"time"
)

func TestDepart(t *testing.T) {
	now := time.Unix(100000, 0)
	for name, tc := range map[string]struct {
		d    Departure
		why  Cause
		next time.Duration
	}{
		"people are there":          {Departure{Since: now.Add(-time.Minute), Deadline: time.Hour, Sessions: 2, Settled: true}, Waits, 59 * time.Minute},
		"nobody is":                 {Departure{Since: now, Deadline: time.Hour, Settled: true}, WasEmpty, 0},
		"somebody may be on a way":  {Departure{Since: now.Add(-time.Second), Deadline: time.Hour}, Waits, 9 * time.Second},
		"nobody came":               {Departure{Since: now.Add(-10 * time.Second), Deadline: time.Hour}, WasEmpty, 0},
		"it is late":                {Departure{Since: now.Add(-time.Hour), Deadline: time.Hour, Sessions: 2}, WasDeadline, 0},
		"there is no time":          {Departure{Since: now, Sessions: 2}, WasDeadline, 0},
		"told not to wait":          {Departure{Since: now, Deadline: time.Hour, Sessions: 2, Skip: true}, WasSkipped, 0},
		"all goes":                  {Departure{Since: now, Deadline: time.Hour, Sessions: 2, NamespaceGoing: true}, WasNamespaceGoing, 0},
		"nobody counts":             {Departure{Since: now, Deadline: time.Hour, Sessions: 2, Uncounted: true}, WasUncounted, 0},
		"a clock that is behind":    {Departure{Since: now.Add(time.Minute), Deadline: time.Hour, Sessions: 1}, Waits, 61 * time.Minute},
		"a deadline before settles": {Departure{Since: now, Deadline: time.Second}, Waits, time.Second},
	} {
		why, next := Depart(tc.d, now)
		if why != tc.why || next != tc.next {
			t.Errorf("%s: %v, %v; want %v, %v", name, why, next, tc.why, tc.next)
		}
	}
}
