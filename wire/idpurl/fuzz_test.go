package idpurl

import (
	"encoding/json"
	"net"
	"net/url"
	"strings"
	"testing"
)

// Whatever a discovery document names, only https addresses pass, and loopback ones of an issuer on loopback.
func FuzzEndpoints(f *testing.F) {
	f.Add("https://idp.example.test", []byte(`{"authorization_endpoint":"https://idp.example.test/auth","token_endpoint":"https://idp.example.test/token","jwks_uri":"https://keys.example.test/"}`))
	f.Add("http://localhost:5556/dex", []byte(`{"jwks_uri":"http://127.0.0.1:1/keys","device_authorization_endpoint":"HTTP://[::1]/"}`))
	f.Add("https://idp", []byte(`{"jwks_uri":"https://user@169.254.169.254/","token_endpoint":"search-ms:x"}`))
	f.Fuzz(func(t *testing.T, issuer string, data []byte) {
		var e Endpoints
		if json.Unmarshal(data, &e) != nil {
			return
		}
		if err := e.Check(issuer); err != nil {
			if len(err.Error()) > 8*maxShown {
				t.Errorf("an error of %d bytes", len(err.Error()))
			}
			return
		}
		for _, address := range []string{e.Authorization, e.Token, e.DeviceAuthorization, e.JWKS} {
			if address == "" {
				continue
			}
			u, err := url.Parse(address)
			if err != nil || u.Host == "" || u.User != nil || u.Fragment != "" {
				t.Fatalf("%q passes", address)
			}
			if strings.HasPrefix(strings.ToLower(address), "https://") {
				continue
			}
			of, err := url.Parse(issuer)
			if u.Scheme != "http" || err != nil || !own(u.Hostname()) || !own(of.Hostname()) {
				t.Fatalf("%q of %q passes", address, issuer)
			}
		}
	})
}

func own(host string) bool {
	return strings.EqualFold(host, "localhost") || net.ParseIP(host).IsLoopback()
}
