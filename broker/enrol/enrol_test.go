package enrol

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"net"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"rendezvous.dev/rendezvous/broker/internal/fake"
	"rendezvous.dev/rendezvous/broker/internal/testca"
	"rendezvous.dev/rendezvous/broker/model"
	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/config"
	"rendezvous.dev/rendezvous/wire/identity"
	"rendezvous.dev/rendezvous/wire/refusal"
)

const ns, ws = "ns", "ws"

var now = time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)

func newToken(pool, host string) (token, hash string) {
	secret := make([]byte, 32)
	rand.Read(secret)
	token = "rdvreg." + ns + "." + pool + "." + host + "." + base64.RawURLEncoding.EncodeToString(secret)
	sum := sha256.Sum256([]byte(token))
	return token, hex.EncodeToString(sum[:])
}

type fixture struct {
	*Service
	world               *fake.World
	poolToken, poolHash string
	hostToken, hostHash string
}

func setUp(t testing.TB) *fixture {
	f := &fixture{}
	f.poolToken, f.poolHash = newToken("machines", "-")
	f.hostToken, f.hostHash = newToken("linux", "linux-1")
	valid := now.Add(time.Hour)
	f.world = fake.New(&model.Snapshot{
		Workspace: &model.Workspace{Name: ws},
		Pools: map[string]*model.Pool{
			"machines": {Name: "machines", Registration: model.Registration{TokenHash: f.poolHash, Expires: valid}, MaxHosts: 100},
			"linux":    {Name: "linux", RDPIssuer: &config.Issuer{Name: "company", Kind: "ClusterIssuer"}, RDPDuration: time.Hour},
			"bare":     {Name: "bare"},
		},
		Hosts: map[string]*model.Host{
			"linux-1": {Name: "linux-1", Pool: "linux", Registration: model.Registration{TokenHash: f.hostHash, Expires: valid}},
			"taken":   {Name: "taken", Pool: "machines", MadeByToken: true, Enrolment: model.Enrolment{TokenHash: "old"}, Agent: &model.AgentStatus{}},
			"unheard": {Name: "unheard", Pool: "machines", MadeByToken: true},
		},
	})
	ca := testca.New(t, "ca")
	f.world.Signer = func(r model.CertificateRequest) ([]byte, error) { return ca.SignCSR(r.CSR), nil }
	f.Service = New(Options{
		Namespace: ns, Workspace: ws, Source: f.world, Writer: f.world, InternalIssuer: config.Issuer{Name: "internal"},
		BusURLs: []string{"tls://bus:4222"}, BusCA: func() string { return "CA" }, Now: func() time.Time { return now },
	})
	f.elsewhere = 0
	return f
}

func makeCSR(t testing.TB, key crypto.Signer, tmpl x509.CertificateRequest) string {
	t.Helper()
	if key == nil {
		var err error
		if key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
			t.Fatal(err)
		}
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &tmpl, key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
}

func clientCSR(t testing.TB, pool, host string) string {
	return makeCSR(t, nil, x509.CertificateRequest{URIs: []*url.URL{identity.Agent(ns, ws, pool, host).URI()}})
}

func rdpCSR(t *testing.T, pool, host string) string {
	names := brokerapi.RDPNames(ns, pool, host)
	return makeCSR(t, nil, x509.CertificateRequest{Subject: pkix.Name{CommonName: names[0]}, DNSNames: names})
}

func wantCode(t *testing.T, err error, want refusal.Code) {
	t.Helper()
	var r *refusal.Error
	if errors.As(err, &r); err == nil && want != "" || r != nil && r.Code != want || err != nil && r == nil {
		t.Fatalf("got %v, want code %q", err, want)
	}
}

