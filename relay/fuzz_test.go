package relay

import (
	"crypto/tls"
	"strings"
	"testing"

	"rendezvous.dev/rendezvous/wire/admission"
	"rendezvous.dev/rendezvous/wire/config"
)

// FuzzServerName: whatever name a stranger asks for, only INSTANCE.join.HOST leads elsewhere, and of those only what is written
// as an address of a pod can be looked up.
func FuzzServerName(f *testing.F) {
	for _, name := range []string{
		testHost, testInstance + ".join." + testHost, "10-0-0-2.join." + testHost, "10-0-0-02.join." + testHost, "fd00-0-0-0-0-0-0-1.join." + testHost,
		"a.b.join." + testHost, ".join." + testHost, "10-0-0-2.JOIN.GW.example.TEST", "join." + testHost, "::1%25eth0.join." + testHost, "",
	} {
		f.Add(name)
	}
	r := &Relay{instance: testInstance, tls: &tls.Config{MinVersion: tls.VersionTLS12}}
	r.config.Store(&config.Relay{Hostname: testHost})
	f.Fuzz(func(t *testing.T, name string) {
		lower := strings.ToLower(name)
		if strings.HasSuffix(lower, ".pair."+testHost) {
			return // it needs a certificate: TestPair
		}
		told := 0
		c := &conn{secrets: &handshakeSecrets{}, peeking: true, onHello: func(bool) { told++ }}
		conf, err := r.onHello(&tls.ClientHelloInfo{Conn: c, ServerName: name})
		instance, join := strings.CutSuffix(lower, ".join."+testHost)
		if c.peer || c.joining != join || told != 1 || c.peeking {
			t.Fatalf("%q: peer=%t joining=%t told=%d", name, c.peer, c.joining, told)
		}
		if foreign := join && instance != testInstance; foreign != (err != nil) || foreign != (conf == nil) || foreign != c.mute || c.foreign != map[bool]string{true: instance}[foreign] {
			t.Fatalf("%q: leads to %q, %v", name, c.foreign, err)
		}
		addr, err := admission.InstanceAddr(instance)
		if err == nil && (!addr.IsValid() || addr.Zone() != "" || admission.InstanceName(addr) != instance || strings.ContainsAny(instance, ".:%")) {
			t.Fatalf("%q is %v", instance, addr)
		}
	})
}

// FuzzConnectionID: what stands for a client's connection is a GUID in one spelling, wherever it came from.
func FuzzConnectionID(f *testing.F) {
	f.Add(testConnection, "")
	f.Add("", "%7B0F0E0D0C-0B0A-4908-8706-050403020100%7d")
	f.Add("{0f0e0d0c0b0a49088706050403020100}", "x&ConId=y")
	f.Fuzz(func(t *testing.T, header, query string) {
		req, err := parseHead("RDG_OUT_DATA /remoteDesktopGateway/?ConId=" + query + " HTTP/1.1\r\nHost: h\r\nRDG-Connection-Id: " + header + "\r\n")
		if err != nil {
			return
		}
		id := connectionID(req)
		if id == "" {
			return
		}
		if len(id) != 36 || strings.Trim(id, "0123456789abcdef-") != "" || strings.Count(id, "-") != 4 || parseGUID(id) != id {
			t.Errorf("%q and %q are %q", header, query, id)
		}
	})
}
