package agent

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"time"

	"github.com/nats-io/nats.go"

	"rendezvous.dev/rendezvous/wire/bus"
)

// A session host is one key: brokers refuse every machine that has another. Here is what the agent does about that.

// renewed is a membership that another replaced.
type renewed struct {
	*member
	at time.Time
}

// settled notes that the brokers take the membership in force: the one before it is of no use any more.
func (a *Agent) settled() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.previous = nil
}

// wayBack finds a membership that the brokers may take, where they refuse m's key: the one before a renewal that a broker
// has signed and not recorded, as an older release does; or a new one, where there is a token that m didn't come with. The
// error says what a person can do.
func (a *Agent) wayBack(ctx context.Context, m *member) (*member, error) {
	a.mu.Lock()
	before := a.previous
	a.mu.Unlock()
	switch {
	case before == nil || time.Now().After(before.client.NotAfter):
	case time.Since(before.at) < a.opts.timing.unrenewed:
		return nil, errors.New("it was renewed only just now, and they may not all have heard of it")
	default:
		old := *before.member
		if err := a.store.save(&old); err != nil {
			return nil, err
		}
		a.log.Warn("the brokers don't take the renewed key: going back to the one before, and renewing that again")
		a.settled()
		a.renewAgain = true
		return &old, nil
	}
	err := errors.New("another machine has enrolled as this host, its enrolment was revoked, or its SessionHost was deleted. To enrol this machine again, put the token of the host's own registration Secret into the token file")
	token, noToken := a.readToken()
	if noToken != nil || token == a.refused {
		return nil, err
	}
	if sum := sha256.Sum256([]byte(token)); hex.EncodeToString(sum[:]) == m.TokenHash {
		return nil, err
	}
	next, refused := a.enrolOnce(ctx, token)
	if refused != nil {
		if isFinal(refused) {
			a.refused = token
		}
		return nil, errors.Join(err, refused)
	}
	a.settled()
	return next, nil
}

// onDisplaced takes the brokers' word that one of this host's connections is about to be closed in favour of a newer one.
// Where that is the channel in service, the newer is not this agent's.
func (a *Agent) onDisplaced(conn *nats.Conn, msg *nats.Msg) {
	var d bus.HostDisplaced
	if err := json.Unmarshal(msg.Data, &d); err != nil {
		a.log.Error("unreadable message from a broker", "subject", msg.Subject, "error", err)
		return
	}
	id, err := conn.GetClientID()
	if err != nil || d.Conn != id || d.Broker != conn.ConnectedServerName() {
		return
	}
	a.mu.Lock()
	inService := a.conn == conn
	a.mu.Unlock()
	if inService {
		a.log.Error("another machine connects as this host, with the same key: this one is a clone, or its key was copied. On a clone, stop the agent, remove its state folder, and enrol it under a name of its own; else have the enrolment revoked (annotation rendezvous.dev/revoke-enrolment of the SessionHost)")
		signal(a.displaced)
	}
}
