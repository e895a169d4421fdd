package fleet

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"time"
)

// clientID is what the provider's tokens are for.
const clientID = "fleet"

// provider is an OpenID Connect provider with as many users as there are sessions, which the samples' Dex has not. It
// signs everybody in.
type provider struct {
	// issuer is its URL, ca (PEM) what verifies it.
	issuer, ca string
	key        ed25519.PrivateKey
	server     *http.Server
}

// newProvider serves on an address of this machine that pods reach.
func newProvider(ip string) (*provider, error) {
	cert, ca, err := selfSigned(net.ParseIP(ip))
	if err != nil {
		return nil, err
	}
	l, err := tls.Listen("tcp", net.JoinHostPort(ip, "0"), &tls.Config{Certificates: []tls.Certificate{cert}})
	if err != nil {
		return nil, fmt.Errorf("fleet: identity provider: %w", err)
	}
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	p := &provider{issuer: "https://" + l.Addr().String(), ca: ca, key: private}
	mux := http.NewServeMux()
	answer := func(path string, v any) {
		mux.HandleFunc("GET "+path, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			json.NewEncoder(w).Encode(v)
		})
	}
	answer("/.well-known/openid-configuration", map[string]any{
		"issuer": p.issuer, "jwks_uri": p.issuer + "/keys", "authorization_endpoint": p.issuer + "/auth", "token_endpoint": p.issuer + "/token",
		"response_types_supported": []string{"code"}, "subject_types_supported": []string{"public"}, "id_token_signing_alg_values_supported": []string{"EdDSA"},
	})
	answer("/keys", map[string]any{"keys": []map[string]string{{"kty": "OKP", "crv": "Ed25519", "alg": "EdDSA", "use": "sig", "kid": "fleet", "x": base64.RawURLEncoding.EncodeToString(public)}}})
	p.server = &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second, ErrorLog: log.New(io.Discard, "", 0)}
	go p.server.Serve(l)
	return p, nil
}

func (p *provider) close() { p.server.Close() }

// token signs a user in.
func (p *provider) token(user string) (string, error) {
	now := time.Now()
	var parts [2]string
	for i, v := range []map[string]any{
		{"alg": "EdDSA", "typ": "JWT", "kid": "fleet"},
		{"iss": p.issuer, "sub": user, "aud": clientID, "email": user, "email_verified": true, "groups": []string{group}, "iat": now.Unix(), "exp": now.Add(time.Hour).Unix()},
	} {
		text, err := json.Marshal(v)
		if err != nil {
			return "", err
		}
		parts[i] = base64.RawURLEncoding.EncodeToString(text)
	}
	signed := parts[0] + "." + parts[1]
	return signed + "." + base64.RawURLEncoding.EncodeToString(ed25519.Sign(p.key, []byte(signed))), nil
}

// selfSigned makes a server certificate of an address, which is its own CA (PEM).
func selfSigned(ip net.IP) (cert tls.Certificate, ca string, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return cert, "", err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), IPAddresses: []net.IP{ip}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage:  x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return cert, "", err
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})), nil
}
