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
	// Serving says that the host is ready.
	Serving bool
	// Retiring says that the pool keeps new sessions off the host already, Drained that it certainly takes none: its agent
	// has said so, or there is no agent that could.
	Retiring, Drained bool
	// Free and Places are how many sessions more, and in all, the host would take if it were not retiring.
	Free, Places int32
	// Coming says that the host does not serve yet, but that it is too early to give it up. A user's own brings no place.
	Coming bool
}

// HostChanges is what a pool must do to have its number of hosts.
type HostChanges struct {
	Create []string
	// Retire are the hosts that are to take no new session, by name. All others may.
	Retire []string
	// Delete are those of them that are gone for good: drained, empty, and nobody's own.
	Delete []string
	// Waiting are hosts too many that can't go yet, because sessions run on them, because they have not said yet that they
	// take none, or because they are somebody's own.
	Waiting []string
}

// Hosts plans a pool's hosts. Names are POOL-0, POOL-1, …, without those that are taken, by others. Hosts too many are
// drained first, and go once they are empty. That can be taken back until then: a host that is wanted again is no longer
// in Retire.
func Hosts(pool string, want int32, hosts []Host, taken func(name string) bool) HostChanges {
	var changes HostChanges
	have := make(map[string]bool, len(hosts))
	for _, h := range hosts {
		have[h.Name] = true
	}
	for i, missing := 0, int(want)-len(hosts); missing > 0; i++ {
		name := fmt.Sprintf("%s-%d", pool, i)
		if have[name] || taken(name) {
			continue
		}
		changes.Create = append(changes.Create, name)
		missing--
	}
	for _, h := range inOrderOfLeaving(hosts)[:max(0, len(hosts)-int(want))] {
		switch {
		case h.Assigned: // its user could not get back to it
			changes.Waiting = append(changes.Waiting, h.Name)
			continue
		case h.Sessions == 0 && h.Retiring && h.Drained:
			changes.Delete = append(changes.Delete, h.Name)
		default:
			changes.Waiting = append(changes.Waiting, h.Name)
		}
		changes.Retire = append(changes.Retire, h.Name)
	}
	slices.Sort(changes.Waiting)
	slices.Sort(changes.Retire)
	return changes
}

// inOrderOfLeaving sorts hosts by who goes first: the empty before those in use, and these before a user's own; of the
// empty, those that don't serve, then the youngest names; of those in use, the ones that were told to go, then the
// emptiest.
func inOrderOfLeaving(hosts []Host) []Host {
	order := slices.Clone(hosts)
	slices.SortFunc(order, func(a, b Host) int {
		used := func(h Host) bool { return h.Sessions > 0 }
		return cmp.Or(
			compareBool(a.Assigned, b.Assigned),
			compareBool(used(a), used(b)),
			compareBool(used(a) && !a.Retiring, used(b) && !b.Retiring),
			cmp.Compare(a.Sessions, b.Sessions),
			compareBool(a.Serving, b.Serving),
			compareBool(!a.Retiring, !b.Retiring),
			cmp.Compare(len(b.Name), len(a.Name)), // POOL-10 is younger than POOL-9
			cmp.Compare(b.Name, a.Name),
		)
	})
	return order
}

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
