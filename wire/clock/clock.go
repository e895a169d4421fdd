// Package clock notices that this machine's clock differs from a server's by minutes. What fails then fails with words
// about tokens and certificates, and the way out is another.
package clock

import (
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"
)

// Tolerated is the difference that nobody needs to know of.
const Tolerated = time.Minute

// Watch compares this machine's clock with the Date of each answer. The zero value is ready. Safe for concurrent use.
type Watch struct {
	// Now is time.Now where nil.
	Now func() time.Time

	mu   sync.Mutex
	host string        // that answered last with a Date
	off  time.Duration // how far this machine is ahead of it
}

func (w *Watch) now() time.Time {
	if w.Now != nil {
		return w.Now()
	}
	return time.Now()
}

// Transport watches what passes next.
func (w *Watch) Transport(next http.RoundTripper) http.RoundTripper { return transport{w, next} }

type transport struct {
	w    *Watch
	next http.RoundTripper
}

func (t transport) RoundTrip(r *http.Request) (*http.Response, error) {
	res, err := t.next.RoundTrip(r)
	if err != nil {
		return res, err
	}
	if date, err := http.ParseTime(res.Header.Get("Date")); err == nil {
		t.w.mu.Lock()
		t.w.host, t.w.off = r.URL.Hostname(), t.w.now().Sub(date)
		t.w.mu.Unlock()
	}
	return res, nil
}

// CloseIdleConnections is http.Client's.
func (t transport) CloseIdleConnections() {
	if c, ok := t.next.(interface{ CloseIdleConnections() }); ok {
		c.CloseIdleConnections()
	}
}

// Hint goes behind err, which may be nil: it is empty unless the clock may be why.
func (w *Watch) Hint(err error) string {
	w.mu.Lock()
	defer w.mu.Unlock()
	if off := w.off.Abs(); off > Tolerated {
		which := "ahead of"
		if w.off < 0 {
			which = "behind"
		}
		return fmt.Sprintf("; this machine's clock is %s %s %s's: set it right", about(off), which, w.host)
	}
	var cert x509.CertificateInvalidError
	if errors.As(err, &cert) && cert.Reason == x509.Expired {
		return fmt.Sprintf("; this machine's clock says %s: is that right?", w.now().Format("2006-01-02 15:04 MST"))
	}
	return ""
}

// Wrap puts the hint behind err, where there is one.
func (w *Watch) Wrap(err error) error {
	if err == nil {
		return nil
	}
	if hint := w.Hint(err); hint != "" {
		return fmt.Errorf("%w%s", err, hint)
	}
	return err
}

// about says a duration as people do.
func about(d time.Duration) string {
	for _, u := range []struct {
		of   time.Duration
		name string
	}{{24 * time.Hour, "day"}, {time.Hour, "hour"}, {time.Minute, "minute"}} {
		if n := int(d.Round(u.of) / u.of); n > 1 {
			return fmt.Sprintf("%d %ss", n, u.name)
		}
	}
	return "a minute"
}
