package client

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf16"

	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/trace"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func TestExplainGolden(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	var events []trace.Event
	add := func(step int, by string, offset, took time.Duration, detail, code string) {
		events = append(events, trace.Event{Step: step, Component: by, At: at.Add(offset), Duration: took, Detail: detail, Error: code})
	}
	add(9, "agent/linux-1", 61*time.Millisecond, 300*time.Microsecond, "accepted", "") // out of order on purpose
	add(1, "rdv", 0, 12*time.Millisecond, "https://demo-broker.rdv.test", "")
	add(2, "rdv", 12*time.Millisecond, 0, "signed in until 2026-01-02T04:00:00Z", "")
	add(3, "rdv", 13*time.Millisecond, 20*time.Millisecond, "2 resources, 1 gateways", "")
	add(4, "feed/demo-broker-0", 14*time.Millisecond, time.Millisecond, "alice", "")
	add(7, "rdv", 40*time.Millisecond, 9*time.Millisecond, "gateway-a", "")
	add(9, "broker/demo-broker-0", 60*time.Millisecond, 2*time.Millisecond, "host linux-1", "")
	add(10, "agent/linux-1", 62*time.Millisecond, 12*time.Second, "Gateway refused\x1b[31m\nthe join", "join-secret-unknown")

	var out bytes.Buffer
	if err := explain(&out, "5a3c1f00-0000-4000-8000-000000000001", events); err != nil {
		t.Fatal(err)
	}
	golden := filepath.Join("testdata", "explain.txt")
	if *update {
		if err := os.WriteFile(golden, out.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(out.Bytes(), want) {
		t.Errorf("got:\n%s\nwant:\n%s", &out, want)
	}
}

func TestParseRDP(t *testing.T) {
	text := "full address:s:a.b:3389\r\nGatewayHostname:s:gw:8443\r\ngatewayaccesstoken:s:x.y\r\n"
	wide := []byte{0xff, 0xfe}
	for _, u := range utf16.Encode([]rune(text)) {
		wide = append(wide, byte(u), byte(u>>8))
	}
	for name, data := range map[string][]byte{
		"utf-8": []byte(text), "utf-8 with mark": append([]byte("\xef\xbb\xbf"), text...), "utf-16": wide,
	} {
		f, err := parseRDP(data)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if got := f.get("full address"); got != "a.b:3389" {
			t.Errorf("%s: full address %q", name, got)
		}
		if got, err := f.gatewayOptions(ModeRaw, ""); err != nil || len(got) != 1 || got[0] != "/gateway:url:wss://gw:8443/rendezvous/v1/connect,bearer:x.y" {
			t.Errorf("%s: %q, %v", name, got, err)
		}
		if got, err := f.gatewayOptions(ModeTSGU, ""); err != nil || len(got) != 0 {
			t.Errorf("%s: TSGU mode needs %q, %v", name, got, err)
		}
		if got, err := f.gatewayOptions(ModeARM, ""); err == nil || !strings.Contains(err.Error(), "older") {
			t.Errorf("%s: a file that isn't for ARM gave %q, %v", name, got, err)
		}
		if got := string(f.withoutGateway()); got != "full address:s:a.b:3389\r\n" {
			t.Errorf("%s: without the gateway: %q", name, got)
		}
	}
	for name, data := range map[string][]byte{"odd": {0xff, 0xfe, 0}, "latin": {0xe4, 'x'}} {
		if _, err := parseRDP(data); err == nil {
			t.Errorf("%s was read", name)
		}
	}
	for name, text := range map[string]string{
		"no ticket":        "gatewayhostname:s:gw",
		"no gateway":       "gatewayaccesstoken:s:x",
		"an option inside": "gatewayhostname:s:gw,type:rpc\ngatewayaccesstoken:s:x",
	} {
		f, err := parseRDP([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := f.gatewayOptions(ModeRaw, ""); err == nil {
			t.Errorf("%s gave %q", name, got)
		}
	}
	f, _ := parseRDP([]byte("gatewayhostname:s:gw\ngatewayaccesstoken:s:x\nresourceprovider:s:arm"))
	if got, _ := f.gatewayOptions(ModeRaw, ""); len(got) != 1 || !strings.Contains(got[0], "wss://gw:443/") {
		t.Errorf("without a port: %q, want 443", got)
	}
	for url, ad := range map[string]string{"https://broker:8443": "broker:8443", "https://broker": "broker:443"} {
		if got, err := f.gatewayOptions(ModeARM, url); err != nil || strings.Join(got, " ") != "/gateway:type:arm,bearer:x /azure:ad:"+ad {
			t.Errorf("ARM at %s: %q, %v", url, got, err)
		}
	}
}

func TestStoreFind(t *testing.T) {
	s := Store{Dir: t.TempDir()}
	if _, err := s.Find(""); err == nil || !strings.Contains(err.Error(), "rdv login") {
		t.Errorf("empty store: %v", err)
	}
	for url, name := range map[string]string{"https://a.example": "one", "https://b.example:8443": "two", "https://c.example": "two"} {
		if err := s.Save(&Account{URL: url, Workspace: brokerapi.Workspace{Name: name}}); err != nil {
			t.Fatal(err)
		}
	}
	tests := []struct{ selector, want string }{
		{"one", "https://a.example"}, {"a.example", "https://a.example"}, {"https://b.example:8443/", "https://b.example:8443"},
		{"b.example", "https://b.example:8443"}, {"two", "could be any of"}, {"three", "not signed in to workspace"}, {"", "which workspace?"},
	}
	for _, tt := range tests {
		a, err := s.Find(tt.selector)
		switch {
		case err == nil && a.URL != tt.want, err != nil && !strings.Contains(err.Error(), tt.want):
			t.Errorf("Find(%q) = %v, %v; want %q", tt.selector, a, err, tt.want)
		}
	}
	if err := s.Use(&Account{URL: "https://c.example"}); err != nil {
		t.Fatal(err)
	}
	if a, err := s.Find(""); err != nil || a.URL != "https://c.example" {
		t.Errorf("current: %v, %v", a, err)
	}
}

func TestActivityIDs(t *testing.T) {
	seen := map[string]bool{}
	for range 100 {
		id := newActivity()
		if !isActivity(id) || id[14] != '4' || seen[id] {
			t.Fatalf("activity id %q", id)
		}
		seen[id] = true
	}
	for _, bad := range []string{"", "x", strings.Repeat("a", 36), "5A3C1F00-0000-4000-8000-000000000001"} {
		if isActivity(bad) {
			t.Errorf("%q taken as an activity id", bad)
		}
	}
}

func TestClientEnv(t *testing.T) {
	dir := t.TempDir()
	if got := clientEnv([]string{"A=1"}, dir, "PEM"); !slices.Contains(got, "SSL_CERT_FILE="+filepath.Join(dir, "ca.pem")) {
		t.Errorf("environment %v lacks the CA", got)
	}
	mine := filepath.Join(dir, "mine.pem")
	if err := os.WriteFile(mine, []byte("MINE"), 0o600); err != nil {
		t.Fatal(err)
	}
	clientEnv([]string{"SSL_CERT_FILE=" + mine}, dir, "PEM")
	if got, _ := os.ReadFile(filepath.Join(dir, "ca.pem")); string(got) != "MINE\nPEM" {
		t.Errorf("the CA file is %q, want the user's own and the workspace's", got)
	}
	if got := clientEnv([]string{"A=1"}, dir, ""); len(got) != 1 {
		t.Errorf("environment %v without a CA", got)
	}
}

func FuzzParseRDP(f *testing.F) {
	f.Add([]byte("full address:s:x\r\ngatewayhostname:s:gw:443\r\ngatewayaccesstoken:s:t\r\n"), "arm")
	f.Add([]byte{0xff, 0xfe, 'a', 0, ':', 0}, "raw")
	f.Add([]byte("\xef\xbb\xbfresourceprovider:s:arm\n\x00"), "tsgu")
	f.Fuzz(func(t *testing.T, data []byte, mode string) {
		rdp, err := parseRDP(data)
		if err != nil {
			return
		}
		for _, l := range rdp.lines {
			if strings.ContainsAny(l, "\n") {
				t.Fatalf("a line holds a line break: %q", l)
			}
		}
		options, err := rdp.gatewayOptions(mode, "https://ws.example.com")
		if err == nil && mode != ModeTSGU && (len(options) == 0 || strings.ContainsAny(options[0], ", \t\"") && !strings.Contains(options[0], ",bearer:")) {
			t.Fatalf("options %q", options)
		}
		again, err := parseRDP(rdp.withoutGateway())
		if err != nil || again.get("gatewayaccesstoken") != "" {
			t.Fatalf("without gateway: %v, %q", err, again.lines)
		}
	})
}
