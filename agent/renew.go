package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/rdpkey"
	"rendezvous.dev/rendezvous/wire/refusal"
)

const renewTimeout = 60 * time.Second

// keepRenewing asks for the next certificates in time, over the control channel that the present ones opened.
func (a *Agent) keepRenewing(ctx context.Context) {
	for {
		early := false
		m := a.current()
		due := time.NewTimer(time.Until(renewAt(m)))
		select {
		case <-ctx.Done():
			due.Stop()
			return
		case <-a.early:
			due.Stop()
			early, m = true, a.current()
		case <-due.C:
			if a.current() != m {
				continue // enrolled again meanwhile
			}
		}
		next, err := a.renew(ctx, m)
		if err != nil {
			if ctx.Err() != nil {
				return
			}
			wait := renewRetry(time.Until(m.notAfter()), a.opts.timing.retryMin)
			if early { // there is a reason for it now, and it stays
				wait = min(wait, a.opts.timing.refusedMax)
				signal(a.early)
			}
			a.log.Error("certificates not renewed", "error", err, "notAfter", m.notAfter(), "retryIn", wait.Round(time.Millisecond).String())
			if sleep(ctx, wait) != nil {
				return
			}
			continue
		}
		a.log.Info("certificates renewed", "notAfter", next.notAfter())
		a.mu.Lock()
		a.previous = &renewed{m, time.Now()}
		a.mu.Unlock()
		a.adopt(next)
		signal(a.redial)
	}
}

// renewAt is two thirds into the life of the certificate that ends first, less a random twentieth so that hosts which
// enrolled together don't renew together.
func renewAt(m *member) time.Time {
	cert := m.client
	if m.rdp != nil && m.rdp.NotAfter.Before(cert.NotAfter) {
		cert = m.rdp
	}
	life := cert.NotAfter.Sub(cert.NotBefore)
	return cert.NotBefore.Add(life*2/3 - rand.N(life/20+1))
}

// renewRetry spreads attempts over what is left of the certificate's life, between min and 10 minutes apart.
func renewRetry(left, min time.Duration) time.Duration {
	d := max(min, left/8)
	if d > 10*time.Minute {
		d = 10 * time.Minute
	}
	return d/2 + rand.N(d/2+1)
}

// rdpKind is the kind of key that the RDP server is to have next: the one that the brokers name, or else the present one's. It is nil
// where the host keeps its own certificate.
func (a *Agent) rdpKind(m *member) *rdpkey.Kind {
	if m.rdp == nil {
		return nil
	}
	c, _ := a.ledger.inForce()
	if c.RDPKey.Algorithm != "" {
		return &c.RDPKey
	}
	_, kind, _ := rdpkey.Parse([]byte(m.RDPKey)) // the default where it can't be read
	return &kind
}

// otherRDPKey says that the brokers want the RDP certificate to be over another kind of key than it is.
func (a *Agent) otherRDPKey() bool {
	m := a.current()
	if m == nil || m.rdp == nil {
		return false
	}
	_, kind, err := rdpkey.Parse([]byte(m.RDPKey))
	return err != nil || kind != a.rdpKind(m).Complete()
}

// renew asks for certificates over new keys and saves them.
func (a *Agent) renew(ctx context.Context, m *member) (*member, error) {
	a.mu.Lock()
	conn := a.conn
	a.mu.Unlock()
	if conn == nil {
		return nil, errors.New("no control channel to a broker")
	}
	next := &member{Namespace: m.Namespace, Workspace: m.Workspace, Pool: m.Pool, Host: m.Host, BusURLs: m.BusURLs, BusCA: m.BusCA, TokenHash: m.TokenHash}
	req, err := certificateRequest(m.id(), next, a.rdpKind(m))
	if err != nil {
		return nil, err
	}
	data, err := json.Marshal(req)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, renewTimeout)
	defer cancel()
	msg, err := conn.RequestWithContext(ctx, bus.RenewSubject(m.Pool, m.Host), data)
	if err != nil {
		return nil, fmt.Errorf("no broker answered: %w", err)
	}
	var res brokerapi.RenewResponse
	if err := json.Unmarshal(msg.Data, &res); err != nil {
		return nil, fmt.Errorf("the broker's answer can't be read: %w", err)
	}
	if res.Err != nil {
		return nil, refusal.Received(res.Err, refusal.Internal)
	}
	next.ClientCertificate = res.ClientCertificate
	if res.BusCA != "" {
		next.BusCA = res.BusCA
	}
	if req.RDPCSR != "" && res.RDPCertificate != "" {
		next.RDPCertificate = res.RDPCertificate
	} else {
		next.RDPCertificate, next.RDPKey = m.RDPCertificate, m.RDPKey
	}
	if err := next.check(); err != nil {
		return nil, fmt.Errorf("the broker's answer: %w", err)
	}
	if err := a.store.save(next); err != nil {
		return nil, fmt.Errorf("--state-dir: %w", err)
	}
	return next, nil
}
