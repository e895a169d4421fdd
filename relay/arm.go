package relay

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf16"

	"rendezvous.dev/rendezvous/wire/admission"
	"rendezvous.dev/rendezvous/wire/refusal"
	"rendezvous.dev/rendezvous/wire/wsframe"
)

// The ARM form, as FreeRDP 3 speaks it with `type:arm`. Each arrow is a connection of its own, and may reach another pod:
//
//	client                                     entry gateway
//	POST /api/arm/v2/connections  bearer    ->
//	                                        <- 200 {"gatewayLocation": "wss://SERVING/…"} or 400 {"Code", "Message"}
//	                                           serving gateway
//	GET  /rendezvous/v1/arm       bearer    ->
//	                                        <- 200, Set-Cookie: ARRAffinity
//	GET  /rendezvous/v1/arm?ClmTk=, Upgrade ->
//	                                        <- 101, then RDP bytes in binary frames
//
// Nothing is kept between them: the ticket comes with each, and the activity id travels in the URL that the entry gateway
// names. Which gateway that is the broker says (step 7); this gateway's own measurements of the others stand for the
// client's.
//
// Such a client first asks its host for Entra ID sign-in alone (RDSAAD), which no host of ours has, and takes the refusal
// as word to come again and ask for what there is. We refuse in the host's stead: no session is begun for it. To see what
// it asks for, the upgrade is answered before there is a host; refusals after that end the connection, with the reason in
// the close frame. What would be refused then was most likely refused at the entry gateway, in an answer that the client
// shows.
const (
	pathArmEntry = "/api/arm/v2/connections"
	pathArm      = "/rendezvous/v1/arm"

	transportARM = "arm-websocket"
	// transportEntry is for metrics: clients that are told where to go.
	transportEntry = "arm-entry"

	// maxArmBody bounds the entry request's body, in bytes. FreeRDP sends some 200.
	maxArmBody = 8 << 10
	// enterTimeout bounds the broker's choice.
	enterTimeout = 10 * time.Second
	// affinity is what the client waits for; it is not looked at when it comes back.
	affinity = "ARRAffinity=none; Path=" + pathArm + "; Secure; HttpOnly"
	// codeHostStarting has the client try again by itself, and show the message.
	codeHostStarting = "E_PROXY_ORCHESTRATION_LB_SESSIONHOST_DEALLOCATED"
)

// parseArmRequest takes the entry request's body apart: one JSON object, with nothing behind it. The ticket alone says what
// the client wants; the application's name is for the log.
func parseArmRequest(body []byte) (application string, err error) {
	var r struct {
		Application     string `json:"application"`
		LoadBalanceInfo string `json:"loadBalanceInfo"`
	}
	if err := json.Unmarshal(body, &r); err != nil || bytes.TrimSpace(body)[0] != '{' {
		return "", errors.New("it is not the JSON object that clients send")
	}
	const most = 64
	return strings.ToValidUTF8(r.Application[:min(len(r.Application), most)], ""), nil
}

// armAnswer is the entry request's answer. Older clients read gatewayLocation, newer ones the other.
type armAnswer struct {
	GatewayLocation             string `json:"gatewayLocation"`
	GatewayLocationPreWebSocket string `json:"gatewayLocationPreWebSocket"`
	RedirectedServerName        string `json:"redirectedServerName"`
	RedirectedServerCert        string `json:"redirectedServerCert,omitempty"`
}

// armRefusal is its refusal: the client shows Message where Code is codeHostStarting, and the status line's text otherwise.
type armRefusal struct {
	Code       string
	Message    string
	ActivityID string `json:"ActivityId"`
}

// armTicket is the ticket of a request of the ARM form: in the header, or where the second of the two GETs has it.
func armTicket(req *request) string {
	if ticket := bearer(req); ticket != "" {
		return ticket
	}
	scheme, token, ok := strings.Cut(req.param("ClmTk"), " ")
	if !ok || !strings.EqualFold(scheme, "Bearer") {
		return ""
	}
	return strings.TrimSpace(token)
}

