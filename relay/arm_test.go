package relay

import (
	"bufio"
	"bytes"
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"unicode/utf16"

	"rendezvous.dev/rendezvous/wire/admission"
	"rendezvous.dev/rendezvous/wire/refusal"
	"rendezvous.dev/rendezvous/wire/wsframe"
)

// armActivity is what a client says that its activity id is, as in the URL that an entry gateway names.
const armActivity = "aaaaaaaa-0000-4000-8000-000000000001"

func (f *fakeAdmission) Enter(_ context.Context, r *admission.EnterRequest) (*admission.EnterResponse, error) {
	return f.enter(r), nil
}

// enter is what a test lets the gateway container answer.
func enterWith(answer *admission.EnterResponse) func(*Options, *fakeAdmission) {
	return func(_ *Options, f *fakeAdmission) {
		f.enter = func(r *admission.EnterRequest) *admission.EnterResponse {
			if r.Ticket != testTicket {
				return &admission.EnterResponse{Error: &admission.Error{Code: string(refusal.TicketInvalid), Message: "The ticket was refused: download it again."}}
			}
			return answer
		}
	}
}

// captured is what FreeRDP 3.15 sent in a connect of the ARM form.
func captured(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", "freerdp-3.15", name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestArmCaptures(t *testing.T) {
	for name, ticket := range map[string]func(*request) string{"arm-entry": bearer, "arm-affinity": bearer, "arm-upgrade": armTicket} {
		r, err := parseHead(string(capturedHead(t, name)))
		if err != nil || ticket(r) != "TICKET" || name != "arm-entry" && activityOf(r) != armActivity {
			t.Errorf("%s: %+v, %v", name, r, err)
		}
	}
	if application, err := parseArmRequest(captured(t, "arm-entry.json")); application != "||linux-desktop" || err != nil {
		t.Errorf("the body is about %q, %v", application, err)
	}
}

func TestArmEntry(t *testing.T) {
	const own = "bbbbbbbb-0000-4000-8000-000000000001"
	s := newStack(t, enterWith(&admission.EnterResponse{ActivityId: own, Gateway: "b", Hostname: "b.example.test", Port: 8443, Target: testTarget}))
	const body = `{"application":"||desk","loadBalanceInfo":"rdv:desk","LogonToken":null,"gatewayLoadBalancerToken":null}`
	post := func(ticket, headers, body string) (*http.Response, []byte) {
		t.Helper()
		c, err := s.dial(s.addr, testHost)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		head := "POST /api/arm/v2/connections/ HTTP/1.1\nHost: x\nAuthorization: Bearer " + ticket + "\nContent-Type: application/json" + headers
		return s.request(c, bufio.NewReader(io.MultiReader(&afterHead{c: c, body: body}, c)), head)
	}
	length := func(n int) string { return fmt.Sprint("\nContent-Length: ", n) }

	resp, answer := post(testTicket, length(len(body)), body)
	var got armAnswer
	if err := json.Unmarshal(answer, &got); err != nil || resp.StatusCode != http.StatusOK || resp.Header.Get("Content-Type") != "application/json" {
		t.Fatalf("%s %s: %v", resp.Status, answer, err)
	}
	u, err := url.Parse(got.GatewayLocation)
	if err != nil || u.Scheme != "wss" || u.Host != "b.example.test:8443" || u.Query().Get("CorId") != own || resp.Header.Get("Activity-Id") != own {
		t.Errorf("the client is sent to %s (%v), activity %s", got.GatewayLocation, err, resp.Header.Get("Activity-Id"))
	}
	if got.GatewayLocationPreWebSocket != got.GatewayLocation || got.RedirectedServerName != testTarget {
		t.Errorf("answer %s", answer)
	}
	if cert := redirectedCertificate(t, got.RedirectedServerCert); len(cert.DNSNames) != 0 || cert.NotAfter.Unix() != 1 {
		t.Errorf("the certificate named for the host might be somebody's: %v", cert.Subject)
	}

	for _, tt := range []struct {
		name, ticket, headers, body string
		code                        refusal.Code
		says                        string
	}{
		{"bad ticket", "bad", length(len(body)), body, refusal.TicketInvalid, "again"},
		{"no length", testTicket, "", "", refusal.BadRequest, "Content-Length"},
		{"chunked", testTicket, "\nTransfer-Encoding: chunked", "", refusal.BadRequest, "Content-Length"},
		{"a long number", testTicket, "\nContent-Length: 99999999999999999999", "", refusal.BadRequest, "Content-Length"},
		{"long", testTicket, length(maxArmBody + 1), "", refusal.BadRequest, "longer than"},
		{"no JSON", testTicket, length(4), "null", refusal.BadRequest, "JSON"},
		{"empty", testTicket, length(0), "", refusal.BadRequest, "JSON"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			resp, answer := post(tt.ticket, tt.headers, tt.body)
			var no armRefusal
			if err := json.Unmarshal(answer, &no); err != nil || resp.StatusCode != http.StatusBadRequest || no.Code != string(tt.code) ||
				!strings.Contains(no.Message, tt.says) || no.ActivityID == "" || !strings.Contains(no.Message, no.ActivityID) || !strings.Contains(resp.Status, no.ActivityID) {
				t.Errorf("%s %s: %v", resp.Status, answer, err)
			}
		})
	}
	if strings.Contains(s.log.String(), testTicket) {
		t.Error("the log holds a ticket")
	}
}

