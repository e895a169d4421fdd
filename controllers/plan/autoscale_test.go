package plan

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

func TestAutoscale(t *testing.T) {
	now := time.Date(2026, 5, 4, 12, 0, 0, 0, time.UTC)
	const perHost = 4
	policy := Autoscaling{Min: 1, Max: 5, FreePlaces: 3, Delay: 10 * time.Minute, PerHost: perHost}
	share := Autoscaling{Min: 0, Max: 50, FreePercent: 25, Delay: 10 * time.Minute, PerHost: perHost}
	// serving gives hosts with so many sessions each.
	serving := func(sessions ...int32) (hosts []Host) {
		for i, n := range sessions {
			hosts = append(hosts, Host{Name: fmt.Sprintf("p-%d", i), Serving: true, Sessions: n, Free: perHost - n, Places: perHost})
		}
		return hosts
	}
	coming := func(hosts []Host) []Host {
		return append(hosts, Host{Name: "p-9", Coming: true})
	}
	long := now.Add(-11 * time.Minute)
	for name, tc := range map[string]struct {
		policy  Autoscaling
		hosts   []Host
		others  Host
		before  Scaled
		desired int32
		limited bool
		since   time.Time
	}{
		"nothing yet":                           {policy: policy, desired: 1},
		"nothing yet, but a minimum":            {policy: Autoscaling{Min: 3, Max: 5, FreePlaces: 1, PerHost: perHost}, desired: 3},
		"enough":                                {policy: policy, hosts: serving(1), desired: 1},
		"too few free":                          {policy: policy, hosts: serving(2), desired: 2},
		"a new one is on its way":               {policy: policy, hosts: coming(serving(4)), desired: 2},
		"several at once":                       {policy: Autoscaling{Max: 9, FreePlaces: 10, PerHost: perHost}, hosts: serving(4), desired: 4},
		"at the maximum":                        {policy: policy, hosts: serving(4, 4, 4, 4, 4), desired: 5, limited: true},
		"above a maximum that was lowered":      {policy: policy, hosts: serving(4, 4, 4, 4, 4, 4), desired: 5, limited: true},
		"one that gives nothing does not count": {policy: policy, hosts: append(serving(4), Host{Name: "p-9", Serving: true}), desired: 3},
		"others' places count":                  {policy: policy, hosts: serving(4), others: Host{Free: 3, Places: 8}, desired: 1},
		"too many, since now":                   {policy: policy, hosts: serving(0, 0), desired: 2, since: now},
		"too many, for long":                    {policy: policy, hosts: serving(0, 0), before: Scaled{true, 2, long, 1}, desired: 1},
		"too many, but more were needed":        {policy: policy, hosts: serving(0, 0, 0), before: Scaled{true, 3, long, 2}, desired: 2},
		"no longer too many":                    {policy: policy, hosts: serving(1, 4), before: Scaled{true, 2, long, 1}, desired: 2},
		"decided, not seen yet":                 {policy: policy, hosts: serving(2), before: Scaled{Decided: true, Desired: 2}, desired: 2},
		"decided, not gone yet":                 {policy: policy, hosts: serving(0, 1), before: Scaled{Decided: true, Desired: 1}, desired: 1},
		"a user's own is no free place":         {policy: Autoscaling{Max: 5, FreePlaces: 1, PerHost: 1}, hosts: []Host{{Name: "p-0", Serving: true, Assigned: true, Places: 1}}, desired: 2},
		"a user's own never goes":               {policy: Autoscaling{Max: 5, FreePlaces: 1, PerHost: 1}, hosts: []Host{{Name: "p-0", Serving: true, Assigned: true, Places: 1}, {Name: "p-1", Serving: true, Free: 1, Places: 1}}, before: Scaled{true, 2, long, 2}, desired: 2},
		"a share of none":                       {policy: share, desired: 1},
		"a share of all":                        {policy: share, hosts: serving(4, 4, 3, 0), desired: 4},
		"a share, grown with what it adds":      {policy: share, hosts: serving(4, 4, 4, 4), desired: 6},
	} {
		t.Run(name, func(t *testing.T) {
			got := Autoscale(tc.policy, tc.hosts, tc.others, tc.before, now)
			if got.Desired != tc.desired || got.Limited != tc.limited || !got.Since.Equal(tc.since) {
				t.Errorf("got %+v, want %d hosts, limited %v, since %v", got, tc.desired, tc.limited, tc.since)
			}
		})
	}
}

// simulated is a pool under users who come and go. Its hosts take a while to come, or never do.
type simulated struct {
	rng      *rand.Rand
	policy   Autoscaling
	personal bool
	now      time.Time
	hosts    []Host
	born     map[string]time.Time
	broken   map[string]bool
	state    Scaled
}