func TestPoolToken(t *testing.T) {
	f := setUp(t)
	pre, err := f.Pre(f.poolToken)
	if err != nil || pre.Pool != "machines" || pre.Host != "" || pre.RDPCertificate {
		t.Fatalf("%+v %v", pre, err)
	}
	res, err := f.Enroll(t.Context(), brokerapi.EnrollRequest{Token: f.poolToken, Host: "m1", ClientCSR: clientCSR(t, "machines", "m1")})
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode([]byte(res.ClientCertificate))
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	if id, err := identity.FromCertificate(cert); err != nil || id != identity.Agent(ns, ws, "machines", "m1") {
		t.Errorf("identity %v %v", id, err)
	}
	if res.BusCA != "CA" || len(res.BusURLs) != 1 || res.RDPCertificate != "" {
		t.Errorf("%+v", res)
	}
	if h := f.world.Snapshot().Hosts["m1"]; h == nil || h.Pool != "machines" || !h.MadeByToken || h.Enrolment != (model.Enrolment{
		TokenHash: f.poolHash, Serial: cert.SerialNumber.Text(16), At: now, HostUID: h.UID, Key: identity.KeyFingerprint(cert.RawSubjectPublicKeyInfo),
	}) {
		t.Errorf("host %+v", h)
	}
	for host, want := range map[string]refusal.Code{"m2": "", "unheard": "", "taken": refusal.BadRequest, "linux-1": refusal.BadRequest, "Bad.Name": refusal.BadRequest} {
		_, err := f.Enroll(t.Context(), brokerapi.EnrollRequest{Token: f.poolToken, Host: host, ClientCSR: clientCSR(t, "machines", host)})
		t.Run(host, func(t *testing.T) { wantCode(t, err, want) })
	}
}

// In a Personal pool a machine of a name from before is its user's again, which the operator sees to: until it has, nobody
// enrols as it.
func TestPersonalPoolWaitsForTheOperator(t *testing.T) {
	f := setUp(t)
	g := grant{pool: &model.Pool{Name: "machines", Personal: true}, hash: f.poolHash}
	seen := model.Host{Name: "pc", Pool: "machines", MadeByToken: true}
	fresh := seen
	fresh.New = true
	if err := mayTake(g, &seen, "key"); err != nil {
		t.Errorf("a host that the operator has seen: %v", err)
	}
	if err := mayTake(g, &fresh, "key"); refusal.From(err).Code != refusal.IssuerAway {
		t.Errorf("a host that it has not seen: %v", err)
	}
	g.pool.Personal = false
	if err := mayTake(g, &fresh, "key"); err != nil {
		t.Errorf("where hosts are nobody's own: %v", err)
	}
	restored := seen
	restored.AssignedUser = "alice"
	if err := mayTake(g, &restored, "key"); refusal.From(err).Code != refusal.BadRequest {
		t.Errorf("alice's machine, by the pool's token: %v", err)
	}
}

func TestHostTokenOnce(t *testing.T) {
	f := setUp(t)
	pre, err := f.Pre(f.hostToken)
	if err != nil || pre.Host != "linux-1" || !pre.RDPCertificate {
		t.Fatalf("%+v %v", pre, err)
	}
	req := brokerapi.EnrollRequest{Token: f.hostToken, Host: "linux-1", ClientCSR: clientCSR(t, "linux", "linux-1"), RDPCSR: rdpCSR(t, "linux", "linux-1")}
	other := req
	other.Host = "linux-2"
	_, err = f.Enroll(t.Context(), other)
	wantCode(t, err, refusal.BadRequest)
	res, err := f.Enroll(t.Context(), req)
	if err != nil || res.RDPCertificate == "" {
		t.Fatalf("%+v %v", res, err)
	}
	_, err = f.Enroll(t.Context(), req)
	wantCode(t, err, refusal.RegistrationSpent)
	_, err = f.Pre(f.hostToken)
	wantCode(t, err, refusal.RegistrationSpent)
}

// Two who use a host's token at one moment both get as far as a signature; one gets a certificate.
func TestRacingHostToken(t *testing.T) {
	f := setUp(t)
	both := make(chan struct{}, 2)
	gate := sync.OnceFunc(func() { <-both; <-both })
	f.world.BeforeMark = func() { both <- struct{}{}; gate() }
	errs := make(chan error, 2)
	for _, broker := range []*Service{f.Service, New(f.o)} { // one broker would not ask for both at a time
		go func() {
			_, err := broker.Enroll(t.Context(), brokerapi.EnrollRequest{Token: f.hostToken, Host: "linux-1", ClientCSR: clientCSR(t, "linux", "linux-1")})
			errs <- err
		}()
	}
	first, second := <-errs, <-errs
	if first != nil {
		first, second = second, first
	}
	wantCode(t, first, "")
	wantCode(t, second, refusal.RegistrationSpent)
	if f.world.Signed() != 2 {
		t.Fatalf("%d signed: they did not race", f.world.Signed())
	}
}

func TestMarkSurvivesOtherWriters(t *testing.T) {
	f := setUp(t)
	times := 0
	f.world.BeforeMark = func() {
		if times++; times < markTries {
			f.world.EditHost("linux-1", func(h *model.Host) { h.Generation++ })
		}
	}
	_, err := f.Enroll(t.Context(), brokerapi.EnrollRequest{Token: f.hostToken, Host: "linux-1", ClientCSR: clientCSR(t, "linux", "linux-1")})
	wantCode(t, err, "")
}