// afterHead sends a body once the head has been sent, that is, when its answer is read for.
type afterHead struct {
	c    io.Writer
	body string
}

func (a *afterHead) Read([]byte) (int, error) {
	io.WriteString(a.c, a.body)
	return 0, io.EOF
}

// redirectedCertificate unpacks the field as clients do.
func redirectedCertificate(t *testing.T, field string) *x509.Certificate {
	t.Helper()
	wide, err := base64.StdEncoding.DecodeString(field)
	if err != nil {
		t.Fatal(err)
	}
	units := make([]uint16, len(wide)/2)
	for i := range units {
		units[i] = binary.LittleEndian.Uint16(wide[2*i:])
	}
	b, err := base64.StdEncoding.DecodeString(string(utf16.Decode(units)))
	if err != nil || len(b) < 12 || binary.LittleEndian.Uint32(b) != 32 || binary.LittleEndian.Uint32(b[4:]) != 1 || int(binary.LittleEndian.Uint32(b[8:])) != len(b)-12 {
		t.Fatalf("container %x: %v", b, err)
	}
	cert, err := x509.ParseCertificate(b[12:])
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func TestArmHostOnItsWay(t *testing.T) {
	s := newStack(t, enterWith(&admission.EnterResponse{Retry: true, Error: &admission.Error{Code: string(refusal.NoHost), Message: "A host is starting."}}))
	c, err := s.dial(s.addr, testHost)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	resp, answer := s.request(c, bufio.NewReader(io.MultiReader(&afterHead{c: c, body: "{}"}, c)),
		"POST /api/arm/v2/connections HTTP/1.1\nHost: x\nContent-Length: 2\nAuthorization: Bearer "+testTicket)
	var no armRefusal
	if err := json.Unmarshal(answer, &no); err != nil || resp.StatusCode != 400 || no.Code != codeHostStarting || !strings.Contains(no.Message, "starting") {
		t.Errorf("%s %s: %v", resp.Status, answer, err)
	}
}

func TestArmEntryIsBounded(t *testing.T) {
	s := newStack(t, func(o *Options, f *fakeAdmission) {
		o.Config.MaxPending = 2
		enterWith(&admission.EnterResponse{Hostname: "b", Port: 1})(o, f)
	})
	for busy, want := range map[int32]int{1: http.StatusOK, 2: http.StatusBadRequest} {
		s.relay.entries.Store(busy)
		c, err := s.dial(s.addr, testHost)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		resp, answer := s.request(c, bufio.NewReader(io.MultiReader(&afterHead{c: c, body: "{}"}, c)),
			"POST /api/arm/v2/connections HTTP/1.1\nHost: x\nContent-Length: 2\nAuthorization: Bearer "+testTicket)
		if resp.StatusCode != want || want != http.StatusOK && !strings.Contains(string(answer), string(refusal.GatewayFull)) {
			t.Errorf("%d under way: %s %s", busy, resp.Status, answer)
		}
		eventually(t, "it is counted off", func() bool { return s.relay.entries.Load() == busy })
	}
}

// connectionRequest is an X.224 connection request with a cookie.
func connectionRequest(protocols uint32) []byte {
	b := append([]byte{3, 0, 0, 0, 0, 0xe0, 0, 0, 0, 0, 0}, "rdv:desk\r\n"...)
	b = append(b, 1, 0, 8, 0)
	b = binary.LittleEndian.AppendUint32(b, protocols)
	b[3], b[4] = byte(len(b)), byte(len(b)-5)
	return b
}

// dialArm takes both GETs as FreeRDP does; newer ones give the ticket in the second's query alone.
func (s *stack) dialArm(ticket string, newer bool) (*rdpClient, *http.Response) {
	s.t.Helper()
	c, err := s.dial(s.addr, testHost)
	if err != nil {
		s.t.Fatal(err)
	}
	first, _ := s.request(c, bufio.NewReader(c), "GET /rendezvous/v1/arm?CorId="+armActivity+" HTTP/1.1\nHost: x\nAuthorization: Bearer "+ticket)
	c.Close()
	if cookies := first.Cookies(); first.StatusCode != 200 || len(cookies) != 1 || cookies[0].Name != "ARRAffinity" || cookies[0].Value == "" {
		s.t.Fatalf("the first GET: %s %v", first.Status, first.Header)
	}
	if c, err = s.dial(s.addr, testHost); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { c.Close() })
	r := bufio.NewReader(c)
	head := "GET /rendezvous/v1/arm?CorId=" + armActivity + "&ClmTk=Bearer%20" + ticket + " HTTP/1.1\n" + upgradeHeaders + "\nCookie: ARRAffinity=none"
	if !newer {
		head += "\nAuthorization: Bearer " + ticket
	}
	resp, _ := s.request(c, r, head)
	return &rdpClient{Conn: c, t: s.t, r: r, header: resp.Header}, resp
}

