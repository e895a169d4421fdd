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
	// maxWorking bounds enrolments and renewals that wait for an issuer.
	maxWorking = 64
	markTries  = 5
	// issueTime is the longest from an identity's NotBefore until its enrolment is recorded. Some issuers date
	// certificates back by an hour, for clients whose clocks are behind.
	issueTime = 65 * time.Minute
	// seenWithin is how long an enrolment waits to be seen here, so that its agent is known when it comes.
	seenWithin, seenEvery = 3 * time.Second, 20 * time.Millisecond
	// renewTimeout bounds one renewal.
	renewTimeout = time.Minute
)

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
	o       Options
	unknown *rate.Limiter
	working chan struct{}
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
	return &Service{o: o, unknown: rate.NewLimiter(unknownPerSecond, unknownBurst), working: make(chan struct{}, maxWorking)}
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
		if same(g.hash, h.EnrolledWith) {
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
		Namespace: s.o.Namespace, Workspace: s.o.Workspace, Pool: g.pool.Name, Host: g.host, RDPCertificate: g.pool.RDPIssuer != nil,
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
	requests, err := s.requests(g.pool, id, r.ClientCSR, r.RDPCSR)
	if err != nil {
		return res, err
	}
	if requests[0] == nil {
		return res, refusal.New(refusal.BadRequest, "clientCSR is missing.")
	}
	if err := s.admit(ctx, g, r.Host); err != nil {
		return res, err
	}
	certs, err := s.sign(ctx, requests)
	if err != nil {
		return res, err
	}
	// Only now, and only for one of those who try at once, does the token count as used; the certificates go to that one.
	if err := s.mark(ctx, g, r.Host, serial(certs.ClientCertificate)); err != nil {
		return res, err
	}
	s.awaitSeen(ctx, r.Host, g.hash)
	s.o.Log.Info("host enrolled", "pool", g.pool.Name, "host", r.Host, "token", kind)
	return brokerapi.EnrollResponse{
		Namespace: s.o.Namespace, Workspace: s.o.Workspace, Pool: g.pool.Name, Host: r.Host,
		Certificates: certs, BusURLs: s.o.BusURLs, BusCA: s.o.BusCA(),
	}, nil
}

// admit makes the SessionHost of a machine that comes with its pool's token. The name must be free, or its holder never
// have been heard of: a token that many machines hold must not let one take another's place.
func (s *Service) admit(ctx context.Context, g grant, host string) error {
	if g.host != "" {
		return nil
	}
	err := s.o.Writer.CreateHost(ctx, g.pool, host)
	if err == nil {
		return nil
	}
	if !errors.Is(err, model.ErrExists) {
		return s.apiAway(err)
	}
	h, _, err := s.o.Writer.GetHost(ctx, host)
	switch {
	case err != nil:
		return s.apiAway(err)
	case h.Pool != g.pool.Name:
		return refusal.New(refusal.BadRequest, "SessionHost %s exists in another pool: give the machine another name.", host)
	case h.Agent != nil:
		return refusal.New(refusal.BadRequest, "SessionHost %s is another machine's, or this one's from before: give the machine another name, or delete the SessionHost to enrol it again.", host)
	}
	return nil
}

