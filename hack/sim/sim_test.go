package main

import (
	"context"
	"encoding/xml"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestMain lets the test start itself as a broker or an operator, as the program does.
func TestMain(m *testing.M) {
	if len(os.Args) == 2 && (os.Args[1] == brokerCommand || os.Args[1] == operatorCommand) {
		if err := command(context.Background(), os.Args[1:], os.Stdout); err != nil {
			os.Stderr.WriteString(err.Error())
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

func TestClock(t *testing.T) {
	var c clock
	var order []string
	note := func(s string) func() { return func() { order = append(order, s) } }
	c.after(2*time.Second, note("late"))
	c.after(time.Second, note("first"))
	c.after(time.Second, func() { note("second")(); c.after(0, note("at once")) })
	c.after(-time.Hour, note("now"))
	c.run(2 * time.Second)
	if got := strings.Join(order, " "); got != "now first second at once" || c.now != 2*time.Second {
		t.Errorf("%s at %s", got, c.now)
	}
	c.run(time.Minute)
	if order[len(order)-1] != "late" {
		t.Error("what is due later was lost")
	}
}

func TestView(t *testing.T) {
	var v view
	check := func(what string, taken, reserved int) {
		t.Helper()
		if len(v.taken) != taken || len(v.reserved) != reserved {
			t.Errorf("%s: %d taken, %d reserved; want %d and %d", what, len(v.taken), len(v.reserved), taken, reserved)
		}
	}
	v.promise(session{id: 1, user: "a"})
	check("asked", 0, 1)
	v.settle(1, true, 4)
	check("accepted", 1, 0)
	v.hear(4, nil)
	check("a report from before", 1, 0)
	v.hear(5, []session{{id: 1, user: "a"}, {id: 9, user: "b", away: true}})
	check("a report since", 2, 0)
	v.hear(3, nil)
	check("a late report", 2, 0)
	v.promise(session{id: 2, user: "c"})
	v.settle(2, false, 5)
	check("refused", 2, 0)
	v.promise(session{id: 3, user: "d"})
	v.hear(7, nil)
	v.settle(3, true, 6)
	check("ended before anybody heard", 0, 0)
}

func TestTakes(t *testing.T) {
	p := &pool{}
	p.rules.MaxSessions = 1
	h := &host{pool: p, connected: true, ready: true}
	try := func(what, user string, ok, again bool) {
		t.Helper()
		if o, a := h.takes(user); o != ok || a != again {
			t.Errorf("%s: %v %v", what, o, a)
		}
	}
	try("empty", "a", true, false)
	h.sessions = []session{{user: "a"}}
	try("full", "b", false, false)
	try("one's own", "a", true, true)
	h.draining = true
	try("one's own on a draining host", "a", true, true)
	h.ready = false
	try("broken", "a", false, false)
}

// A small fleet has all that the great one has, comes out the same each time, and breaks no promise: runFleet fails
// where a host is overfull, or a connect is refused while a place is free.
func TestFleet(t *testing.T) {
	tables := map[string]bool{}
	for range 2 {
		var out strings.Builder
		if err := runFleet(fleetOptions{Seed: 3, Connects: 3000, Scale: 2}, &out); err != nil {
			t.Fatalf("%v\n%s", err, &out)
		}
		lines := strings.Split(out.String(), "\n")
		tables[strings.Join(lines[:4], "\n")] = true
		if !strings.Contains(out.String(), "GATEWAYS") {
			t.Errorf("no gateways in\n%s", &out)
		}
	}
	if len(tables) != 1 {
		t.Errorf("the same seed gave different worlds: %v", tables)
	}
}

// Counting those on their way must make the difference that it is there for.
func TestFrontIsEvener(t *testing.T) {
	for _, measured := range []bool{true, false} {
		without, _ := runFront(chooser{measured: measured}, 1, 2000, 500)
		with, _ := runFront(chooser{measured: measured, ahead: true}, 1, 2000, 500)
		if with >= without {
			t.Errorf("measured %v: max/mean %.2f with those on their way, %.2f without", measured, with, without)
		}
	}
}

func TestAgents(t *testing.T) {
	var out strings.Builder
	plot := filepath.Join(t.TempDir(), "sim.svg")
	if err := runAgents(t.Context(), agentsOptions{Agents: 20, Connects: 40, Patience: time.Minute, Plot: plot}, &out); err != nil {
		t.Fatalf("%v\n%s", err, &out)
	}
	var any struct{}
	if data, err := os.ReadFile(plot); err != nil || xml.Unmarshal(data, &any) != nil {
		t.Errorf("the plot is no XML: %v", err)
	}
	for _, want := range []string{"40 accepted, 0 not", "memory per idle agent", "all agents back", "goal: all back within 30s"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, &out)
		}
	}
}

func TestCommands(t *testing.T) {
	if err := command(t.Context(), []string{"nonsense"}, &strings.Builder{}); err == nil || !strings.Contains(err.Error(), "nonsense") {
		t.Errorf("%v", err)
	}
}

// TestOperator shows that the operator writes nothing once all is done, though it looks at everything again.
func TestOperator(t *testing.T) {
	if os.Getenv("KUBEBUILDER_ASSETS") == "" {
		if os.Getenv("RDV_REQUIRE_ENVTEST") != "" {
			t.Fatal("KUBEBUILDER_ASSETS is not set: make unit sets it")
		}
		t.Skip("KUBEBUILDER_ASSETS is not set: make unit sets it")
	}
	var out strings.Builder
	err := runOperator(t.Context(), operatorOptions{Hosts: 40, Pools: 4, Quiet: 10 * time.Second, Patience: 2 * time.Minute}, &out)
	if err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	if !strings.Contains(out.String(), "40 pods, 4") {
		t.Errorf("it prints:\n%s", out.String())
	}
}