func TestArmSession(t *testing.T) {
	for _, newer := range []bool{false, true} {
		t.Run(fmt.Sprint("newer=", newer), func(t *testing.T) {
			var connects atomic.Int32
			s := newStack(t, func(_ *Options, f *fakeAdmission) {
				inner := f.connect
				f.connect = func(ctx context.Context, r *admission.ConnectRequest) *admission.ConnectResponse {
					connects.Add(1)
					if r.Transport != transportARM || r.ActivityId != armActivity {
						t.Errorf("connect by %s, activity %s", r.Transport, r.ActivityId)
					}
					return inner(ctx, r)
				}
			})
			// First it asks for Entra ID sign-in alone, and is asked to come again.
			c, resp := s.dialArm(testTicket, newer)
			if resp.StatusCode != 101 {
				t.Fatal(resp.Status)
			}
			c.Write(connectionRequest(protocolRDSAAD))
			no := make([]byte, len(needsTLS))
			if _, err := io.ReadFull(c, no); err != nil || !bytes.Equal(no, needsTLS) {
				t.Fatalf("answer %x, %v", no, err)
			}
			if n, err := c.Read(no); err != io.EOF {
				t.Errorf("after the refusal: %d, %v", n, err)
			}
			if connects.Load() != 0 {
				t.Error("a host was asked for a client that was to come again")
			}
			// Then for what there is; it comes in pieces.
			c, _ = s.dialArm(testTicket, newer)
			cr := connectionRequest(0x1 | 0x2 | 0x8)
			c.Write(cr[:3])
			c.Write(cr[3:])
			a := s.agent()
			expect(t, a, string(cr))
			a.Write([]byte("\x03confirm"))
			expect(t, c, "\x03confirm")
			c.Write([]byte("hello"))
			expect(t, a, "hello")
			if strings.Contains(s.log.String(), testTicket) {
				t.Error("the log holds a ticket")
			}
		})
	}
}