// mark records the enrolment. A host's own token is spent by it.
func (s *Service) mark(ctx context.Context, g grant, host, serial string) error {
	var err error
	for range markTries {
		var h *model.Host
		var version string
		if h, version, err = s.o.Writer.GetHost(ctx, host); err != nil {
			return s.apiAway(err)
		}
		if g.host != "" {
			switch {
			case same(g.hash, h.EnrolledWith):
				return spent(host)
			case !same(g.hash, h.Registration.TokenHash):
				return refusal.New(refusal.RegistrationInvalid, "The registration token of SessionHost %s was replaced meanwhile: read its Secret again.", host)
			}
		}
		if err = s.o.Writer.MarkEnrolled(ctx, host, version, model.Enrolment{TokenHash: g.hash, Serial: serial, At: s.o.Now()}); err == nil {
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

// awaitSeen waits until the snapshot shows the enrolment, or has had time enough: the agent comes again if it must.
func (s *Service) awaitSeen(ctx context.Context, host, hash string) {
	ctx, cancel := context.WithTimeout(ctx, seenWithin)
	defer cancel()
	for {
		if h := s.o.Source.Snapshot().Hosts[host]; h != nil && h.EnrolledWith == hash {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(seenEvery):
		}
	}
}

// Member says whether the holder of an agent's identity, issued when, is (still) that host: the SessionHost is there,
// and no other machine has enrolled as it since. While nothing is known of the declared world, the certificate counts.
func (s *Service) Member(id identity.ID, issued time.Time) error {
	snap := s.o.Source.Snapshot()
	if snap.Workspace == nil || id.Role != identity.RoleAgent {
		return nil
	}
	switch h := snap.Hosts[id.Host]; {
	case h == nil || h.Pool != id.Pool:
		return fmt.Errorf("SessionHost %s of pool %s does not exist (any more)", id.Host, id.Pool)
	case issued.Add(issueTime).Before(h.EnrolledAt):
		return fmt.Errorf("SessionHost %s was enrolled again at %s, and this certificate is older", id.Host, h.EnrolledAt.UTC().Format(time.RFC3339))
	}
	return nil
}

// requests checks what is to be signed: the identity first, then the RDP certificate. What was not asked for is nil.
func (s *Service) requests(pool *model.Pool, id identity.ID, clientCSR, rdpCSR string) ([2]*model.CertificateRequest, error) {
	var rs [2]*model.CertificateRequest
	if clientCSR != "" {
		csr, err := checkClientCSR(clientCSR, id)
		if err != nil {
			return rs, refusal.New(refusal.BadRequest, "clientCSR of host %s was refused: %v.", id.Host, err)
		}
		rs[0] = &model.CertificateRequest{Host: id.Host, CSR: csr, Issuer: s.o.InternalIssuer, Duration: identityDuration, Client: true}
	}
	if rdpCSR != "" {
		if pool.RDPIssuer == nil {
			return rs, refusal.New(refusal.BadRequest, "HostPool %s issues no RDP certificates (spec.rdpCertificate is unset), so rdpCSR must be empty.", pool.Name)
		}
		csr, err := checkRDPCSR(rdpCSR, id)
		if err != nil {
			return rs, refusal.New(refusal.BadRequest, "rdpCSR of host %s was refused: %v.", id.Host, err)
		}
		rs[1] = &model.CertificateRequest{Host: id.Host, CSR: csr, Issuer: *pool.RDPIssuer, Duration: pool.RDPDuration, Server: true}
	}
	return rs, nil
}

// sign has the issuers sign, both at a time.
func (s *Service) sign(ctx context.Context, rs [2]*model.CertificateRequest) (brokerapi.Certificates, error) {
	select {
	case s.working <- struct{}{}:
		defer func() { <-s.working }()
	default:
		return brokerapi.Certificates{}, refusal.New(refusal.IssuerAway, "Too many machines wait for certificates: try again in a few seconds.")
	}
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
	err := json.Unmarshal(m.Data, &req)
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

// Renew signs a member's next certificates.
func (s *Service) Renew(ctx context.Context, id identity.ID, r brokerapi.RenewRequest) (certs brokerapi.Certificates, err error) {
	defer func() { s.count("renewal", err) }()
	snap := s.o.Source.Snapshot()
	pool, host := snap.Pools[id.Pool], snap.Hosts[id.Host]
	if pool == nil || host == nil || host.Pool != id.Pool {
		return certs, refusal.New(refusal.RegistrationInvalid, "SessionHost %s of pool %s does not exist any more: enrol the machine again.", id.Host, id.Pool)
	}
	if r.ClientCSR == "" && r.RDPCSR == "" {
		return certs, refusal.New(refusal.BadRequest, "The renewal asks for no certificate.")
	}
	requests, err := s.requests(pool, id, r.ClientCSR, r.RDPCSR)
	if err != nil {
		return certs, err
	}
	return s.sign(ctx, requests)
}

func (s *Service) count(kind string, err error) {
	result := "ok"
	if err != nil {
		result = string(refusal.From(err).Code)
	}
	s.o.Metrics.Enrolments.WithLabelValues(kind, result).Inc()
}
