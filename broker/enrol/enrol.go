// Package enrol makes machines session hosts: it checks a registration token and the certificate requests that come with
// it, has the issuers sign, and records the membership. Members renew over the bus, by the identity of their connection.
//
// A token is rdvreg.NAMESPACE.POOL.HOST.SECRET. A pool's (HOST is "-") enrols many hosts until it expires or is rotated;
// a host's enrols that host, once. Brokers know tokens by their SHA-256 alone, from the status of HostPool and SessionHost.
package enrol

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"

	"rendezvous.dev/rendezvous/broker/metrics"
	"rendezvous.dev/rendezvous/broker/model"
	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/config"
	"rendezvous.dev/rendezvous/wire/identity"
	"rendezvous.dev/rendezvous/wire/refusal"
)

const (
	// identityDuration is how long an agent's identity lasts; it renews at two thirds. A machine that is off for longer
	// enrols again.
	identityDuration = 30 * 24 * time.Hour
	maxHostName      = 52
	secretLength     = 32
	// Refused tokens that are told why; more are told to come back.
	unknownPerSecond, unknownBurst = 50, 200
	// maxEnrolling and maxRenewing bound those that wait for an issuer, apart from each other: however many members renew,
	// machines enrol. Of one host there is one at a time, and of one pool never more than there are places left: a pool whose
	// issuer hangs leaves places to all others.
	maxEnrolling, maxRenewing = 32, 64
	markTries                 = 5
	// A pool's token makes so many hosts at once, and so many a second later, at each broker.
	makesPerSecond, makesBurst = 2, 20
	// renewEvery is the shortest time between two renewals of a host; renewAfter that from its enrolment to the first, in
	// which every broker hears of it, so that a key that it put out asks for nothing more.
	renewEvery, renewAfter = time.Minute, 10 * time.Second
	// maxRenewal bounds a renewal's message, in bytes.
	maxRenewal = 4 * maxCSR
	// issueTime is the longest from an identity's NotBefore until its enrolment is recorded. Some issuers date
	// certificates back by an hour, for clients whose clocks are behind.
	issueTime = 65 * time.Minute
	// seenWithin is how long an enrolment waits to be seen here, so that its agent is known when it comes.
	seenWithin, seenEvery = 3 * time.Second, 20 * time.Millisecond
	// seenElsewhere is how much later the other brokers, to any of which the agent may come, have seen it as good as surely.
	seenElsewhere = 250 * time.Millisecond
	// renewTimeout bounds one renewal.
	renewTimeout = time.Minute
)

var errTooLong = errors.New("it is too long")

// Options of a Service. All but Now, Log and Metrics are required.
type Options struct {
	Namespace, Workspace string
	Source               model.Source
	Writer               model.Writer
	// InternalIssuer signs identities.
	InternalIssuer config.Issuer
	// BusURLs is where members find the bus, best first. BusCA gives what verifies it (PEM).
	BusURLs []string
	BusCA   func() string
	Now     func() time.Time
	Log     *slog.Logger
	Metrics *metrics.Metrics
}

// Service enrols and renews. Safe for concurrent use.
type Service struct {
	o         Options
	unknown   *rate.Limiter
	enrolling chan struct{}
	renewing  chan struct{}
	due       chan struct{} // one waiting signal: changes has something
	elsewhere time.Duration // seenElsewhere, but in tests

	mu      sync.Mutex
	busy    map[string]bool          // hosts that an issuer works for
	waiting map[inLine]int           // places of enrolling and renewing that a pool has
	makers  map[string]*rate.Limiter // by pool
	changes map[string]change        // by host
	arrived map[string]string        // next keys that hosts came with, until that is recorded
}

// inLine is a pool in enrolling or renewing.
type inLine struct {
	places chan struct{}
	pool   string
}

// New makes a Service.
func New(o Options) *Service {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Metrics == nil {
		o.Metrics = metrics.New(nil)
	}
	return &Service{
		o: o, unknown: rate.NewLimiter(unknownPerSecond, unknownBurst),
		enrolling: make(chan struct{}, maxEnrolling), renewing: make(chan struct{}, maxRenewing), due: make(chan struct{}, 1), elsewhere: seenElsewhere,
		busy: map[string]bool{}, waiting: map[inLine]int{}, makers: map[string]*rate.Limiter{}, changes: map[string]change{}, arrived: map[string]string{},
	}
}