func TestArmRefusals(t *testing.T) {
	s := newStack(t, func(_ *Options, f *fakeAdmission) {
		f.connect = func(context.Context, *admission.ConnectRequest) *admission.ConnectResponse {
			return &admission.ConnectResponse{Error: &admission.Error{Code: string(refusal.NoHost), Message: "None."}}
		}
	})
	if _, resp := s.dialArm("bad", true); resp.StatusCode != http.StatusUnauthorized {
		t.Errorf("a bad ticket: %s", resp.Status)
	}
	c, _ := s.dialArm(testTicket, true)
	c.Write(connectionRequest(1))
	no := make([]byte, len(disconnect))
	if _, err := io.ReadFull(c, no); err != nil || !bytes.Equal(no, disconnect) {
		t.Errorf("no host: %x, %v", no, err)
	}
	if _, err := c.Read(no); err != io.EOF || !strings.Contains(c.closed, string(refusal.NoHost)+"; activity "+armActivity) {
		t.Errorf("no host: %v, %q", err, c.closed)
	}
}

func TestRequestedProtocols(t *testing.T) {
	for name, tt := range map[string]struct {
		pdu       []byte
		protocols uint32
		ok        bool
	}{
		"with a token":     {connectionRequest(0x10), 0x10, true},
		"FreeRDP, RDSAAD":  {captured(t, "arm-rdsaad.pdu"), 0x10, true},
		"FreeRDP, others":  {captured(t, "arm-tls.pdu"), 0x3, true},
		"several":          {connectionRequest(0xb), 0xb, true},
		"with correlation": {append(connectionRequest(0x10), make([]byte, 36)...), 0x10, true},
		"bare":             {[]byte{3, 0, 0, 19, 14, 0xe0, 0, 0, 0, 0, 0, 1, 0, 8, 0, 2, 0, 0, 0}, 2, true},
		"no negotiation":   {[]byte{3, 0, 0, 11, 6, 0xe0, 0, 0, 0, 0, 0}, 0, false},
		"a data PDU":       {[]byte{3, 0, 0, 19, 14, 0xf0, 0, 0, 0, 0, 0, 1, 0, 8, 0, 2, 0, 0, 0}, 0, false},
		"a short length":   {[]byte{3, 0, 0, 2, 14, 0xe0, 0, 0, 0, 0, 0, 1, 0, 8, 0, 2, 0, 0, 0}, 0, false},
		"cut":              {connectionRequest(0x10)[:20], 0, false},
		"no TPKT":          {[]byte("GET / HTTP/1.1\r\n"), 0, false},
		"nothing":          {nil, 0, false},
	} {
		if protocols, ok := requestedProtocols(tt.pdu); protocols != tt.protocols || ok != tt.ok {
			t.Errorf("%s: %#x, %v, want %#x, %v", name, protocols, ok, tt.protocols, tt.ok)
		}
	}
}

// FuzzArmRequest: what a stranger posts makes nothing fail in a bad way.
func FuzzArmRequest(f *testing.F) {
	f.Add(captured(f, "arm-entry.json"))
	f.Add([]byte(`{"application":7}`))
	f.Add([]byte("null"))
	f.Fuzz(func(t *testing.T, body []byte) {
		application, err := parseArmRequest(body)
		if len(application) > 64 || err != nil && application != "" {
			t.Errorf("%q: %q, %v", body, application, err)
		}
	})
}

// FuzzFirstPDU: nothing that a client sends first makes the look at it fail in a bad way, and all of it goes on.
func FuzzFirstPDU(f *testing.F) {
	f.Add(captured(f, "arm-rdsaad.pdu"))
	f.Add(captured(f, "arm-tls.pdu"))
	f.Add([]byte{3, 0, 0, 19, 14, 0xe0, 0, 0, 0, 0, 0, 1, 0, 8, 0, 2, 0, 0, 0})
	f.Add([]byte{3, 0, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, pdu []byte) {
		requestedProtocols(pdu)
		raw := wsframe.AppendMaskedFrame(nil, wsframe.Binary, pdu, maskKey)
		v := &visitor{leg: &leg{unread: bytes.Clone(raw)}}
		if len(pdu) == 0 || !wholePDU(pdu) && len(raw) < maxFirstPDU {
			return // it would wait for more
		}
		seen, err := v.peekPDU()
		if err != nil || !bytes.HasPrefix(pdu, seen) || !bytes.Equal(v.unread, raw) {
			t.Errorf("%x: saw %x, %v; %d of %d bytes go on", pdu, seen, err, len(v.unread), len(raw))
		}
	})
}