// serveArmEntry answers which gateway is to serve the client.
func (r *Relay) serveArmEntry(v *visitor, req *request, activity string) {
	c := r.config.Load()
	ticket := armTicket(req)
	if int(r.entries.Add(1)) > int(c.MaxPending) {
		r.entries.Add(-1)
		v.refuseArm(refusal.New(refusal.GatewayFull, "This pod of gateway %s answers its limit of %d clients at once: try again in a few seconds.", c.Gateway, c.MaxPending).With(activity), false)
		return
	}
	defer r.entries.Add(-1)
	application, err := v.readArmRequest(req)
	req.forget()
	if err != nil {
		v.refuseArm(refusal.New(refusal.BadRequest, "The request can't be read: %v.", err).With(activity), false)
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), enterTimeout)
	defer cancel()
	resp, err := r.admission.Enter(ctx, &admission.EnterRequest{
		ActivityId: activity, Ticket: ticket, ClientAddr: v.tcp.RemoteAddr().String(), Instance: r.instance})
	if err != nil {
		v.refuseArm(r.admissionFailed(activity, err).With(activity), false)
		return
	}
	if id := parseGUID(resp.ActivityId); id != "" {
		activity = id
	}
	if e := received(resp.Error); e != nil {
		v.refuseArm(e.With(activity), resp.Retry)
		return
	}
	host := net.JoinHostPort(resp.Hostname, strconv.Itoa(int(resp.Port)))
	location := (&url.URL{Scheme: "wss", Host: host, Path: pathArm, RawQuery: url.Values{"CorId": {activity}}.Encode()}).String()
	r.metrics.Admissions.WithLabelValues(transportEntry, "ok").Inc()
	r.log.Info("client sent on", "activity", activity, "peer", v.tcp.RemoteAddr().String(), "gateway", resp.Gateway, "application", application)
	v.SetWriteDeadline(time.Now().Add(lingerTime))
	ok := &answer{status: http.StatusOK, activity: activity, close: true, json: armAnswer{
		GatewayLocation: location, GatewayLocationPreWebSocket: location, RedirectedServerName: resp.Target, RedirectedServerCert: nobodysCertificate()}}
	if ok.write(v) == nil {
		v.linger()
	}
}

// readArmRequest reads the body, of a length that was announced.
func (v *visitor) readArmRequest(req *request) (application string, err error) {
	length, err := strconv.ParseUint(req.get("Content-Length"), 10, 31)
	switch {
	case req.get("Transfer-Encoding") != "" || err != nil:
		return "", errors.New("it has no Content-Length")
	case length > maxArmBody:
		return "", fmt.Errorf("it is longer than %d bytes", maxArmBody)
	}
	body := make([]byte, length)
	if _, err := io.ReadFull(v, body); err != nil {
		return "", errors.New("it ended early")
	}
	return parseArmRequest(body)
}

// refuseArm refuses in the form that clients of the ARM form read.
func (v *visitor) refuseArm(e *refusal.Error, retry bool) {
	code := string(e.Code)
	if retry {
		code = codeHostStarting
	}
	v.r.metrics.Admissions.WithLabelValues(transportEntry, string(e.Code)).Inc()
	v.r.reportStranger(v, e.ActivityID, e)
	v.r.log.Info("entry refused", "activity", e.ActivityID, "peer", v.tcp.RemoteAddr().String(), "code", e.Code, "retry", retry, "error", e.Message)
	v.SetWriteDeadline(time.Now().Add(lingerTime))
	no := &answer{status: http.StatusBadRequest, reason: reasonPhrase(e.Error()), activity: e.ActivityID, close: true,
		json: armRefusal{Code: code, Message: e.Error(), ActivityID: e.ActivityID}}
	if no.write(v) == nil {
		v.linger()
	}
}

// serveArm is both GETs.
func (r *Relay) serveArm(v *visitor, req *request, activity string) (done bool) {
	if !req.has("Upgrade", "websocket") {
		ok := &answer{status: http.StatusOK, activity: activity, close: req.close, header: []headerField{{"Set-Cookie", affinity}}}
		return ok.write(v) != nil
	}
	r.serveArmRDP(v, req, activity)
	return true
}

func (r *Relay) serveArmRDP(v *visitor, req *request, activity string) {
	ticket := armTicket(req)
	a, ok := r.newWebSocket(v, req, transportARM, activity)
	if a == nil {
		return
	}
	defer a.close()
	if e := a.authenticate(ticket); e != nil {
		v.sayNo(httpStatus(e.Code), e)
		return
	}
	ok.activity = a.activity
	v.SetWriteDeadline(time.Now().Add(lingerTime))
	if ok.write(v) != nil {
		return
	}
	c := newClient(v.leg, v.leg, framing{webSocket: true})
	v.SetDeadline(time.Now().Add(time.Duration(r.config.Load().HandshakeTimeoutSeconds) * time.Second))
	pdu, err := v.peekPDU()
	if err != nil {
		r.metrics.handshakeFailed("arm")
		r.log.Info("the client ended its connection before it asked for anything", "activity", a.activity, "error", err)
		return
	}
	if protocols, ok := requestedProtocols(pdu); ok && protocols == protocolRDSAAD {
		r.log.Info("the client asks for Entra ID sign-in, and is asked to come again", "activity", a.activity, "user", a.user)
		v.answerPDU(needsTLS, wsframe.CloseNormal, "come again without RDSAAD; activity "+a.activity)
		return
	}
	if err := a.connect(""); err != nil {
		var e *refusal.Error
		if errors.As(err, &e) {
			v.answerPDU(disconnect, wsframe.ClosePolicy, fmt.Sprintf("%s; activity %s", e.Code, e.ActivityID))
		}
		return
	}
	a.begin(c).run()
}