const comingPatience = 5 * time.Minute

func (s *simulated) look() {
	for i := range s.hosts {
		h := &s.hosts[i]
		age := s.now.Sub(s.born[h.Name])
		h.Serving = age >= 90*time.Second && !s.broken[h.Name]
		h.Coming = !h.Serving && age < comingPatience
		h.Free, h.Places = 0, 0
		if h.Serving {
			h.Places, h.Free = s.policy.PerHost, s.policy.PerHost-h.Sessions
			if h.Assigned {
				h.Free = 0
			}
		}
		h.Drained = h.Retiring
	}
}

// pass decides, checks what was decided, and carries it out.
func (s *simulated) pass(t *testing.T) ScaleDecision {
	t.Helper()
	s.look()
	d := Autoscale(s.policy, s.hosts, Host{}, s.state, s.now)
	if d.Desired < s.policy.Min || d.Desired > s.policy.Max {
		t.Fatalf("%d hosts are desired, of %d to %d", d.Desired, s.policy.Min, s.policy.Max)
	}
	changes := Hosts("p", d.Desired, s.hosts, func(string) bool { return false })
	for _, name := range changes.Delete {
		i := slices.IndexFunc(s.hosts, func(h Host) bool { return h.Name == name })
		if h := s.hosts[i]; h.Sessions > 0 || h.Assigned || !h.Retiring || !h.Drained {
			t.Fatalf("removes %+v", h)
		}
		s.hosts = slices.Delete(s.hosts, i, i+1)
	}
	for i := range s.hosts {
		s.hosts[i].Retiring = slices.Contains(changes.Retire, s.hosts[i].Name)
		if h := s.hosts[i]; h.Retiring && h.Assigned {
			t.Fatalf("retires somebody's own %+v", h)
		}
	}
	for _, name := range changes.Create {
		s.hosts = append(s.hosts, Host{Name: name})
		s.born[name], s.broken[name] = s.now, s.rng.IntN(20) == 0
	}
	s.state = d.Scaled
	return d
}

func (s *simulated) people(arrivals, departures int) {
	s.look()
	for range arrivals {
		for i := range s.hosts {
			if h := &s.hosts[i]; h.Free > 0 && !h.Retiring {
				h.Sessions++
				h.Free--
				if s.personal {
					h.Assigned, h.Free = true, 0
				}
				break
			}
		}
	}
	for range departures {
		if i := s.rng.IntN(len(s.hosts) + 1); i < len(s.hosts) && s.hosts[i].Sessions > 0 {
			s.hosts[i].Sessions--
		}
	}
}

func TestAutoscaleProperties(t *testing.T) {
	for seed := range uint64(300) {
		rng := rand.New(rand.NewPCG(seed, 1))
		s := &simulated{
			rng: rng, now: time.Date(2026, 5, 4, 0, 0, 0, 0, time.UTC), born: map[string]time.Time{}, broken: map[string]bool{},
			policy: Autoscaling{Min: rng.Int32N(3), Max: 3 + rng.Int32N(20), Delay: time.Duration(rng.IntN(20)) * time.Minute, PerHost: 1 + rng.Int32N(8)},
		}
		if s.personal = rng.IntN(4) == 0; s.personal {
			s.policy.PerHost = 1
		}
		if rng.IntN(2) == 0 {
			s.policy.FreePlaces = 1 + rng.Int32N(10)
		} else {
			s.policy.FreePercent = 1 + rng.Int32N(90)
		}
		var lastUp time.Time
		desired := int32(-1)
		for range 400 {
			d := s.pass(t)
			switch {
			case desired >= 0 && d.Desired > desired:
				lastUp = s.now
			case desired >= 0 && d.Desired < desired && s.now.Sub(lastUp) < s.policy.Delay:
				t.Fatalf("seed %d: flaps: %d hosts become %d, %s after there were more", seed, desired, d.Desired, s.now.Sub(lastUp))
			}
			desired = d.Desired
			s.people(rng.IntN(4), rng.IntN(4))
			s.now = s.now.Add(time.Duration(rng.IntN(60)) * time.Second)
		}

		// Once nobody comes or goes any more, it comes to rest, with enough places or as many hosts as may be.
		clear(s.broken)
		for range 200 {
			s.pass(t)
			s.now = s.now.Add(time.Minute)
		}
		before := slices.Clone(s.hosts)
		d := s.pass(t)
		if !slices.Equal(before, s.hosts) || !d.Since.IsZero() && s.policy.Delay > 0 {
			t.Fatalf("seed %d: it never rests: %+v", seed, d)
		}
		if d.Free+d.Coming < d.Wanted && d.Desired < s.policy.Max {
			t.Fatalf("seed %d: rests with too few places: %+v of %+v", seed, d, s.policy)
		}
	}
}