// grant is what a token is good for.
type grant struct {
	pool *model.Pool
	host string // empty for a pool's token
	hash string
}

// check says what a token is good for now. Those who try tokens are held off, without harm to those who have one.
func (s *Service) check(token string) (grant, error) {
	g, err := s.lookUp(token)
	if err != nil && !s.unknown.AllowN(s.o.Now(), 1) {
		return grant{}, refusal.New(refusal.IssuerAway, "Too many tokens are refused here: try again in a few seconds.")
	}
	return g, err
}

// lookUp finds what a token is good for. Its errors are *refusal.Error; none tells which pools or hosts exist.
func (s *Service) lookUp(token string) (grant, error) {
	parts := strings.Split(token, ".")
	if len(token) > 256 || len(parts) != 5 || parts[0] != "rdvreg" || !identity.IsLabel(parts[2]) || (parts[3] != "-" && !identity.IsLabel(parts[3])) || !isSecret(parts[4]) {
		return grant{}, refusal.New(refusal.RegistrationInvalid, "That is not a registration token. One is in the Secret <hostpool>-registration, or <sessionhost>-registration, under the key token.")
	}
	// The Secret is named after what the token itself says, so that the answer tells nothing of what exists.
	holder := parts[2]
	if parts[3] != "-" {
		holder = parts[3]
	}
	unknown := refusal.New(refusal.RegistrationInvalid, "The registration token is unknown, or was replaced by a newer one: read the key token of Secret %s-registration again.", holder)
	if parts[1] != s.o.Namespace {
		return grant{}, unknown
	}
	sum := sha256.Sum256([]byte(token))
	g := grant{hash: hex.EncodeToString(sum[:])}
	snap := s.o.Source.Snapshot()
	if g.pool = snap.Pools[parts[2]]; g.pool == nil {
		return grant{}, unknown
	}
	reg, what := g.pool.Registration, "HostPool "+g.pool.Name
	if parts[3] != "-" {
		h := snap.Hosts[parts[3]]
		if h == nil || h.Pool != g.pool.Name {
			return grant{}, unknown
		}
		g.host, reg, what = h.Name, h.Registration, "SessionHost "+h.Name
		if same(g.hash, h.Enrolment.TokenHash) {
			return grant{}, spent(h.Name)
		}
	}
	switch {
	case !same(g.hash, reg.TokenHash):
		return grant{}, unknown
	case !s.o.Now().Before(reg.Expires):
		return grant{}, refusal.New(refusal.RegistrationExpired, "The registration token of %s expired at %s: read the newest from its Secret; where registration.rotation is Manual, have one made with the annotation rendezvous.dev/rotate-registration.", what, reg.Expires.UTC().Format(time.RFC3339))
	}
	return g, nil
}

func spent(host string) error {
	return refusal.New(refusal.RegistrationSpent, "The registration token of SessionHost %s was used already, and it enrols once: delete its Secret %s-registration to have a new one made.", host, host)
}

func same(a, b string) bool {
	return b != "" && subtle.ConstantTimeCompare([]byte(a), []byte(b)) == 1
}

func isSecret(s string) bool {
	b, err := base64.RawURLEncoding.Strict().DecodeString(s)
	return err == nil && len(b) == secretLength
}

// Pre tells what the certificate requests must say.
func (s *Service) Pre(token string) (brokerapi.PreEnroll, error) {
	g, err := s.check(token)
	if err != nil {
		return brokerapi.PreEnroll{}, err
	}
	return brokerapi.PreEnroll{
		Namespace: s.o.Namespace, Workspace: s.o.Workspace, Pool: g.pool.Name, Host: g.host, RDPCertificate: g.pool.RDPIssuer != nil, RDPKey: g.pool.RDPKey,
	}, nil
}