func TestRefusedTokens(t *testing.T) {
	f := setUp(t)
	unknown, _ := newToken("machines", "-")
	noPool, _ := newToken("none", "-")
	noToken, _ := newToken("bare", "-")
	otherHost, _ := newToken("linux", "linux-9")
	wrongPool := strings.Replace(f.hostToken, ".linux.", ".machines.", 1)
	elsewhere := strings.Replace(f.poolToken, "rdvreg.ns.", "rdvreg.else.", 1)
	expired, expiredHash := newToken("machines", "-")
	for _, c := range []struct {
		name, token string
		edit        func(*model.Snapshot)
		want        refusal.Code
	}{
		{name: "good", token: f.poolToken},
		{name: "empty", token: "", want: refusal.RegistrationInvalid},
		{name: "rubbish", token: "a.b.c.d.e", want: refusal.RegistrationInvalid},
		{name: "short secret", token: f.poolToken[:len(f.poolToken)-4], want: refusal.RegistrationInvalid},
		{name: "unknown secret", token: unknown, want: refusal.RegistrationInvalid},
		{name: "unknown pool", token: noPool, want: refusal.RegistrationInvalid},
		{name: "pool without a token", token: noToken, want: refusal.RegistrationInvalid},
		{name: "unknown host", token: otherHost, want: refusal.RegistrationInvalid},
		{name: "another pool's host", token: wrongPool, want: refusal.RegistrationInvalid},
		{name: "another namespace", token: elsewhere, want: refusal.RegistrationInvalid},
		{name: "expired", token: expired, want: refusal.RegistrationExpired, edit: func(s *model.Snapshot) {
			p := *s.Pools["machines"]
			p.Registration = model.Registration{TokenHash: expiredHash, Expires: now}
			s.Pools["machines"] = &p
		}},
		{name: "rotated away", token: f.poolToken, want: refusal.RegistrationInvalid},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.edit != nil {
				f.world.Edit(c.edit)
			}
			_, err := f.Pre(c.token)
			wantCode(t, err, c.want)
			_, err = f.Enroll(t.Context(), brokerapi.EnrollRequest{Token: c.token, Host: "m1", ClientCSR: clientCSR(t, "machines", "m1")})
			wantCode(t, err, c.want)
		})
	}
}

