package gateway

import (
	"context"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"

	"rendezvous.dev/rendezvous/wire/admission"
	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/config"
	"rendezvous.dev/rendezvous/wire/identity"
	"rendezvous.dev/rendezvous/wire/mtls"
	"rendezvous.dev/rendezvous/wire/refusal"
	"rendezvous.dev/rendezvous/wire/trace"
)

// workspace is the gateway's connection to one workspace: its bus and its ticket keys.
type workspace struct {
	// Static.
	g    *Gateway
	name string
	id   identity.ID
	urls string
	dir  string
	log  *slog.Logger
	stop context.CancelFunc

	connected atomic.Bool // the bus was reached once
	closed    atomic.Bool // the gateway serves it no more
	keys      atomic.Pointer[[]ed25519.PublicKey]
	nc        atomic.Pointer[nats.Conn]
	peers     atomic.Pointer[[]bus.GatewayAddress] // its other gateways, as a broker told
}

// newWorkspace starts connecting; it goes on until close.
func (g *Gateway) newWorkspace(c config.Gateway, spec config.GatewayWorkspace) *workspace {
	ctx, stop := context.WithCancel(context.Background())
	w := &workspace{g: g, name: spec.Name, id: identity.Gateway(c.Namespace, spec.Name, c.Gateway), urls: strings.Join(spec.BusURLs, ","),
		dir: filepath.Join(g.dir, spec.Name), log: g.log.With("workspace", spec.Name), stop: stop}
	w.loadKeys()
	go w.run(ctx)
	return w
}

func (w *workspace) close() {
	w.closed.Store(true)
	w.stop()
}

// run reads the files until they are there, connects, and keeps looking at the files.
func (w *workspace) run(ctx context.Context) {
	gauge := w.g.metrics.Bus.WithLabelValues(w.name)
	gauge.Set(0)
	defer w.g.metrics.Bus.DeleteLabelValues(w.name)
	var certs *mtls.Reloader
	for certs == nil {
		var err error
		if certs, err = mtls.NewReloader(w.dir, w.log); err != nil {
			w.log.Error("the workspace's certificate can't be read yet", "error", err)
			if !sleep(ctx, w.g.refresh) {
				return
			}
		}
		w.loadKeys()
	}
	var nc *nats.Conn
	for nc == nil {
		var err error
		if nc, err = w.dialBus(certs); err != nil {
			w.log.Error("the bus can't be dialled; are the busUrls right?", "urls", w.urls, "error", err)
			if !sleep(ctx, w.g.refresh) {
				return
			}
		}
	}
	w.nc.Store(nc)
	defer nc.Close()
	if _, err := nc.Subscribe(bus.GatewayEndSubject(w.id.Gateway, w.g.instance), w.endSession); err != nil {
		w.log.Error("sessions of this workspace can't be ended from the bus", "error", err)
	}
	for sleep(ctx, w.g.refresh) {
		certs.Reload() // it logs what it thinks of a bad certificate
		w.loadKeys()
	}
}

// sleep waits, and says whether ctx is still good.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

func (w *workspace) dialBus(certs *mtls.Reloader) (*nats.Conn, error) {
	gauge := w.g.metrics.Bus.WithLabelValues(w.name)
	up := func(nc *nats.Conn) {
		w.connected.Store(true)
		gauge.Set(1)
		w.log.Info("bus connected", "url", nc.ConnectedUrlRedacted())
		w.g.loadChanged()
	}
	return nats.Connect(w.urls,
		nats.Name("gateway/"+w.g.instance),
		nats.Secure(certs.ClientConfig("", mtls.AllowRole(w.id.Namespace, w.id.Workspace, identity.RoleBroker))),
		nats.CustomInboxPrefix(bus.InboxPrefix(w.id)),
		nats.MaxReconnects(-1), nats.ReconnectWait(200*time.Millisecond), nats.ReconnectJitter(300*time.Millisecond, time.Second),
		nats.RetryOnFailedConnect(true), nats.IgnoreAuthErrorAbort(), // a certificate that is refused today may be right tomorrow
		nats.PingInterval(10*time.Second), nats.MaxPingsOutstanding(2), nats.Timeout(5*time.Second),
		nats.ReconnectBufSize(1<<20), // timelines survive a blink; connects don't wait in it, see connect
		nats.ConnectHandler(up), nats.ReconnectHandler(up),
		nats.DisconnectErrHandler(func(_ *nats.Conn, err error) {
			gauge.Set(0)
			w.log.Warn("bus disconnected", "error", err)
		}),
		nats.ReconnectErrHandler(func(_ *nats.Conn, err error) { w.log.Warn("bus not reached", "error", err) }),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { w.log.Error("bus", "error", err) }),
	)
}

// loadKeys reads the public keys that sign this workspace's tickets. The file may hold several certificates, so that a key
// can be rotated while tickets of the old one live; what it no longer holds is no longer believed. A bad file changes nothing.
func (w *workspace) loadKeys() {
	path := filepath.Join(w.dir, config.TicketCert)
	data, err := os.ReadFile(path)
	if err != nil {
		if w.keys.Load() == nil {
			w.log.Error("the workspace's ticket key can't be read yet", "error", err)
		}
		return
	}
	keys, err := ticketKeys(data, identity.TicketSigner(w.id.Namespace, w.id.Workspace))
	if err != nil {
		w.log.Error("kept the old ticket keys", "file", path, "error", err)
		return
	}
	w.keys.Store(&keys)
}