// Enroll makes a machine a member.
func (s *Service) Enroll(ctx context.Context, r brokerapi.EnrollRequest) (res brokerapi.EnrollResponse, err error) {
	kind := "unknown"
	defer func() { s.count(kind, err) }()
	g, err := s.check(r.Token)
	if err != nil {
		return res, err
	}
	kind = "pool"
	if g.host != "" {
		kind = "host"
	}
	if !identity.IsLabel(r.Host) || len(r.Host) > maxHostName {
		return res, refusal.New(refusal.BadRequest, "host %q must be a DNS label of at most %d characters: lower-case letters, digits and hyphens.", r.Host, maxHostName)
	}
	if g.host != "" && r.Host != g.host {
		return res, refusal.New(refusal.BadRequest, "The registration token is SessionHost %s's own, and %q wants to enrol with it: give the machine that name, or a token of its own.", g.host, r.Host)
	}
	id := identity.Agent(s.o.Namespace, s.o.Workspace, g.pool.Name, r.Host)
	requests, key, err := s.requests(g.pool, id, r.ClientCSR, r.RDPCSR)
	if err != nil {
		return res, err
	}
	if requests[0] == nil {
		return res, refusal.New(refusal.BadRequest, "clientCSR is missing.")
	}
	end, err := s.begin(r.Host)
	if err != nil {
		return res, err
	}
	defer end()
	if err := s.admit(ctx, g, r.Host, key); err != nil {
		return res, err
	}
	certs, err := s.sign(ctx, inLine{s.enrolling, g.pool.Name}, requests)
	if err != nil {
		return res, err
	}
	// Only now, and only for one of those who try at once, does the token count as used; the certificates go to that one.
	if err := s.mark(ctx, g, r.Host, serial(certs.ClientCertificate), key); err != nil {
		return res, err
	}
	s.awaitSeen(ctx, r.Host, key)
	s.o.Log.Info("host enrolled", "pool", g.pool.Name, "host", r.Host, "token", kind)
	return brokerapi.EnrollResponse{
		Namespace: s.o.Namespace, Workspace: s.o.Workspace, Pool: g.pool.Name, Host: r.Host,
		Certificates: certs, BusURLs: s.o.BusURLs, BusCA: s.o.BusCA(),
	}, nil
}

// begin takes the one place that a host has with the issuers, and gives what ends it.
func (s *Service) begin(host string) (end func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.busy[host] {
		return nil, refusal.New(refusal.IssuerAway, "Certificates for SessionHost %s are being issued already: try again in a few seconds.", host)
	}
	s.busy[host] = true
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.busy, host)
	}, nil
}

// admit sees to the SessionHost of a machine that comes with its pool's token, and with this key. A token that many
// machines hold must not let one take a place that somebody meant for another: it makes SessionHosts, and enrols those
// that it made and nobody has enrolled as since.
func (s *Service) admit(ctx context.Context, g grant, host, key string) error {
	if g.host != "" {
		return nil
	}
	if s.o.Source.Snapshot().Hosts[host] == nil {
		if err := s.mayMake(ctx, g); err != nil {
			return err
		}
		err := s.o.Writer.CreateHost(ctx, g.pool, host, g.hash)
		if err == nil {
			return nil
		}
		if !errors.Is(err, model.ErrExists) {
			return s.apiAway(err)
		}
	}
	h, _, err := s.o.Writer.GetHost(ctx, host)
	if err != nil {
		return s.apiAway(err)
	}
	return mayTake(g, h, key)
}

// mayTake says whether the pool's token enrols a SessionHost that exists.
func mayTake(g grant, h *model.Host, key string) error {
	switch {
	case h.Pool != g.pool.Name:
		return refusal.New(refusal.BadRequest, "SessionHost %s exists in another pool: give the machine another name.", h.Name)
	case !h.MadeByToken || h.Pod || h.AssignedUser != "":
		return refusal.New(refusal.BadRequest, "SessionHost %s was declared, so it enrols with its own token alone: use the one in Secret %s-registration, or give the machine another name.", h.Name, h.Name)
	case h.New && g.pool.Personal:
		return refusal.New(refusal.IssuerAway, "SessionHost %s is new, and the operator has yet to look whose it was before: try again in a few seconds.", h.Name)
	case h.Agent == nil && h.Enrolment.TokenHash == "":
		return nil
	case h.Agent == nil && same(g.hash, h.Enrolment.TokenHash) && same(key, h.Enrolment.Key) && !h.Revoked():
		return nil // the answer was lost, and the same machine asks again
	}
	return refusal.New(refusal.BadRequest, "SessionHost %s is another machine's, or this one's from before: give the machine another name, delete the SessionHost, or have it made a token of its own with the annotation rendezvous.dev/revoke-enrolment.", h.Name)
}

