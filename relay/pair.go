package relay

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	"rendezvous.dev/rendezvous/wire/admission"
	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/refusal"
)

// This file is the way from a relay that got a client's IN channel to the relay of the same gateway that holds the OUT
// channel. The one asks all others, over TLS under the server name
//
//	INSTANCE.FINGERPRINT.pair.HOSTNAME
//
// where both ends must prove that they hold the listener's private key: the name tells which certificate (the newest, or,
// around a renewal, the one before it), the server shows that one, and demands the same of the client. So the hop needs
// no secret of its own, and whoever could use it could be the gateway anyway. What passes is what the client sent.

const (
	pathPair     = "/rendezvous/v1/pair"
	pairProtocol = "rendezvous-pair/1"
	headerClient = "Rendezvous-Client"
	// searchTime bounds the search for an OUT channel, maxSearches how many go on at once: a stranger costs the other pods
	// a handshake each.
	searchTime  = 5 * time.Second
	maxSearches = 32
	// renewalTime is how long the certificate before the newest is still good here: Kubernetes takes a minute or two to
	// show all pods a renewed one.
	renewalTime = 10 * time.Minute
)

// ownCerts is what this relay proves itself with: the listener's certificate, and the one before it.
type ownCerts struct {
	get func(*tls.ClientHelloInfo) (*tls.Certificate, error)

	mu          sync.Mutex
	now, before *tls.Certificate
	renewed     time.Time
}

// newOwnCerts watches the certificates that conf serves.
func newOwnCerts(conf *tls.Config) (*ownCerts, error) {
	o := &ownCerts{get: conf.GetCertificate}
	if o.get == nil {
		if len(conf.Certificates) == 0 {
			return nil, errors.New("relay: Options.TLS has no certificate")
		}
		cert := &conf.Certificates[0]
		o.get = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return cert, nil }
	}
	conf.GetCertificate = o.certificate
	_, err := o.certificate(&tls.ClientHelloInfo{})
	return o, err
}

// certificate is for tls.Config.
func (o *ownCerts) certificate(h *tls.ClientHelloInfo) (*tls.Certificate, error) {
	cert, err := o.get(h)
	if err != nil {
		return nil, err
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.now == nil || !sameLeaf(o.now, cert.Certificate[0]) {
		o.before, o.now, o.renewed = o.now, cert, time.Now()
	}
	return cert, nil
}

// held is those that are good for a hop, newest first.
func (o *ownCerts) held() []*tls.Certificate {
	o.certificate(&tls.ClientHelloInfo{})
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.before != nil && time.Since(o.renewed) < renewalTime {
		return []*tls.Certificate{o.now, o.before}
	}
	return []*tls.Certificate{o.now}
}

func sameLeaf(c *tls.Certificate, der []byte) bool { return bytes.Equal(c.Certificate[0], der) }

// fingerprint tells certificates apart; it proves nothing.
func fingerprint(c *tls.Certificate) string {
	sum := sha256.Sum256(c.Certificate[0])
	return hex.EncodeToString(sum[:8])
}

// onlyPeer refuses whoever has not proved to hold cert's key.
func onlyPeer(cert *tls.Certificate) func(tls.ConnectionState) error {
	return func(cs tls.ConnectionState) error {
		if len(cs.PeerCertificates) == 0 || !sameLeaf(cert, cs.PeerCertificates[0].Raw) {
			return errors.New("relay: the other side of a hop between relays is not of this gateway")
		}
		return nil
	}
}

// onPair is onHello for the server names of hops: name is what stands before .pair.HOSTNAME.
func (r *Relay) onPair(c *conn, name string) (*tls.Config, error) {
	instance, print, _ := strings.Cut(name, ".")
	if instance != r.instance {
		return nil, fmt.Errorf("relay: a hop for instance %q reached %q", instance, r.instance)
	}
	for _, cert := range r.certs.held() {
		if fingerprint(cert) != print {
			continue
		}
		c.peer = true
		conf := c.secrets.capture(r.tls)
		conf.MinVersion = tls.VersionTLS13
		conf.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return cert, nil }
		conf.ClientAuth = tls.RequireAnyClientCert
		conf.VerifyConnection = onlyPeer(cert)
		conf.SessionTicketsDisabled = true // each hop proves itself anew
		return conf, nil
	}
	return nil, errors.New("relay: a hop asks for a certificate that is not held here")
}

