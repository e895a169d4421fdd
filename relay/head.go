package relay

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/refusal"
)

const (
	// maxHead bounds a request head in bytes: a ticket (ticket.MaxLength) and generous headers.
	maxHead = 16 << 10
	// maxHeaders bounds the header lines.
	maxHeaders = 100
)

// request is one request head.
type request struct {
	method string
	path   string
	query  string
	close  bool // the connection ends after the answer
	header []headerField
}

type headerField struct{ name, value string }

// get is the first value of a header, "" where it is absent.
func (r *request) get(name string) string {
	for _, f := range r.header {
		if strings.EqualFold(f.name, name) {
			return f.value
		}
	}
	return ""
}

// has says that a comma-separated header lists a token.
func (r *request) has(name, token string) bool {
	for _, f := range r.header {
		if !strings.EqualFold(f.name, name) {
			continue
		}
		for item := range strings.SplitSeq(f.value, ",") {
			if strings.EqualFold(strings.TrimSpace(item), token) {
				return true
			}
		}
	}
	return false
}

// param is a query parameter.
func (r *request) param(name string) string {
	if r.query == "" {
		return ""
	}
	v, _ := url.ParseQuery(r.query) // what does parse still counts
	return v.Get(name)
}

// body says that a body follows the head.
func (r *request) body() bool {
	return r.get("Transfer-Encoding") != "" || strings.Trim(r.get("Content-Length"), "0") != ""
}

// forget drops what may hold a ticket or a join secret.
func (r *request) forget() { r.query, r.header = "", nil }

// badHead is a head that can't be read; its text is for the client.
type badHead struct {
	status int
	reason string
}

func (e *badHead) Error() string { return e.reason }

var errHead = errors.New("relay: the connection ended before a request head")

// readHead reads one head into buf and parses it. What came after it is put back as the leg's unread bytes.
func readHead(l *leg, buf []byte) (*request, error) {
	have := 0
	for {
		if have == len(buf) {
			return nil, &badHead{http.StatusRequestHeaderFieldsTooLarge, fmt.Sprintf("The request head is longer than %d bytes.", len(buf))}
		}
		n, err := l.Read(buf[have:])
		from := max(0, have-3)
		have += n
		if end := bytes.Index(buf[from:have], []byte("\r\n\r\n")); end >= 0 {
			end += from + 4
			if end < have {
				l.unread = append(bytes.Clone(buf[end:have]), l.unread...)
			}
			return parseHead(string(buf[:end-2]))
		}
		if err != nil {
			return nil, errors.Join(errHead, err)
		}
	}
}

// parseHead parses the lines of a head, each closed by CRLF. It is strict: what two readers could read in two ways is refused.
func parseHead(head string) (*request, error) {
	bad := func(reason string) (*request, error) { return nil, &badHead{http.StatusBadRequest, reason} }
	line, rest, _ := strings.Cut(head, "\r\n")
	method, target, ok := strings.Cut(line, " ")
	target, version, ok2 := strings.Cut(target, " ")
	if !ok || !ok2 || !isToken(method) || !strings.HasPrefix(target, "/") || hasControl(target) {
		return bad("The request line is malformed.")
	}
	r := &request{method: method}
	switch version {
	case "HTTP/1.1":
	case "HTTP/1.0":
		r.close = true
	default:
		return nil, &badHead{http.StatusHTTPVersionNotSupported, "Only HTTP/1.1 is spoken here."}
	}
	r.path, r.query, _ = strings.Cut(target, "?")
	for rest != "" {
		line, rest, _ = strings.Cut(rest, "\r\n")
		name, value, ok := strings.Cut(line, ":")
		value = strings.Trim(value, " \t")
		if !ok || !isToken(name) || hasControl(value) {
			return bad("A header line is malformed.")
		}
		if len(r.header) == maxHeaders {
			return bad("There are too many header lines.")
		}
		if reason := r.framing(name, value); reason != "" {
			return bad(reason)
		}
		r.header = append(r.header, headerField{name, value})
	}
	if r.get("Content-Length") != "" && r.get("Transfer-Encoding") != "" {
		return bad("The request has both Content-Length and Transfer-Encoding.")
	}
	r.close = r.close || r.has("Connection", "close")
	return r, nil
}