// mayMake says whether the pool's token makes a further host.
func (s *Service) mayMake(ctx context.Context, g grant) error {
	s.mu.Lock()
	limiter := s.makers[g.pool.Name]
	if limiter == nil {
		limiter = rate.NewLimiter(makesPerSecond, makesBurst)
		s.makers[g.pool.Name] = limiter
	}
	s.mu.Unlock()
	if !limiter.AllowN(s.o.Now(), 1) {
		return refusal.New(refusal.IssuerAway, "Too many machines enrol in HostPool %s at once: try again in a few seconds.", g.pool.Name)
	}
	made, err := s.o.Writer.CountHosts(ctx, g.hash, g.pool.MaxHosts)
	switch {
	case err != nil:
		return s.apiAway(err)
	case made >= g.pool.MaxHosts:
		return refusal.New(refusal.RegistrationSpent, "The registration token of HostPool %s has made %d hosts, as many as spec.registration.maxHostsPerToken allows: raise that, have another token made with the annotation rendezvous.dev/rotate-registration, or delete hosts that aren't needed.", g.pool.Name, made)
	}
	return nil
}

// mark records the enrolment, and with it the key: from then on every other key is refused. A host's own token is spent
// by it.
func (s *Service) mark(ctx context.Context, g grant, host, serial, key string) error {
	return s.record(ctx, host, func(h *model.Host) (model.Enrolment, error) {
		e := model.Enrolment{TokenHash: g.hash, Serial: serial, At: s.o.Now(), HostUID: h.UID, Key: key, RevokedFor: h.Revoke}
		switch {
		case g.host == "":
			return e, mayTake(g, h, key)
		case same(g.hash, h.Enrolment.TokenHash):
			return e, spent(host)
		case !same(g.hash, h.Registration.TokenHash):
			return e, refusal.New(refusal.RegistrationInvalid, "The registration token of SessionHost %s was replaced meanwhile: read its Secret again.", host)
		}
		return e, nil
	})
}

// record changes a host's enrolment, as decide says for the host as it is: again, where somebody else changes it meanwhile.
func (s *Service) record(ctx context.Context, host string, decide func(*model.Host) (model.Enrolment, error)) error {
	var err error
	for range markTries {
		var h *model.Host
		var version string
		if h, version, err = s.o.Writer.GetHost(ctx, host); err != nil {
			return s.apiAway(err)
		}
		next, refused := decide(h)
		if refused != nil {
			return refused
		}
		if err = s.o.Writer.MarkEnrolled(ctx, host, version, next); err == nil {
			return nil
		}
		if !errors.Is(err, model.ErrConflict) {
			break
		}
	}
	return s.apiAway(err)
}

// serial is a certificate's serial number in hex, empty where the issuer's answer can't be read: it is there for people.
func serial(chain string) string {
	block, _ := pem.Decode([]byte(chain))
	if block == nil {
		return ""
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return ""
	}
	return cert.SerialNumber.Text(16)
}

// awaitSeen waits until the snapshot shows the host's key, and a moment for the other brokers', or has had time enough: the
// agent comes again if it must.
func (s *Service) awaitSeen(ctx context.Context, host, key string) {
	ctx, cancel := context.WithTimeout(ctx, seenWithin)
	defer cancel()
	for {
		if h := s.o.Source.Snapshot().Hosts[host]; h != nil && (h.Enrolment.Key == key || h.Enrolment.NextKey == key) {
			select {
			case <-ctx.Done():
			case <-time.After(s.elsewhere):
			}
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(seenEvery):
		}
	}
}

