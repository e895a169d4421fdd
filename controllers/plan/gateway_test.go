package plan

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"testing"
)

func TestRollGateway(t *testing.T) {
	old := func(name string, sessions int32) GatewayPod {
		return GatewayPod{Name: name, Sessions: sessions, Ready: true}
	}
	done := func(name string) GatewayPod { return GatewayPod{Name: name, Ready: true, Updated: true, Back: true} }
	for name, tc := range map[string]struct {
		seen Rolling
		step RollStep
		pod  string
	}{
		"first the Deployment stands still":       {Rolling{Pods: []GatewayPod{old("a", 1)}}, RollPause, ""},
		"then new pods are as wanted":             {Rolling{Paused: true, Pods: []GatewayPod{old("a", 1)}}, RollTemplate, ""},
		"the emptiest pod first":                  {Rolling{true, true, []GatewayPod{old("a", 2), old("b", 1)}}, RollPod, "b"},
		"ties by name":                            {Rolling{true, true, []GatewayPod{old("b", 1), old("a", 1)}}, RollPod, "a"},
		"the next once that one is back":          {Rolling{true, true, []GatewayPod{old("a", 2), done("b")}}, RollPod, "a"},
		"and not before":                          {Rolling{true, true, []GatewayPod{old("a", 2), {Name: "b", Updated: true}}}, RollWait, ""},
		"not though it still looks ready":         {Rolling{true, true, []GatewayPod{old("a", 2), {Name: "b", Updated: true, Ready: true}}}, RollWait, ""},
		"a broken one need not wait":              {Rolling{true, true, []GatewayPod{old("a", 0), {Name: "b", Sessions: 3}, {Name: "c", Updated: true}}}, RollPod, "b"},
		"the last one is waited for":              {Rolling{true, true, []GatewayPod{done("a"), {Name: "b", Updated: true}}}, RollWait, ""},
		"done":                                    {Rolling{true, true, []GatewayPod{done("a"), done("b")}}, RollFinish, ""},
		"no pod at all":                           {Rolling{Paused: true, Template: true}, RollFinish, ""},
		"a template that was taken back is again": {Rolling{Paused: true, Pods: []GatewayPod{done("a")}}, RollTemplate, ""},
	} {
		t.Run(name, func(t *testing.T) {
			if step, pod := RollGateway(tc.seen); step != tc.step || pod != tc.pod {
				t.Errorf("got %d %q, want %d %q", step, pod, tc.step, tc.pod)
			}
		})
	}
}

// With pods that come and go, and a plan that is asked at any moment, at most one ready pod is ever away, and it ends.
func TestRollGatewayTakesOneAtATime(t *testing.T) {
	for seed := range uint64(200) {
		rng := rand.New(rand.NewPCG(seed, 0))
		seen := Rolling{}
		for i := range 1 + rng.IntN(6) {
			seen.Pods = append(seen.Pods, GatewayPod{Name: fmt.Sprint(i), Sessions: rng.Int32N(4), Ready: rng.IntN(8) > 0})
		}
		for n := 0; ; n++ {
			if n > 500 {
				t.Fatalf("seed %d: it never ends: %+v", seed, seen)
			}
			step, name := RollGateway(seen)
			if step == RollFinish {
				break
			}
			away := 0
			for i := range seen.Pods {
				p := &seen.Pods[i]
				if p.Updated && !p.Back {
					away++
					if rng.IntN(3) == 0 {
						p.Back, p.Ready = true, true
						away--
					}
				}
			}
			switch step {
			case RollPause:
				seen.Paused = true
			case RollTemplate:
				seen.Template = true
			case RollPod:
				for i := range seen.Pods {
					if p := &seen.Pods[i]; p.Name == name {
						if p.Ready && away > 0 {
							t.Fatalf("seed %d: pod %s goes while another is away", seed, name)
						}
						p.Updated, p.Ready = true, false
					}
				}
			}
		}
		for _, p := range seen.Pods {
			if !p.Updated || !p.Back {
				t.Fatalf("seed %d: finished with %+v", seed, p)
			}
		}
	}
}

func TestDeletionCosts(t *testing.T) {
	pods := func(pairs ...int32) (list []GatewayPod) {
		for i := 0; i < len(pairs); i += 2 {
			list = append(list, GatewayPod{Name: string(rune('a' + i/2)), Sessions: pairs[i], Cost: pairs[i+1]})
		}
		return list
	}
	for name, tc := range map[string]struct {
		pods []GatewayPod
		want map[string]int32
	}{
		"all empty":                   {pods(0, 0, 0, 0), nil},
		"one is in use":               {pods(0, 0, 1, 0), map[string]int32{"b": 1}},
		"known already":               {pods(0, 0, 1, 1), nil},
		"more, in the same order":     {pods(0, 0, 30, 1), nil},
		"a little out of order":       {pods(100, 90, 95, 91), nil},
		"out of order":                {pods(100, 90, 60, 91), map[string]int32{"a": 100, "b": 60}},
		"the fuller became the empty": {pods(0, 7, 3, 3), map[string]int32{"a": 0}},
		"one alone":                   {pods(5, 0), nil},
	} {
		t.Run(name, func(t *testing.T) {
			got := DeletionCosts(tc.pods)
			if !maps.Equal(got, tc.want) {
				t.Fatalf("got %v, want %v", got, tc.want)
			}
			for i := range tc.pods {
				if c, ok := got[tc.pods[i].Name]; ok {
					tc.pods[i].Cost = c
				}
			}
			if again := DeletionCosts(tc.pods); again != nil {
				t.Errorf("a second time: %v", again)
			}
		})
	}
}