func TestRefusedCSRs(t *testing.T) {
	f := setUp(t)
	uri := identity.Agent(ns, ws, "linux", "linux-1").URI()
	names := brokerapi.RDPNames(ns, "linux", "linux-1")
	small, _ := rsa.GenerateKey(rand.Reader, 1024)
	large, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	p224, _ := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	ext := pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 19}, Value: []byte{0x30, 0x03, 0x01, 0x01, 0xff}} // CA: true
	// A name of a kind that Go doesn't list: otherName, as Windows logons use it.
	otherName := pkix.Extension{Id: oidSubjectAltName, Value: func() []byte {
		raw, err := asn1.Marshal([]asn1.RawValue{
			{Class: 2, Tag: 6, Bytes: []byte(uri.String())}, {Class: 2, Tag: 0, IsCompound: true, Bytes: []byte{0x06, 0x03, 0x2a, 0x03, 0x04, 0xa0, 0x02, 0x0c, 0x00}},
		})
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}()}
	good := makeCSR(t, nil, x509.CertificateRequest{URIs: []*url.URL{uri}})
	block, _ := pem.Decode([]byte(good))
	block.Bytes[len(block.Bytes)-1] ^= 1
	forged := string(pem.EncodeToMemory(block))
	for _, c := range []struct {
		name, client, rdp string
		ok                bool
	}{
		{name: "good", client: good, rdp: rdpCSR(t, "linux", "linux-1"), ok: true},
		{name: "RSA 2048", client: makeCSR(t, large, x509.CertificateRequest{URIs: []*url.URL{uri}, Subject: pkix.Name{CommonName: "linux-1"}}), ok: true},
		{name: "missing", client: ""},
		{name: "no PEM", client: "x"},
		{name: "two blocks", client: good + good},
		{name: "too long", client: good + strings.Repeat("\n", maxCSR)},
		{name: "forged signature", client: forged},
		{name: "RSA 1024", client: makeCSR(t, small, x509.CertificateRequest{URIs: []*url.URL{uri}})},
		{name: "P-224", client: makeCSR(t, p224, x509.CertificateRequest{URIs: []*url.URL{uri}})},
		{name: "another host", client: clientCSR(t, "linux", "linux-2")},
		{name: "another pool", client: clientCSR(t, "machines", "linux-1")},
		{name: "another role", client: makeCSR(t, nil, x509.CertificateRequest{URIs: []*url.URL{identity.Gateway(ns, ws, "g").URI()}})},
		{name: "two URIs", client: makeCSR(t, nil, x509.CertificateRequest{URIs: []*url.URL{uri, identity.Broker(ns, ws).URI()}})},
		{name: "a DNS name too", client: makeCSR(t, nil, x509.CertificateRequest{URIs: []*url.URL{uri}, DNSNames: []string{"broker"}})},
		{name: "an address too", client: makeCSR(t, nil, x509.CertificateRequest{URIs: []*url.URL{uri}, IPAddresses: []net.IP{net.IPv4(1, 2, 3, 4)}})},
		{name: "a name of another kind too", client: makeCSR(t, nil, x509.CertificateRequest{ExtraExtensions: []pkix.Extension{otherName}})},
		{name: "another extension", client: makeCSR(t, nil, x509.CertificateRequest{URIs: []*url.URL{uri}, ExtraExtensions: []pkix.Extension{ext}})},
		{name: "another common name", client: makeCSR(t, nil, x509.CertificateRequest{URIs: []*url.URL{uri}, Subject: pkix.Name{CommonName: "admin"}})},
		{name: "an organisation", client: makeCSR(t, nil, x509.CertificateRequest{URIs: []*url.URL{uri}, Subject: pkix.Name{Organization: []string{"system:masters"}}})},
		{name: "RDP: another host", client: good, rdp: rdpCSR(t, "linux", "linux-2")},
		{name: "RDP: one name missing", client: good, rdp: makeCSR(t, nil, x509.CertificateRequest{DNSNames: names[:1]})},
		{name: "RDP: one name more", client: good, rdp: makeCSR(t, nil, x509.CertificateRequest{DNSNames: append([]string{"www.example.com"}, names...)})},
		{name: "RDP: a name twice", client: good, rdp: makeCSR(t, nil, x509.CertificateRequest{DNSNames: []string{names[0], names[0]}})},
		{name: "RDP: a URI too", client: good, rdp: makeCSR(t, nil, x509.CertificateRequest{DNSNames: names, URIs: []*url.URL{uri}})},
	} {
		t.Run(c.name, func(t *testing.T) {
			want := refusal.BadRequest
			if c.ok {
				want = ""
			}
			f := setUp(t)
			_, err := f.Enroll(t.Context(), brokerapi.EnrollRequest{Token: f.hostToken, Host: "linux-1", ClientCSR: c.client, RDPCSR: c.rdp})
			wantCode(t, err, want)
		})
	}
	_, err = f.Enroll(t.Context(), brokerapi.EnrollRequest{Token: f.poolToken, Host: "m1", ClientCSR: clientCSR(t, "machines", "m1"), RDPCSR: rdpCSR(t, "machines", "m1")})
	wantCode(t, err, refusal.BadRequest) // the pool issues none
}

func TestIssuerAway(t *testing.T) {
	f := setUp(t)
	f.world.Signer = func(model.CertificateRequest) ([]byte, error) { return nil, model.ErrDenied }
	req := brokerapi.EnrollRequest{Token: f.hostToken, Host: "linux-1", ClientCSR: clientCSR(t, "linux", "linux-1")}
	_, err := f.Enroll(t.Context(), req)
	wantCode(t, err, refusal.IssuerAway)
	if f.world.Snapshot().Hosts["linux-1"].Enrolment.TokenHash != "" {
		t.Error("the token is spent though no certificate was made")
	}
	f.world.Away = errors.New("connection refused")
	_, err = f.Enroll(t.Context(), req)
	wantCode(t, err, refusal.IssuerAway)
}

func TestUnknownsAreHeldOff(t *testing.T) {
	f := setUp(t)
	held := 0
	for range unknownBurst + 50 {
		_, err := f.Pre("rubbish")
		if refusal.From(err).Code == refusal.IssuerAway {
			held++
		}
	}
	if held != 50 {
		t.Errorf("%d held off, want 50", held)
	}
	if _, err := f.Pre(f.poolToken); err != nil {
		t.Errorf("one with a token was held off too: %v", err)
	}
}