// requests checks what is to be signed: the identity first, with its key's fingerprint, then the RDP certificate. What was
// not asked for is nil.
func (s *Service) requests(pool *model.Pool, id identity.ID, clientCSR, rdpCSR string) (rs [2]*model.CertificateRequest, key string, err error) {
	if clientCSR != "" {
		var csr []byte
		if csr, key, err = checkClientCSR(clientCSR, id); err != nil {
			return rs, "", refusal.New(refusal.BadRequest, "clientCSR of host %s was refused: %v.", id.Host, err)
		}
		rs[0] = &model.CertificateRequest{Host: id.Host, CSR: csr, Issuer: s.o.InternalIssuer, Duration: identityDuration, Client: true}
	}
	if rdpCSR != "" {
		if pool.RDPIssuer == nil {
			return rs, "", refusal.New(refusal.BadRequest, "HostPool %s issues no RDP certificates (spec.rdpCertificate is unset), so rdpCSR must be empty.", pool.Name)
		}
		csr, err := checkRDPCSR(rdpCSR, id, pool)
		if err != nil {
			return rs, "", refusal.New(refusal.BadRequest, "rdpCSR of host %s was refused: %v.", id.Host, err)
		}
		rs[1] = &model.CertificateRequest{Host: id.Host, CSR: csr, Issuer: *pool.RDPIssuer, Duration: pool.RDPDuration, Server: true}
	}
	return rs, key, nil
}

// place takes one of the places that there are for a pool's machines, and gives what gives it back; ok is false where the pool
// has as many as are left for all.
func (s *Service) place(l inLine) (leave func(), ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.waiting[l] >= cap(l.places)-len(l.places) {
		return nil, false
	}
	l.places <- struct{}{} // there is one, and mu is held
	s.waiting[l]++
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		<-l.places
		if s.waiting[l]--; s.waiting[l] == 0 {
			delete(s.waiting, l)
		}
	}, true
}

// sign has the issuers sign, both at a time, where there is a place.
func (s *Service) sign(ctx context.Context, l inLine, rs [2]*model.CertificateRequest) (brokerapi.Certificates, error) {
	leave, ok := s.place(l)
	if !ok {
		return brokerapi.Certificates{}, refusal.New(refusal.IssuerAway, "Too many machines of HostPool %s wait for certificates: try again in a few seconds.", l.pool)
	}
	defer leave()
	var chains [2][]byte
	work, ctx := errgroup.WithContext(ctx)
	for i, r := range rs {
		if r == nil {
			continue
		}
		work.Go(func() (err error) {
			if chains[i], _, err = s.o.Writer.Sign(ctx, *r); err != nil {
				err = fmt.Errorf("issuer %s %s: %w", r.Issuer.Kind, r.Issuer.Name, err)
			}
			return err
		})
	}
	if err := work.Wait(); err != nil {
		s.o.Log.Error("no certificate", "error", err)
		return brokerapi.Certificates{}, refusal.New(refusal.IssuerAway, "No certificate was issued: %v.", err)
	}
	return brokerapi.Certificates{ClientCertificate: string(chains[0]), RDPCertificate: string(chains[1])}, nil
}

func (s *Service) apiAway(err error) error {
	s.o.Log.Error("enrolment can't be recorded", "error", err)
	return refusal.New(refusal.IssuerAway, "The enrolment can't be recorded now: %v. Try again in a moment.", err)
}

// ServeRenewals answers members over the bus, until ctx ends.
func (s *Service) ServeRenewals(ctx context.Context, nc *nats.Conn) error {
	_, err := nc.QueueSubscribe(bus.AllRenewals, bus.Brokers, func(m *nats.Msg) {
		go func() {
			ctx, cancel := context.WithTimeout(ctx, renewTimeout)
			defer cancel()
			s.answerRenewal(ctx, m)
		}()
	})
	return err
}

func (s *Service) answerRenewal(ctx context.Context, m *nats.Msg) {
	parts := strings.Split(m.Subject, ".")
	if len(parts) != 4 {
		return
	}
	// The subject is bound to the sender's certificate. The reply goes to the sender's own inbox only.
	id := identity.Agent(s.o.Namespace, s.o.Workspace, parts[2], parts[3])
	if !strings.HasPrefix(m.Reply, bus.InboxPrefix(id)+".") {
		s.o.Log.Warn("renewal with a strange reply subject", "reply", m.Reply, "host", id.Host)
		return
	}
	var req brokerapi.RenewRequest
	var res brokerapi.RenewResponse
	err := errTooLong
	if len(m.Data) <= maxRenewal {
		err = json.Unmarshal(m.Data, &req)
	}
	if err != nil {
		err = refusal.New(refusal.BadRequest, "The renewal request can't be read.")
	} else {
		res.Certificates, err = s.Renew(ctx, id, req)
	}
	res.Err = refusal.From(err)
	if err == nil {
		res.BusCA = s.o.BusCA()
	}
	if data, err := json.Marshal(res); err == nil {
		if err := m.Respond(data); err != nil {
			s.o.Log.Warn("can't answer a renewal", "host", id.Host, "error", err)
		}
	}
}