// framing says why a header line would leave open where the request ends or whom it is for; "" where it doesn't. Only one
// line of each such header may be there, an empty one included, and a length is digits alone: a proxy that took another
// line than we do would hand us what it holds for somebody else's request.
func (r *request) framing(name, value string) string {
	for _, single := range []string{"Content-Length", "Transfer-Encoding", "Host"} {
		if !strings.EqualFold(name, single) {
			continue
		}
		for _, f := range r.header {
			if strings.EqualFold(f.name, single) {
				return "The header " + single + " is repeated."
			}
		}
		switch {
		case single == "Content-Length" && (value == "" || strings.Trim(value, "0123456789") != ""):
			return "Content-Length is not a number."
		case single == "Transfer-Encoding" && !strings.EqualFold(value, "chunked"):
			return "Only the transfer encoding chunked is spoken here."
		}
	}
	return ""
}

func isToken(s string) bool {
	for i := range len(s) {
		c := s[i]
		if c <= ' ' || c >= 0x7f || strings.IndexByte(`"(),/:;<=>?@[\]{}`, c) >= 0 {
			return false
		}
	}
	return s != ""
}

func hasControl(s string) bool {
	for i := range len(s) {
		if c := s[i]; c < ' ' && c != '\t' || c == 0x7f {
			return true
		}
	}
	return false
}

// answer is one HTTP response head with a small body.
type answer struct {
	status   int
	reason   string // the status's own text when empty
	activity string
	header   []headerField
	json     any
	stream   []byte // what a body begins with that ends with the connection
	close    bool
}

// write sends it in one write.
func (a *answer) write(w io.Writer) error {
	reason := a.reason
	if reason == "" {
		reason = http.StatusText(a.status)
	}
	b := fmt.Appendf(nil, "HTTP/1.1 %d %s\r\n", a.status, reason)
	if a.activity != "" {
		b = fmt.Appendf(b, "%s: %s\r\n", brokerapi.HeaderActivity, a.activity)
	}
	for _, f := range a.header {
		b = fmt.Appendf(b, "%s: %s\r\n", f.name, f.value)
	}
	var body []byte
	if a.status != http.StatusSwitchingProtocols {
		if a.json != nil {
			var err error
			if body, err = json.Marshal(a.json); err != nil {
				return err
			}
			body = append(body, '\n')
			b = append(b, "Content-Type: application/json\r\n"...)
		}
		if a.stream != nil {
			body = a.stream
		} else if a.status != http.StatusNoContent {
			b = append(b, "Content-Length: "+strconv.Itoa(len(body))+"\r\n"...)
		}
		if a.close {
			b = append(b, "Connection: close\r\n"...)
		}
	}
	b = append(append(b, "\r\n"...), body...)
	_, err := w.Write(b)
	return err
}

// httpStatus is the status that goes with a refusal.
func httpStatus(code refusal.Code) int {
	switch code {
	case refusal.TicketMissing, refusal.TicketInvalid, refusal.TicketExpired:
		return http.StatusUnauthorized
	case refusal.NotGranted, refusal.Revoked, refusal.WrongTarget, refusal.JoinUnknown, refusal.WrongRole:
		return http.StatusForbidden
	case refusal.UnknownResource:
		return http.StatusNotFound
	case refusal.HostTimeout:
		return http.StatusGatewayTimeout
	case refusal.UnknownInstance:
		return http.StatusMisdirectedRequest
	case refusal.Protocol, refusal.BadRequest:
		return http.StatusBadRequest
	case refusal.Internal:
		return http.StatusInternalServerError
	}
	return http.StatusServiceUnavailable
}

// refuse answers a request with a refusal and has the connection end. The refusal is the status's text too: FreeRDP shows
// that, and not the body.
func refuse(w io.Writer, status int, e *refusal.Error) error {
	return (&answer{status: status, reason: reasonPhrase(e.Error()), activity: e.ActivityID, json: brokerapi.ErrorBody{Error: e}, close: true}).write(w)
}

// reasonPhrase is text that may stand in a status line: printable ASCII, of bounded length.
func reasonPhrase(s string) string {
	const most = 500
	b := []byte(s[:min(len(s), most)])
	for i, c := range b {
		if c < ' ' || c > '~' {
			b[i] = '?'
		}
	}
	return string(b)
}
