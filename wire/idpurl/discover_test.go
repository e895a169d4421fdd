package idpurl

import (
	"io"
	"net/http"
	"strings"
	"testing"
)

type answer http.Response

func (a *answer) RoundTrip(r *http.Request) (*http.Response, error) {
	res := http.Response(*a)
	res.Request = r
	return &res, nil
}

// Whoever names an address reads what the error says of it.
func TestDiscoverRepeatsNothing(t *testing.T) {
	const secret = "inner secret"
	for name, a := range map[string]*answer{
		"a page":       {StatusCode: 403, Status: "403 Forbidden", Body: io.NopCloser(strings.NewReader(secret))},
		"a status":     {StatusCode: 403, Status: "403 " + secret, Body: io.NopCloser(strings.NewReader(""))},
		"not JSON":     {StatusCode: 200, Body: io.NopCloser(strings.NewReader(secret))},
		"another JSON": {StatusCode: 200, Body: io.NopCloser(strings.NewReader(`{"password":"` + secret + `"}`))},
		"no keys":      {StatusCode: 200, Body: io.NopCloser(strings.NewReader(`{"issuer":"https://id.example.test","password":"` + secret + `"}`))},
	} {
		_, _, err := Discover(t.Context(), &http.Client{Transport: a}, "https://id.example.test")
		if err == nil || strings.Contains(err.Error(), secret) || len(err.Error()) > 1000 {
			t.Errorf("%s: %v", name, err)
		}
	}
}