// Renew signs a member's next certificates. Its new key counts beside the one in force until the agent comes with it.
func (s *Service) Renew(ctx context.Context, id identity.ID, r brokerapi.RenewRequest) (certs brokerapi.Certificates, err error) {
	defer func() { s.count("renewal", err) }()
	snap := s.o.Source.Snapshot()
	pool, host := snap.Pools[id.Pool], snap.Hosts[id.Host]
	if pool == nil || host == nil {
		return certs, gone(id)
	}
	if r.ClientCSR == "" && r.RDPCSR == "" {
		return certs, refusal.New(refusal.BadRequest, "The renewal asks for no certificate.")
	}
	requests, key, err := s.requests(pool, id, r.ClientCSR, r.RDPCSR)
	if err != nil {
		return certs, err
	}
	end, err := s.begin(id.Host)
	if err != nil {
		return certs, err
	}
	defer end()
	if err := s.mayRenew(id, host); err != nil { // as far as is known here; below it is asked of the API server
		return certs, err
	}
	if host, _, err = s.o.Writer.GetHost(ctx, id.Host); errors.Is(err, model.ErrNotFound) {
		return certs, gone(id)
	} else if err != nil {
		return certs, s.apiAway(err)
	}
	if err := s.mayRenew(id, host); err != nil {
		return certs, err
	}
	enrolled := host.Enrolment
	if certs, err = s.sign(ctx, inLine{s.renewing, id.Pool}, requests); err != nil {
		return certs, err
	}
	err = s.record(ctx, id.Host, func(h *model.Host) (model.Enrolment, error) {
		e := h.Enrolment
		if e.Key != enrolled.Key || !e.At.Equal(enrolled.At) {
			return e, refusal.New(refusal.RegistrationInvalid, "SessionHost %s was enrolled again, or renewed, meanwhile.", id.Host)
		}
		if err := s.mayRenew(id, h); err != nil {
			return e, err
		}
		if e.NextKey != "" && s.cameWith(id.Host) == e.NextKey { // which could not be recorded: it must not be lost
			e.Key = e.NextKey
		}
		e.Renewed = s.o.Now()
		if key != "" {
			e.NextKey = key
		}
		if e.NextKey == e.Key {
			e.NextKey = ""
		}
		return e, nil
	})
	if err != nil {
		return brokerapi.Certificates{}, err
	}
	if key != "" {
		s.awaitSeen(ctx, id.Host, key)
	}
	return certs, nil
}

// mayRenew says whether a host is a member that may renew now.
func (s *Service) mayRenew(id identity.ID, h *model.Host) error {
	if h.Pool != id.Pool {
		return gone(id)
	}
	if err := member(h); err != nil {
		return refusal.New(refusal.RegistrationInvalid, "%v: enrol the machine again.", err)
	}
	e, now := &h.Enrolment, s.o.Now()
	next := e.At.Add(renewAfter)
	if after := e.Renewed.Add(renewEvery); after.After(next) {
		next = after
	}
	switch {
	case e.Key == "":
		return refusal.New(refusal.IssuerAway, "The key of SessionHost %s is yet to be recorded: try again in a few seconds.", h.Name)
	case now.Before(next):
		return refusal.New(refusal.IssuerAway, "SessionHost %s enrolled or renewed a moment ago: try again after %s.", h.Name, next.UTC().Format(time.RFC3339))
	}
	return nil
}

func gone(id identity.ID) error {
	return refusal.New(refusal.RegistrationInvalid, "SessionHost %s of pool %s does not exist any more: enrol the machine again.", id.Host, id.Pool)
}

func (s *Service) count(kind string, err error) {
	result := "ok"
	if err != nil {
		result = string(refusal.From(err).Code)
	}
	s.o.Metrics.Enrolments.WithLabelValues(kind, result).Inc()
}