// Protocols of RDP_NEG_REQ (MS-RDPBCGR 2.2.1.1.1).
const protocolRDSAAD = 0x10

// needsTLS is an X.224 connection confirm with RDP_NEG_FAILURE: SSL_REQUIRED_BY_SERVER (MS-RDPBCGR 2.2.1.2.2).
var needsTLS = []byte{3, 0, 0, 19, 14, 0xd0, 0, 0, 0, 0, 0, 3, 0, 8, 0, 1, 0, 0, 0}

// disconnect is an X.224 disconnect request (13.5), which is how a connection is refused. FreeRDP (3.15 seen) waits for an
// answer to its request, whatever becomes of the WebSocket.
var disconnect = []byte{3, 0, 0, 11, 6, 0x80, 0, 0, 0, 0, 0}

// answerPDU is the last word to a client, in the host's stead.
func (v *visitor) answerPDU(pdu []byte, code int, reason string) {
	b := wsframe.AppendFrame(nil, wsframe.Binary, pdu)
	v.SetWriteDeadline(time.Now().Add(lingerTime))
	if _, err := v.Write(wsframe.AppendFrame(b, wsframe.Close, wsframe.ClosePayload(code, reason))); err == nil {
		v.linger()
	}
}

// maxFirstPDU bounds what is read to see the client's first PDU, in bytes.
const maxFirstPDU = 2 << 10

// peekPDU reads until the client's first PDU is whole, and puts all back. What is no TPKT, or too long to be a connection
// request, comes back in part: it is for the host to judge.
func (v *visitor) peekPDU() ([]byte, error) {
	var raw, pdu []byte
	d := wsframe.Decoder{Masked: true}
	buf := make([]byte, maxFirstPDU)
	for {
		n, err := v.Read(buf)
		raw = append(raw, buf[:n]...)
		for in := buf[:n]; len(in) > 0; {
			m, ev, err := d.Decode(in)
			in = in[m:]
			switch {
			case err != nil:
				return nil, err
			case ev.Op == wsframe.Close:
				return nil, errClientGone
			case ev.Op == wsframe.Binary:
				pdu = append(pdu, ev.Payload...)
			}
		}
		if wholePDU(pdu) || len(raw) >= maxFirstPDU {
			v.unread = append(raw, v.unread...)
			return pdu, nil
		}
		if err != nil {
			return nil, err
		}
	}
}

// wholePDU says whether b begins with a whole TPKT, or with something else.
func wholePDU(b []byte) bool {
	const tpkt, header = 3, 4
	return len(b) > 0 && b[0] != tpkt || len(b) >= header && len(b) >= int(binary.BigEndian.Uint16(b[2:]))
}

// requestedProtocols reads what an X.224 connection request asks for; ok is false for anything else, and where it asks
// for nothing in particular.
func requestedProtocols(b []byte) (protocols uint32, ok bool) {
	const fixed, request, negotiation, size = 11, 0xe0, 1, 8
	if len(b) < fixed || b[0] != 3 || b[5]&0xf0 != request || len(b) < int(binary.BigEndian.Uint16(b[2:])) {
		return 0, false
	}
	rest := b[fixed:max(fixed, binary.BigEndian.Uint16(b[2:]))]
	if len(rest) > 0 && rest[0] != negotiation { // a cookie, or a routing token
		_, rest, _ = bytes.Cut(rest, []byte("\r\n"))
	}
	if len(rest) < size || rest[0] != negotiation || binary.LittleEndian.Uint16(rest[2:]) != size {
		return 0, false
	}
	return binary.LittleEndian.Uint32(rest[4:]), true
}

// nobodysCertificate is a certificate whose key nobody has. Newer FreeRDP (after 3.15) gives up unless the entry gateway
// names the certificate that its host will show; one that shows another it verifies by name and issuer, as always. So it
// is told one that no host can show: a gateway must not be believed about who the host is.
var nobodysCertificate = sync.OnceValue(func() string {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return ""
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "verify the host by its own certificate"},
		NotBefore: time.Unix(0, 0), NotAfter: time.Unix(1, 0)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		return ""
	}
	const certificate, asn1 = 32, 1
	var b []byte
	for _, v := range []uint32{certificate, asn1, uint32(len(der))} {
		b = binary.LittleEndian.AppendUint32(b, v)
	}
	var wide []byte
	for _, u := range utf16.Encode([]rune(base64.StdEncoding.EncodeToString(append(b, der...)))) {
		wide = binary.LittleEndian.AppendUint16(wide, u)
	}
	return base64.StdEncoding.EncodeToString(wide)
})