// servePair answers another relay that looks for an OUT channel.
func (r *Relay) servePair(v *visitor, req *request, activity string) {
	id := connectionID(req)
	addr, err := netip.ParseAddr(req.get(headerClient))
	if req.get(headerClient) == "" {
		err = nil // hidden
	}
	if !req.has("Upgrade", pairProtocol) || id == "" || err != nil {
		v.refuse(http.StatusBadRequest, refusal.New(refusal.Protocol, "Relays ask each other for %s at %s: are all pods of this gateway of one release?", pairProtocol, pathPair).With(activity))
		return
	}
	h, e := r.halves.claim(id, addr, v.tcp)
	if e != nil {
		v.refuse(http.StatusConflict, e.With(activity))
		return
	}
	if h == nil {
		v.sayNo(http.StatusNotFound, refusal.New(refusal.Protocol, "No OUT channel of connection %s is here.", id).With(activity))
		return
	}
	ok := &answer{status: http.StatusSwitchingProtocols, activity: activity, header: []headerField{{"Upgrade", pairProtocol}, {"Connection", "Upgrade"}}}
	if ok.write(v) != nil {
		r.halves.release(h)
		return
	}
	v.SetDeadline(time.Time{})
	v.handed = r.halves.deliver(h, v.leg)
}

// claimElsewhere asks the other pods for a client's OUT channel. The first that has it is taken.
func (r *Relay) claimElsewhere(v *visitor, id string, addr netip.Addr, activity string) (*inbound, *refusal.Error) {
	ctx, cancel := context.WithTimeout(context.Background(), searchTime)
	defer cancel()
	select {
	case r.searches <- struct{}{}:
		defer func() { <-r.searches }()
	case <-ctx.Done():
		return nil, refusal.New(refusal.GatewayFull, "This pod of gateway %s looks for too many OUT channels at once: try again in a few seconds.", r.config.Load().Gateway)
	}
	resp, err := r.admission.Peers(ctx, &admission.PeersRequest{})
	if err != nil {
		r.log.Warn("the gateway container gave no answer", "activity", activity, "error", err)
		return nil, refusal.New(refusal.AdmissionAway, "The gateway container beside this relay does not answer: try again in a few seconds.")
	}
	if e := resp.Error; e != nil {
		return nil, received(e)
	}
	if !r.splice(+1) {
		return nil, refusal.New(refusal.GatewayFull, "This pod of gateway %s hands its limit of connections on to other pods: try again in a few seconds.", r.config.Load().Gateway)
	}
	hop, e := r.askAll(ctx, cancel, resp.Peers, id, addr, activity)
	if e != nil {
		r.splice(-1)
		return nil, e
	}
	r.metrics.Pairs.WithLabelValues("peer").Inc()
	r.log.Info("the OUT channel is on another pod", "activity", activity, "connection", id, "peer", hop.tcp.RemoteAddr().String())
	in := &inbound{r: r, id: id, hop: hop, gone: make(chan struct{})}
	go func() {
		defer close(in.gone)
		hop.discard()
		v.tcp.Close() // whoever reads the client learns of it so
	}()
	return in, nil
}

// askAll asks all peers at once.
func (r *Relay) askAll(ctx context.Context, cancel func(), peers []*admission.Peer, id string, addr netip.Addr, activity string) (*leg, *refusal.Error) {
	type answer struct {
		hop *leg
		err error
	}
	answers := make(chan answer, len(peers))
	for _, p := range peers {
		r.legs.Go(func() {
			hop, err := r.ask(ctx, p, id, addr, activity)
			answers <- answer{hop, err}
		})
	}
	var last *refusal.Error
	for i := range peers {
		a := <-answers
		if a.hop == nil {
			if !errors.As(a.err, &last) && a.err != errNotThere {
				r.log.Warn("a peer relay gave no answer", "activity", activity, "error", a.err)
			}
			continue
		}
		cancel()
		for range peers[i+1:] { // they end at once
			if late := <-answers; late.hop != nil {
				late.hop.tcp.Close()
			}
		}
		return a.hop, nil
	}
	if last == nil {
		last = refusal.New(refusal.Protocol, "No OUT channel of connection %s is at this gateway: its client opens it first (RDG_OUT_DATA), on the same gateway; connect again.", id)
	}
	return nil, last
}

