package plan

import (
	"cmp"
	"fmt"
	"slices"
)

// Host is a session host that a pool made, as seen.
type Host struct {
	Name     string
	Sessions int32
	// Assigned says that the host is one user's own.
	Assigned bool
	// Serving says that the host takes sessions.
	Serving bool
}

// HostChanges is what a pool must do to have its number of hosts.
type HostChanges struct {
	Create []string
	Delete []string
	// Waiting are hosts too many that can't go yet, because sessions run on them or because they are somebody's own.
	Waiting []string
}

// Hosts plans a pool's hosts. Names are POOL-0, POOL-1, …, without those in taken, which belong to others. Hosts go only
// when they are empty and nobody's own: first those that don't serve, then the youngest names.
func Hosts(pool string, want int32, hosts []Host, taken map[string]bool) HostChanges {
	var changes HostChanges
	have := make(map[string]bool, len(hosts))
	for _, h := range hosts {
		have[h.Name] = true
	}
	for i, missing := 0, int(want)-len(hosts); missing > 0; i++ {
		name := fmt.Sprintf("%s-%d", pool, i)
		if have[name] || taken[name] {
			continue
		}
		changes.Create = append(changes.Create, name)
		missing--
	}
	surplus := len(hosts) - int(want)
	if surplus <= 0 {
		return changes
	}
	order := slices.Clone(hosts)
	slices.SortFunc(order, func(a, b Host) int {
		return cmp.Or(
			compareBool(busy(a), busy(b)),
			compareBool(a.Serving, b.Serving),
			cmp.Compare(len(b.Name), len(a.Name)), // POOL-10 is younger than POOL-9
			cmp.Compare(b.Name, a.Name),
		)
	})
	for _, h := range order[:surplus] {
		if busy(h) {
			changes.Waiting = append(changes.Waiting, h.Name)
		} else {
			changes.Delete = append(changes.Delete, h.Name)
		}
	}
	slices.Sort(changes.Waiting)
	return changes
}

func busy(h Host) bool { return h.Sessions > 0 || h.Assigned }

// compareBool puts false before true.
func compareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	}
	return 1
}
