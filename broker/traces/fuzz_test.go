package traces

import (
	"encoding/json"
	"strings"
	"testing"

	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/identity"
	"rendezvous.dev/rendezvous/wire/trace"
)

// Whatever an agent or a gateway says of a connect, it adds nothing under another's name, takes no activity from its user,
// and fills no memory.
func FuzzHear(f *testing.F) {
	const id = "00000000-0000-4000-8000-000000000001"
	agent, gateway := bus.TraceSubject(identity.Agent("ns", "ws", "pool", "h")), bus.TraceSubject(identity.Gateway("ns", "ws", "gw"))
	f.Add(agent, []byte(`{"activityId":"`+id+`","step":9,"component":"broker/b","user":"mallory","detail":"x"}`))
	f.Add(gateway, []byte(`{"activityId":"`+id+`","step":7,"component":"relay/p","user":"mallory","clientAddr":"192.0.2.1"}`))
	f.Add("rdv.trace.agent.pool", []byte(`{"activityId":"`+id+`","step":-1}`))
	f.Fuzz(func(t *testing.T, subject string, data []byte) {
		var e trace.Event
		if json.Unmarshal(data, &e) != nil || strings.HasPrefix(subject, "rdv.trace.broker") {
			return
		}
		s := New()
		s.Hear(bus.TraceSubject(identity.Broker("ns", "ws")), trace.Event{ActivityID: id, Step: 8, Component: "broker/b", User: "alice"})
		s.Hear(subject, e)
		s.Hear(subject, e)
		events, ok := s.Get(id, "alice")
		if !ok || len(events) == 0 || len(events) > 3 {
			t.Fatalf("alice's activity has %d events", len(events))
		}
		if _, ok := s.Get(id, "mallory"); ok {
			t.Error("alice's activity is mallory's")
		}
		rest, isTrace := strings.CutPrefix(subject, "rdv.trace.")
		parts := strings.Split(rest, ".")
		for _, e := range events {
			if len(e.Detail) > maxText || len(e.Error) > maxText || len(e.Component) > maxText || e.Step < 0 || e.Step >= len(trace.Titles) {
				t.Errorf("kept %+v", e)
			}
			switch role, _, _ := strings.Cut(e.Component, "/"); {
			case e.User == "alice" && e.Component == "broker/b":
			case isTrace && parts[0] == "agent" && len(parts) == 3 && e.Component == clip("agent/"+parts[2]):
			case isTrace && parts[0] == "gateway" && (role == "gateway" || role == "relay"):
			case !isTrace: // the bus gives no such subject
			default:
				t.Errorf("%q speaks as %q", subject, e.Component)
			}
		}
		if len(s.List("alice", "", 10)) != 1 && e.ActivityID == id {
			t.Error("alice's list lacks it")
		}
	})
}