// ticketKeys reads the certificates of one ticket signer.
func ticketKeys(data []byte, signer identity.ID) ([]ed25519.PublicKey, error) {
	var keys []ed25519.PublicKey
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		id, err := identity.FromCertificate(cert)
		if err != nil {
			return nil, err
		}
		key, ok := cert.PublicKey.(ed25519.PublicKey)
		if id != signer || !ok {
			return nil, fmt.Errorf("the certificate of %s with a %T is not %s's Ed25519 one", id, cert.PublicKey, signer)
		}
		keys = append(keys, key)
	}
	if len(keys) == 0 {
		return nil, errors.New("it holds no certificate")
	}
	return keys, nil
}

// again is how long a connect waits before it asks a bus that blinks once more.
const again = 100 * time.Millisecond

// answering is the time that is left to tell the relay that no broker answered in time, before it gives up itself.
const answering = 250 * time.Millisecond

// connect asks the brokers, and returns the host that promised to dial.
func (w *workspace) connect(ctx context.Context, r *admission.ConnectRequest, activity string) (host string, err error) {
	w.g.mu.Lock()
	gateway := w.g.config.Gateway
	w.g.mu.Unlock()
	data, err := json.Marshal(bus.ConnectRequest{ActivityID: activity, SessionID: r.SessionId, Ticket: r.Ticket, Target: r.Target,
		ClientAddr: r.ClientAddr, Transport: r.Transport, Gateway: gateway, Instance: r.Instance, JoinSecret: r.JoinSecret, Deadline: r.Deadline.AsTime()})
	if err != nil {
		return "", err
	}
	if deadline, ok := ctx.Deadline(); ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, deadline.Add(-answering))
		defer cancel()
	}
	reply, err := w.ask(ctx, bus.SubjectConnect, data)
	if err != nil {
		return "", err
	}
	var answer bus.ConnectReply
	switch err := json.Unmarshal(reply, &answer); {
	case err != nil:
		return "", w.unreadable()
	case answer.Err != nil:
		return "", refusal.Received(answer.Err, refusal.Internal)
	case !identity.IsLabel(answer.Pool) || !identity.IsLabel(answer.Host):
		return "", w.unreadable()
	}
	return answer.Pool + "/" + answer.Host, nil
}

// enter asks the brokers which gateway is to serve a client.
func (w *workspace) enter(ctx context.Context, r *admission.EnterRequest) (bus.EntryReply, error) {
	w.g.mu.Lock()
	gateway := w.g.config.Gateway
	w.g.mu.Unlock()
	data, err := json.Marshal(bus.EntryRequest{ActivityID: r.ActivityId, Ticket: r.Ticket, ClientAddr: r.ClientAddr, Gateway: gateway, Instance: r.Instance})
	if err != nil {
		return bus.EntryReply{}, err
	}
	reply, err := w.ask(ctx, bus.SubjectEntry, data)
	if err != nil {
		return bus.EntryReply{}, err
	}
	var answer bus.EntryReply
	switch err := json.Unmarshal(reply, &answer); {
	case err != nil:
		return bus.EntryReply{}, w.unreadable()
	case answer.Err != nil:
		return answer, refusal.Received(answer.Err, refusal.Internal)
	}
	return answer, nil
}

func (w *workspace) unreadable() error {
	return refusal.New(refusal.Internal, "The broker of workspace %s gave an answer that can't be read: tell your administrator.", w.name)
}

// ask waits out a bus that is away, or has no broker on it, for the gateway's patience.
func (w *workspace) ask(ctx context.Context, subject string, data []byte) ([]byte, error) {
	patient := time.Now().Add(w.g.patience)
	for {
		why := "its bus is not connected"
		if nc := w.nc.Load(); nc != nil && nc.IsConnected() {
			reply, err := nc.RequestWithContext(ctx, subject, data)
			switch {
			case err == nil:
				return reply.Data, nil
			case ctx.Err() != nil:
				return nil, w.away("no broker answered in time")
			case errors.Is(err, nats.ErrNoResponders):
				why = "no broker is on its bus"
			default:
				why = err.Error()
			}
		}
		if time.Now().After(patient) || !sleep(ctx, again) {
			return nil, w.away(why)
		}
	}
}

func (w *workspace) away(why string) error {
	return refusal.New(refusal.BrokerAway, "The broker of workspace %s can't be reached (%s): try again in a minute; if it lasts, ask your administrator to look at Workspace %s.", w.name, why, w.name)
}

// publish sends JSON; what can't be sent is lost.
func (w *workspace) publish(subject string, v any) {
	nc := w.nc.Load()
	if nc == nil {
		return
	}
	data, err := json.Marshal(v)
	if err == nil {
		err = nc.Publish(subject, data)
	}
	if err != nil {
		w.log.Debug("not published", "subject", subject, "error", err)
	}
}

func (w *workspace) trace(e trace.Event) { w.publish(bus.TraceSubject(w.id), e) }

// endSession obeys a broker, about sessions of its own workspace only.
func (w *workspace) endSession(m *nats.Msg) {
	var cmd bus.EndSession
	if err := json.Unmarshal(m.Data, &cmd); err != nil {
		w.log.Warn("a command that can't be read", "subject", m.Subject, "error", err)
		return
	}
	cmd.Reason = refusal.Received(&refusal.Error{Message: cmd.Reason}, refusal.EndedByAdmin).Message
	if err := w.g.end(w.name, cmd); err != nil {
		w.log.Warn("session not ended", "session", cmd.SessionID, "error", err)
	}
}
