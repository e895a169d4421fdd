package stage

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"
)

// Issuer is the sample identity provider, a real Dex.
const Issuer = "https://dex.rdv.test:5556/dex"

// Dialer dials the names of the sample's DNS from this machine.
func Dialer() *net.Dialer {
	return &net.Dialer{Timeout: 10 * time.Second, Resolver: &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, network, net.JoinHostPort(DNS, "53"))
	}}}
}

// TLS trusts the company's CA, and nothing else.
func (s *Stage) TLS() *tls.Config {
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(s.CompanyCA)
	return &tls.Config{RootCAs: roots}
}

// HTTP is a client on this machine that resolves and trusts as users' machines do.
func (s *Stage) HTTP() *http.Client {
	return &http.Client{Timeout: time.Minute, Transport: &http.Transport{DialContext: Dialer().DialContext, TLSClientConfig: s.TLS()}}
}

// Token has Dex sign a user of the samples in for one of its clients ("rdv", "other") and returns the id token.
func (s *Stage) Token(ctx context.Context, user, clientID string) (string, error) {
	form := url.Values{"grant_type": {"password"}, "scope": {"openid email groups profile"}, "client_id": {clientID},
		"username": {user + "@example.test"}, "password": {user + "-demo"}}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, Issuer+"/token", strings.NewReader(form.Encode()))
	if err != nil {
		return "", err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	resp, err := s.HTTP().Do(req)
	if err != nil {
		return "", fmt.Errorf("stage: token: %w", err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil || resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("stage: Dex gave no token for %s: %s: %s %v", user, resp.Status, body, err)
	}
	var answer struct {
		IDToken string `json:"id_token"`
	}
	if err := json.Unmarshal(body, &answer); err != nil || answer.IDToken == "" {
		return "", fmt.Errorf("stage: Dex gave no id token for %s: %s", user, body)
	}
	return answer.IDToken, nil
}
