package enrol

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"rendezvous.dev/rendezvous/broker/model"
	"rendezvous.dev/rendezvous/wire/identity"
)

// A session host is one key. Its SessionHost's status holds the key's fingerprint and the object's UID, and a certificate
// over another key, or of an object of that name from before, is refused: so enrolling again, deleting and revoking put the
// key before out at once, whatever its certificate's age. At a renewal two keys count, the one in force and the next one,
// until the agent connects with the next.

// writeTimeout bounds one change of an enrolment that no request waits for.
const writeTimeout = 10 * time.Second

// change is what a connection or an annotation asks to record of a host's enrolment.
type change struct {
	key    string    // of the certificate that it came with; empty where an annotation alone asks
	issued time.Time // when that was
}

// Member says whether the holder of an agent's identity, by a certificate over a key with this fingerprint and issued
// when, is that host. While nothing is known of the declared world, the certificate counts. It never blocks: what the
// connection changes of the enrolment, Follow records.
func (s *Service) Member(id identity.ID, key string, issued time.Time) error {
	snap := s.o.Source.Snapshot()
	if snap.Workspace == nil || id.Role != identity.RoleAgent {
		return nil
	}
	h := snap.Hosts[id.Host]
	if h == nil || h.Pool != id.Pool {
		return fmt.Errorf("SessionHost %s of pool %s does not exist (any more)", id.Host, id.Pool)
	}
	if err := member(h); err != nil {
		return err
	}
	switch e := &h.Enrolment; {
	case key != "" && key == e.Key:
		return nil
	case key != "" && key == e.NextKey:
		s.mu.Lock()
		s.arrived[h.Name] = key
		s.mu.Unlock()
		fallthrough
	case pins(e, issued):
		s.later(h.Name, change{key, issued})
		return nil
	case e.Key == "":
		return fmt.Errorf("SessionHost %s was enrolled again at %s, and this certificate is older", h.Name, e.At.UTC().Format(time.RFC3339))
	}
	return fmt.Errorf("SessionHost %s is enrolled with another key (status.enrolment.keyFingerprint): this machine was replaced, or has to enrol again", h.Name)
}

// member says why a host's enrolment, if it has one, doesn't count.
func member(h *model.Host) error {
	switch e := &h.Enrolment; {
	case e.TokenHash == "":
		return fmt.Errorf("SessionHost %s has not enrolled", h.Name)
	case h.Revoked():
		return fmt.Errorf("the enrolment of SessionHost %s was revoked", h.Name)
	case e.Key != "" && e.HostUID != h.UID:
		return fmt.Errorf("SessionHost %s was made again, and this one has not enrolled", h.Name)
	}
	return nil
}

// pins says whether a certificate issued then makes its key the host's: where a release before keys were kept recorded
// the enrolment, and for no certificate from before that enrolment.
func pins(e *model.Enrolment, issued time.Time) bool {
	return e.Key == "" && !issued.Add(issueTime).Before(e.At)
}

// later has Follow record a change. The first of a host's waiting changes counts, and no annotation's is in its way.
func (s *Service) later(host string, c change) {
	s.mu.Lock()
	if first, waits := s.changes[host]; !waits || first.key == "" {
		s.changes[host] = c
	}
	s.mu.Unlock()
	select {
	case s.due <- struct{}{}:
	default:
	}
}

// cameWith is the next key that a host came with to this broker, where that is yet to be recorded.
func (s *Service) cameWith(host string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.arrived[host]
}

// Changed looks in a new snapshot for enrolments to revoke. Member refuses them already; Follow makes it last.
func (s *Service) Changed() {
	for name, h := range s.o.Source.Snapshot().Hosts {
		if h.Enrolment.TokenHash != "" && h.Revoke != "" && h.Revoke != h.Enrolment.RevokedFor {
			s.later(name, change{})
		}
	}
}

// Follow records what connections and annotations change of enrolments, until ctx ends. What can't be recorded now is
// noticed again: by the connection's next check, or with the next snapshot.
func (s *Service) Follow(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.due:
		}
		s.mu.Lock()
		changes := s.changes
		s.changes = map[string]change{}
		s.mu.Unlock()
		for _, host := range slices.Sorted(maps.Keys(changes)) {
			if err := s.settle(ctx, host, changes[host]); err != nil && ctx.Err() == nil {
				s.o.Log.Warn("can't record a host's key", "host", host, "error", err)
			}
		}
	}
}

var errNothing = errors.New("nothing to record")

// settle records one change, where it is still due.
func (s *Service) settle(ctx context.Context, host string, c change) error {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	what := ""
	err := s.record(ctx, host, func(h *model.Host) (model.Enrolment, error) {
		e := h.Enrolment
		switch {
		case e.TokenHash != "" && h.Revoke != "" && h.Revoke != e.RevokedFor:
			e.Key, e.NextKey, e.RevokedFor = "", "", h.Revoke
			what = "revoked"
		case c.key == "" || member(h) != nil:
			return e, errNothing
		case c.key == e.NextKey:
			e.Key, e.NextKey = c.key, ""
			what = "renewed"
		case pins(&e, c.issued):
			e.Key, e.HostUID = c.key, h.UID
			what = "recorded"
		default:
			return e, errNothing
		}
		return e, nil
	})
	if err == nil || errors.Is(err, errNothing) {
		s.mu.Lock()
		delete(s.arrived, host)
		s.mu.Unlock()
	}
	switch {
	case errors.Is(err, errNothing):
		return nil
	case err == nil:
		s.o.Log.Info("host's key "+what, "host", host, "key", c.key)
	}
	return err
}
