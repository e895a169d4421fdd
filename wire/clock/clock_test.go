package clock

import (
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

func TestHint(t *testing.T) {
	now := time.Date(2030, 1, 1, 12, 0, 0, 0, time.UTC)
	expired := x509.CertificateInvalidError{Reason: x509.Expired}
	for name, c := range map[string]struct {
		date string // that the server says, empty for none
		err  error
		want string
	}{
		"as it should be":   {now.Add(30 * time.Second).Format(http.TimeFormat), nil, ""},
		"behind":            {now.Add(7 * time.Minute).Format(http.TimeFormat), nil, "; this machine's clock is 7 minutes behind 127.0.0.1's: set it right"},
		"ahead":             {now.Add(-3 * time.Hour).Format(http.TimeFormat), nil, "3 hours ahead of"},
		"a little":          {now.Add(-80 * time.Second).Format(http.TimeFormat), nil, "a minute ahead of"},
		"years":             {now.Add(-1000 * 24 * time.Hour).Format(http.TimeFormat), nil, "1000 days ahead of"},
		"no date":           {"", nil, ""},
		"rubbish":           {"yesterday", nil, ""},
		"a certificate":     {"", fmt.Errorf("x: %w", expired), "; this machine's clock says 2030-01-01 12:00 UTC: is that right?"},
		"both":              {now.Add(time.Hour).Format(http.TimeFormat), expired, "behind"},
		"another complaint": {"", x509.CertificateInvalidError{Reason: x509.NotAuthorizedToSign}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Header()["Date"] = []string{c.date} }))
			defer s.Close()
			w := &Watch{Now: func() time.Time { return now }}
			res, err := (&http.Client{Transport: w.Transport(http.DefaultTransport)}).Get(s.URL)
			if err != nil {
				t.Fatal(err)
			}
			res.Body.Close()
			if got := w.Hint(c.err); (got == "") != (c.want == "") || !strings.Contains(got, c.want) {
				t.Errorf("got %q, want %q", got, c.want)
			}
			base := errors.New("base")
			if got := w.Wrap(base); !errors.Is(got, base) {
				t.Errorf("wrapped: %v", got)
			}
		})
	}
	if (&Watch{}).Wrap(nil) != nil {
		t.Error("no error became one")
	}
}