// errNotThere says that a peer has no such OUT channel.
var errNotThere = errors.New("relay: the OUT channel is not there")

// ask asks one peer. The error is errNotThere, its refusal, or why it can't be asked.
func (r *Relay) ask(ctx context.Context, p *admission.Peer, id string, addr netip.Addr, activity string) (hop *leg, err error) {
	for _, cert := range r.certs.held() {
		if hop, err = r.dialPeer(ctx, p, cert); err == nil {
			break
		}
	}
	if err != nil {
		return nil, fmt.Errorf("relay: peer %s: %w", p.Instance, err)
	}
	stop := context.AfterFunc(ctx, func() { hop.tcp.Close() })
	err = askHop(hop, id, addr, activity)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		hop.tcp.Close()
		return nil, err
	}
	return hop, nil
}

// askHop is the request on a hop that is open.
func askHop(hop *leg, id string, addr netip.Addr, activity string) error {
	b := fmt.Appendf(nil, "GET %s HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: %s\r\n%s: {%s}\r\n%s: %s\r\n", pathPair, pairProtocol,
		headerConnection, id, brokerapi.HeaderActivity, activity)
	if addr.IsValid() {
		b = fmt.Appendf(b, "%s: %s\r\n", headerClient, addr)
	}
	if _, err := hop.Write(append(b, "\r\n"...)); err != nil {
		return err
	}
	resp, err := http.ReadResponse(bufio.NewReader(hop), nil)
	switch {
	case err != nil:
		return err
	case resp.StatusCode == http.StatusSwitchingProtocols:
		return nil // no byte follows
	case resp.StatusCode == http.StatusNotFound:
		return errNotThere
	}
	var e brokerapi.ErrorBody
	if json.NewDecoder(io.LimitReader(resp.Body, maxHead)).Decode(&e) != nil || e.Error == nil {
		return fmt.Errorf("relay: a peer answered %s", resp.Status)
	}
	return refusal.Received(e.Error, refusal.Internal)
}

// dialPeer opens a hop on which both sides have proved to hold cert.
func (r *Relay) dialPeer(ctx context.Context, p *admission.Peer, cert *tls.Certificate) (*leg, error) {
	nc, err := r.dial(ctx, "tcp", p.Address)
	if err != nil {
		return nil, err
	}
	tc, ok := nc.(*net.TCPConn)
	if !ok {
		nc.Close()
		return nil, errors.New("the dialer gave no TCP connection")
	}
	c, err := newConn(tc)
	if err != nil {
		nc.Close()
		return nil, err
	}
	c.handshakeOver() // crypto/tls keeps this one: it carries what a hand can type
	hop := &leg{tcp: c, tls: tls.Client(c, &tls.Config{
		MinVersion:           tls.VersionTLS13,
		ServerName:           fmt.Sprintf("%s.%s.pair.%s", p.Instance, fingerprint(cert), r.config.Load().Hostname),
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil },
		InsecureSkipVerify:   true, // one certificate is right, and VerifyConnection compares with it
		VerifyConnection:     onlyPeer(cert),
	})}
	if err := hop.tls.HandshakeContext(ctx); err != nil {
		c.Close()
		return nil, err
	}
	return hop, nil
}

// passToPeer hands an IN channel's bytes on to the pod that holds its OUT channel, until either ends.
func (r *Relay) passToPeer(v *visitor, in *inbound) {
	v.vouch()
	r.adopt(in.hop.tcp)
	defer r.disown(in.hop.tcp)
	v.tcp.polling = true
	err := pump(v.leg, maxBatch, in.hop.send)
	if err != io.EOF { // no good-bye from the client, none to the peer
		return
	}
	in.hop.SetDeadline(time.Now().Add(r.closeGrace))
	in.hop.CloseWrite()
	<-in.gone
}
