package idpurl

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

func TestEndpoints(t *testing.T) {
	const issuer, local = "https://id.example.com", "https://127.0.0.1:5556/dex"
	for name, c := range map[string]struct {
		issuer, address string
		ok              bool
	}{
		"https":                          {issuer, "https://id.example.com/auth", true},
		"another host":                   {issuer, "https://login.example.com/auth?tenant=x", true},
		"absent":                         {issuer, "", true},
		"http":                           {issuer, "http://id.example.com/auth", false},
		"loopback":                       {local, "http://127.0.0.1:5556/dex/auth", true},
		"loopback by name":               {"http://localhost:5556", "http://localhost:5556/auth", true},
		"loopback, IPv6":                 {"http://[::1]:5556", "http://[::1]:5556/auth", true},
		"loopback of a foreign issuer":   {issuer, "http://127.0.0.1:6443/api", false},
		"a loopback issuer's other host": {local, "http://id.example.com/auth", false},
		"a name that begins like one":    {local, "http://localhost.example.com/auth", false},
		"another scheme":                 {issuer, `search-ms:query=x&crumb=location:\\evil\share`, false},
		"a file":                         {issuer, "file:///etc/passwd", false},
		"no host":                        {issuer, "https:///auth", false},
		"relative":                       {issuer, "/auth", false},
		"a user in it":                   {issuer, "https://id.example.com@evil.example.com/auth", false},
		"a fragment":                     {issuer, "https://id.example.com/auth#x", false},
		"control characters":             {issuer, "https://id.example.com/\x1b[2J", false},
	} {
		t.Run(name, func(t *testing.T) {
			for field, e := range map[string]Endpoints{
				"authorization_endpoint": {Authorization: c.address}, "token_endpoint": {Token: c.address},
				"device_authorization_endpoint": {DeviceAuthorization: c.address}, "jwks_uri": {JWKS: c.address},
			} {
				switch err := e.Check(c.issuer); {
				case c.ok && err != nil:
					t.Errorf("%s: %v", field, err)
				case !c.ok && (err == nil || !strings.HasPrefix(err.Error(), field+" is ")):
					t.Errorf("%s: got %v, want a refusal that names it", field, err)
				}
			}
		})
	}
	if err := (Endpoints{JWKS: "http://" + strings.Repeat("x", 1<<20)}).Check(issuer); err == nil || len(err.Error()) > 1000 {
		t.Error("an error may be as long as the document")
	}
	for address, ok := range map[string]bool{"": false, "http://id.example.com": false, issuer: true, "http://127.0.0.1:5556": true} {
		if err := CheckIssuer(address); (err == nil) != ok {
			t.Errorf("issuer %q: %v", address, err)
		}
	}
}

func TestIsWebPage(t *testing.T) {
	for address, want := range map[string]bool{
		"https://id.example.com/auth": true, "http://127.0.0.1/auth": true,
		`search-ms:query=x`: false, "file:///x": false, "javascript:alert(1)": false, "https:x": false, "--help": false, "": false,
	} {
		if IsWebPage(address) != want {
			t.Errorf("%q: %v, want %v", address, !want, want)
		}
	}
}

func TestCheckRedirect(t *testing.T) {
	request := func(method, address string) *http.Request { return httptest.NewRequest(method, address, nil) }
	hop := func(addresses ...string) (via []*http.Request) {
		for _, a := range addresses {
			via = append(via, request("GET", a))
		}
		return via
	}
	for name, c := range map[string]struct {
		next string
		via  []*http.Request
		err  string
	}{
		"https":                     {"https://b.example.com", hop("https://a.example.com"), ""},
		"three":                     {"https://d.example.com", hop("https://a", "https://b", "https://c"), ""},
		"four":                      {"https://e.example.com", hop("https://a", "https://b", "https://c", "https://d"), "more than 3 times"},
		"to http":                   {"http://a.example.com", hop("https://a.example.com"), "not https"},
		"to http on loopback":       {"http://127.0.0.1/x", hop("https://a.example.com"), "not https"},
		"loopback stays there":      {"http://127.0.0.1/y", hop("http://127.0.0.1/x"), ""},
		"loopback to another host":  {"http://a.example.com", hop("http://127.0.0.1/x"), "not https"},
		"loopback through https":    {"http://127.0.0.1/y", hop("http://127.0.0.1/x", "https://a.example.com"), "not https"},
		"another scheme":            {"file:///etc/passwd", hop("https://a.example.com"), "not https"},
		"a POST, whatever it is to": {"https://a.example.com/b", []*http.Request{request("POST", "https://a.example.com")}, "not followed"},
	} {
		t.Run(name, func(t *testing.T) {
			err := CheckRedirect(request("GET", c.next), c.via)
			if c.err == "" && err != nil || c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)) {
				t.Errorf("got %v, want %q", err, c.err)
			}
		})
	}
}
