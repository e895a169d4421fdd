package bus

import (
	"slices"
	"strings"
	"testing"

	"rendezvous.dev/rendezvous/wire/identity"
)

// covers says whether a NATS subject pattern takes a subject.
func covers(pattern, subject string) bool {
	p, s := strings.Split(pattern, "."), strings.Split(subject, ".")
	for i, token := range p {
		switch {
		case token == ">":
			return len(s) > i
		case i >= len(s) || token != "*" && token != s[i]:
			return false
		}
	}
	return len(p) == len(s)
}

func may(list []string, subject string) bool {
	return slices.ContainsFunc(list, func(p string) bool { return covers(p, subject) })
}

func TestPermissions(t *testing.T) {
	agent := identity.Agent("ns", "ws", "pool", "a")
	gateway := identity.Gateway("ns", "ws", "gw")
	for _, c := range []struct {
		who     identity.ID
		publish bool
		subject string
		want    bool
	}{
		{agent, true, ReportSubject("pool", "a"), true},
		{agent, true, ReportSubject("pool", "b"), false},
		{agent, true, ReportSubject("other", "a"), false},
		{agent, true, RenewSubject("pool", "a"), true},
		{agent, true, RenewSubject("pool", "b"), false},
		{agent, true, SubjectConnect, false},
		{agent, true, TraceSubject(agent), true},
		{agent, true, TraceSubject(gateway), false},
		{agent, true, HostConnectSubject("pool", "b"), false},
		{agent, false, HostConnectSubject("pool", "a"), true},
		{agent, false, HostConnectSubject("pool", "b"), false},
		{agent, false, HostConfigSubject("pool", "a"), true},
		{agent, false, HostDisplacedSubject("pool", "a"), true},
		{agent, false, HostDisplacedSubject("pool", "b"), false},
		{agent, true, HostDisplacedSubject("pool", "b"), false},
		{agent, false, HostSessionSubject("pool", "a"), true},
		{agent, false, HostSessionSubject("pool", "b"), false},
		{agent, false, HostSessionSubject("other", "a"), false},
		{agent, true, HostSessionSubject("pool", "a"), false},
		{agent, true, HostSessionSubject("pool", "b"), false},
		{gateway, true, HostSessionSubject("pool", "a"), false},
		{gateway, false, HostSessionSubject("pool", "a"), false},
		{identity.Broker("ns", "ws"), true, HostSessionSubject("pool", "a"), true},
		{gateway, true, HostDisplacedSubject("pool", "a"), false},
		{agent, false, InboxPrefix(agent) + ".x", true},
		{agent, false, "_INBOX.agent.pool.b.x", false},
		{agent, false, AllTraces, false},
		{gateway, true, SubjectConnect, true},
		{gateway, true, SubjectEntry, true},
		{gateway, true, SubjectGateways, true},
		{gateway, false, SubjectEntry, false},
		{gateway, false, SubjectGateways, false},
		{agent, true, SubjectEntry, false},
		{agent, true, SubjectGateways, false},
		{gateway, true, GatewayReportSubject("gw", "10-0-0-1"), true},
		{gateway, true, GatewayReportSubject("other", "10-0-0-1"), false},
		{gateway, true, HostConnectSubject("pool", "a"), false},
		{gateway, true, ReportSubject("pool", "a"), false},
		{gateway, false, SubjectConnect, false},
		{gateway, false, GatewayEndSubject("gw", "10-0-0-1"), true},
		{gateway, false, GatewayEndSubject("other", "10-0-0-1"), false},
		{gateway, false, HostConnectSubject("pool", "a"), false},
		{agent, true, "rdv.standing", false},
		{agent, false, "rdv.standing", false},
		{gateway, true, "rdv.standing", false},
		{gateway, false, "rdv.standing", false},
		{gateway, true, GatewayEndSubject("gw", "10-0-0-1"), false},
		{identity.Broker("ns", "ws"), true, "rdv.standing", true},
		{identity.Broker("ns", "ws"), false, "rdv.standing", true},
		{identity.Broker("ns", "ws"), true, HostConnectSubject("pool", "a"), true},
		{identity.Broker("ns", "ws"), false, AllReports, true},
	} {
		p, err := PermissionsFor(c.who)
		if err != nil {
			t.Fatal(err)
		}
		list, verb := p.Subscribe, "subscribe to"
		if c.publish {
			list, verb = p.Publish, "publish"
		}
		if got := may(list, c.subject); got != c.want {
			t.Errorf("%s may %s %s: %v, want %v", c.who, verb, c.subject, got, c.want)
		}
	}
	for _, id := range []identity.ID{identity.TicketSigner("ns", "ws"), identity.Operator("ns", "ws")} {
		if _, err := PermissionsFor(id); err == nil {
			t.Errorf("%s has a place on the bus", id)
		}
	}
}
