package identity

import (
	"crypto/x509"
	"net/url"
	"testing"
)

func TestRoundTrip(t *testing.T) {
	for want, id := range map[string]ID{
		"rendezvous://ns/ws/broker":              Broker("ns", "ws"),
		"rendezvous://ns/ws/gateway/gw":          Gateway("ns", "ws", "gw"),
		"rendezvous://ns/ws/agent/pool/host-0":   Agent("ns", "ws", "pool", "host-0"),
		"rendezvous://ns/ws/ticket-signer":       TicketSigner("ns", "ws"),
		"rendezvous://ns/ws/operator":            Operator("ns", "ws"),
		"rendezvous://default/a/agent/x-1/h9-z0": Agent("default", "a", "x-1", "h9-z0"),
	} {
		if got := id.String(); got != want {
			t.Errorf("%+v is %q, want %q", id, got, want)
		}
		back, err := Parse(id.URI())
		if err != nil || back != id {
			t.Errorf("Parse(%q) = %+v, %v", want, back, err)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	for _, s := range []string{
		"https://ns/ws/broker", "rendezvous://ns/ws", "rendezvous://ns/ws/king", "rendezvous://ns/ws/broker/x", "rendezvous://ns/ws/operator/x",
		"rendezvous://ns/ws/gateway", "rendezvous://ns/ws/gateway/a/b", "rendezvous://ns/ws/agent/pool", "rendezvous://ns/ws/agent/pool/",
		"rendezvous://ns/ws/agent/pool/a.b", "rendezvous://ns/ws/agent/*/h", "rendezvous://ns/ws/agent/pool/h?x=1", "rendezvous://ns/ws/agent/pool/h#x",
		"rendezvous://user@ns/ws/broker", "rendezvous://ns:1/ws/broker", "rendezvous://ns//broker", "rendezvous://ns/ws/agent/p%2Fx/h", "rendezvous:///ws/broker",
		"rendezvous://ns/ws/agent/pool/>", "rendezvous://NS/ws/broker",
	} {
		u, err := url.Parse(s)
		if err != nil {
			continue
		}
		if id, err := Parse(u); err == nil {
			t.Errorf("Parse(%q) = %+v, want an error", s, id)
		}
	}
}

func TestFromCertificate(t *testing.T) {
	id := Gateway("ns", "ws", "gw")
	if got, err := FromCertificate(&x509.Certificate{URIs: []*url.URL{id.URI()}}); err != nil || got != id {
		t.Errorf("FromCertificate = %+v, %v", got, err)
	}
	for name, uris := range map[string][]*url.URL{"none": nil, "two": {id.URI(), Broker("ns", "ws").URI()}} {
		if got, err := FromCertificate(&x509.Certificate{URIs: uris}); err == nil {
			t.Errorf("%s: FromCertificate = %+v, want an error", name, got)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add("rendezvous://ns/ws/agent/pool/host")
	f.Add("rendezvous://ns/ws/broker")
	f.Fuzz(func(t *testing.T, s string) {
		u, err := url.Parse(s)
		if err != nil {
			return
		}
		if id, err := Parse(u); err == nil && id.String() != u.String() {
			t.Errorf("%q parses as %q", u, id)
		}
	})
}
