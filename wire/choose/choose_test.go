package choose

import (
	"fmt"
	"math/rand/v2"
	"reflect"
	"testing"
	"time"
)

func TestGateway(t *testing.T) {
	ms := time.Millisecond
	up := func(name string, latency time.Duration, connections int) Candidate {
		return Candidate{Name: name, Answered: true, Latency: latency, Connections: connections}
	}
	tests := []struct {
		name string
		in   []Candidate
		want string // empty: none
	}{
		{"none", nil, ""},
		{"one", []Candidate{up("a", 300*ms, 9)}, "a"},
		{"nearest group wins over load", []Candidate{up("near", 9*ms, 1000), up("far", 10*ms, 0)}, "near"},
		{"within a group load decides", []Candidate{up("fast", 11*ms, 5), up("idle", 19*ms, 4)}, "idle"},
		{"the group's edge is the next group", []Candidate{up("a", 20*ms, 0), up("b", 20*ms-1, 7)}, "b"},
		{"ties go by name", []Candidate{up("b", 1*ms, 2), up("a", 9*ms, 2)}, "a"},
		{"silent gateways are left out", []Candidate{{Name: "silent"}, up("slow", 900*ms, 50)}, "slow"},
		{"all silent", []Candidate{{Name: "x"}, {Name: "y"}}, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			weighed, ok := Gateway(tt.in)
			if len(weighed) != len(tt.in) {
				t.Errorf("%d weighed, want all %d", len(weighed), len(tt.in))
			}
			got := ""
			if ok {
				got = weighed[0].Name
			}
			if got != tt.want {
				t.Errorf("chose %q, want %q", got, tt.want)
			}
		})
	}
}

// TestGatewayProperties holds the rule against its definition on random fleets.
func TestGatewayProperties(t *testing.T) {
	for seed := range uint64(2000) {
		r := rand.New(rand.NewPCG(seed, 1))
		var in []Candidate
		for i := range r.IntN(8) {
			in = append(in, Candidate{
				Name: fmt.Sprintf("g%d", i), Answered: r.IntN(4) > 0,
				Latency: time.Duration(r.Int64N(int64(50 * time.Millisecond))), Connections: r.IntN(4),
			})
		}
		weighed, ok := Gateway(in)

		shuffled := append([]Candidate(nil), in...)
		r.Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
		if again, _ := Gateway(shuffled); !reflect.DeepEqual(again, weighed) {
			t.Fatalf("seed %d: the order of the candidates changed the result:\n%v\n%v", seed, weighed, again)
		}

		answered := 0
		for _, c := range in {
			if c.Answered {
				answered++
			}
		}
		if ok != (answered > 0) {
			t.Fatalf("seed %d: ok = %t with %d answers", seed, ok, answered)
		}
		if !ok {
			continue
		}
		best := weighed[0]
		for _, c := range in {
			if !c.Answered {
				continue
			}
			group, bestGroup := c.Latency/GroupWidth, best.Latency/GroupWidth
			switch {
			case group < bestGroup:
				t.Fatalf("seed %d: %v is in a lower group than the chosen %v", seed, c, best)
			case group == bestGroup && c.Connections < best.Connections:
				t.Fatalf("seed %d: %v has fewer connections than the chosen %v", seed, c, best)
			case group == bestGroup && c.Connections == best.Connections && c.Name < best.Name:
				t.Fatalf("seed %d: %v ties with the chosen %v and comes before it", seed, c, best)
			}
		}
	}
}
