// Package choose is the rule of step 7: which gateway serves a connect. It is a pure function, so that everyone who
// measured the same chooses the same.
//
// Latencies are put into groups of 10 ms: within a group nobody feels a difference, so there the load decides. Of the
// lowest group that has a gateway, the one with the fewest connections is chosen; ties go by name. A gateway that did
// not answer is left out.
package choose

import (
	"cmp"
	"slices"
	"time"
)

// GroupWidth is how far apart two latencies must be at least to be told apart for certain.
const GroupWidth = 10 * time.Millisecond

// Candidate is one gateway as it was found.
type Candidate struct {
	Name string
	// Answered says that Latency was measured.
	Answered bool
	// Latency is one round trip, not negative.
	Latency time.Duration
	// Connections counts live sessions and those on their way.
	Connections int
}

// Weighed is a candidate with what the rule made of it.
type Weighed struct {
	Candidate
	// Group is Latency in whole GroupWidths; -1 for a gateway that did not answer.
	Group int
}

// Gateway weighs the candidates, best first, those that did not answer last. The first is the chosen one where ok.
func Gateway(candidates []Candidate) (weighed []Weighed, ok bool) {
	for _, c := range candidates {
		w := Weighed{Candidate: c, Group: -1}
		if c.Answered {
			w.Group = int(max(c.Latency, 0) / GroupWidth)
		}
		weighed = append(weighed, w)
	}
	slices.SortFunc(weighed, compare)
	return weighed, len(weighed) > 0 && weighed[0].Answered
}

func compare(a, b Weighed) int {
	switch {
	case a.Answered && b.Answered:
		return cmp.Or(cmp.Compare(a.Group, b.Group), cmp.Compare(a.Connections, b.Connections), cmp.Compare(a.Name, b.Name))
	case a.Answered:
		return -1
	case b.Answered:
		return 1
	}
	return cmp.Compare(a.Name, b.Name)
}
