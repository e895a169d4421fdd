package orchestrate

import (
	"maps"
	"slices"

	"rendezvous.dev/rendezvous/broker/model"
	"rendezvous.dev/rendezvous/broker/proof"
	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/refusal"
)

// What hosts and gateways report is kept, told to other brokers and written to status, so each of its texts is held to the
// length that it may need, in bytes, where it is received. A message as such has the bus's bound.
const (
	// maxReported bounds the sessions of one report; a pool allows 1,000 on a host. Further ones don't count.
	maxReported = 2000
	maxVersion  = 128 // of texts that say what a host is
	maxName     = 253 // of ids and names of Kubernetes objects
	maxUser     = 512 // a token's name of 256 bytes, in another spelling
	// maxLatencies bounds the other gateways that one measures.
	maxLatencies = 256
	// maxCount bounds a pod's numbers of sessions, whose sums must fit.
	maxCount = 1 << 20
	// maxPods bounds the pods of one gateway that are heard.
	maxPods = 512
	// maxIntroduced bounds a host's report as brokers tell it to one that they meet. With hostsMessageSize it leaves room
	// below the bus's bound of 2 MiB.
	maxIntroduced = 1 << 20
)

// bounded is a report as it is kept. A session with a text that is too long takes a place, and is nobody's.
func bounded(r bus.HostReport) bus.HostReport {
	for _, text := range []*string{&r.AgentVersion, &r.OS, &r.Boot, &r.CertificateFingerprint, &r.CertificateNotAfter} {
		*text = refusal.Line(*text, maxVersion)
	}
	r.Message = refusal.Line(r.Message, refusal.MaxMessage)
	maps.DeleteFunc(r.LoginsRefused, func(reason string, _ uint64) bool { return !slices.Contains(bus.LoginReasons, reason) })
	r.Sessions = r.Sessions[:min(len(r.Sessions), maxReported)]
	for i := range r.Sessions {
		s := &r.Sessions[i]
		if !slices.Contains([]string{bus.SessionPending, bus.SessionActive, bus.SessionDisconnected}, s.State) {
			s.State = ""
		}
		for _, text := range []string{s.SessionID, s.ActivityID, s.Resource, s.Gateway, s.Instance, s.Account} {
			if len(text) > maxName {
				*s = anonymous(s)
			}
		}
		if len(s.User) > maxUser || len(s.Proof) > proof.MaxLength {
			*s = anonymous(s)
		}
	}
	return r
}

// anonymous is what counts of a session whose user isn't known.
func anonymous(s *bus.HostSession) bus.HostSession {
	return bus.HostSession{State: s.State, Since: s.Since, Assumed: s.Assumed}
}

// boundedLoad is a gateway pod's report as it is kept: round trips to gateways of the workspace alone, and no less than no
// sessions, which would draw every client.
func boundedLoad(r bus.GatewayReport, gateways []*model.Gateway) bus.GatewayReport {
	known := map[string]int64{}
	for _, g := range gateways {
		if trip, measured := r.Latencies[g.Name]; measured && len(known) < maxLatencies {
			known[g.Name] = trip
		}
	}
	r.Latencies = known
	for _, n := range []*int32{&r.Sessions, &r.Pending, &r.MaxSessions} {
		*n = min(max(*n, 0), maxCount)
	}
	return r
}
