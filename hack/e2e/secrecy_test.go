package e2e

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	mrand "math/rand/v2"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"sigs.k8s.io/controller-runtime/pkg/client"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/hack/desktop/rdpkit"
	"rendezvous.dev/rendezvous/hack/stage"
	"rendezvous.dev/rendezvous/hack/wiretap"
	"rendezvous.dev/rendezvous/wire/brokerapi"
)

// A user types a random word. The relay neither carries nor holds it; with the keys that the client logged, the very
// same capture shows it, so this test can fail.
func TestRelayReadsNothing(t *testing.T) {
	enrolMachine(t)
	for _, mode := range []string{"tsgu", "raw", "arm"} {
		t.Run(mode, func(t *testing.T) {
			canary := randomWord(14)
			inner, stopInner := capture(t, w.machine.Net.Name, "lo", "tcp port 3389")
			leg, stopLeg := capture(t, w.machine.Net.Name, "eth0", "tcp port 443")
			showDesktop(t, "machine-desktop", mode, w.outColor, "/tls:secrets-file:/root/keys-"+mode)
			if err := w.alice.Type(t.Context(), canary); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second) // the last keys are on their way
			for _, pid := range relayPIDs(t) {
				if where, err := searchMemory(pid, canary); err != nil {
					t.Errorf("relay %s: %v", pid, err)
				} else if where != "" {
					t.Errorf("the relay's memory holds the word, at %s", where)
				}
			}
			stopInner()
			stopLeg()

			// What the agent hands to the RDP server is, byte for byte, what came through the relay.
			toServer, toClient := longest(t, inner, 3389)
			if wiretap.Typed(toServer, canary) {
				t.Error("the stream that the relay carries shows the word")
			}
			fromMachine, toMachine := longest(t, leg, 443)
			if wiretap.Typed(fromMachine, canary) || wiretap.Typed(toMachine, canary) {
				t.Error("the agent's leg shows the word")
			}
			keys, err := w.alice.ReadFile("/root/keys-" + mode)
			if err != nil {
				t.Fatal(err)
			}
			plain, suite, err := wiretap.DecryptClient(toServer, toClient, wiretap.ParseKeys(keys))
			if err != nil {
				t.Fatalf("the client's keys do not open the inner TLS 1.3: %v", err)
			}
			if !wiretap.Typed(plain, canary) {
				t.Error("the word is not even found with the client's keys: this test sees nothing")
			}
			t.Logf("inner TLS 1.3, %s: %d bytes from the client in the clear text", suite, len(plain))
		})
	}
}

// longest returns both directions of the connection to the port that carried most.
func longest(t *testing.T, file string, port uint16) (toServer, toClient []byte) {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	streams, err := wiretap.Streams(f)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range streams { // longest first
		if s.Src != port {
			continue
		}
		for _, back := range streams {
			if back.Src == s.Dst && back.Dst == port {
				return back.Data, s.Data
			}
		}
	}
	t.Fatalf("%s holds no connection to port %d", file, port)
	return nil, nil
}

func randomWord(n int) string {
	var b strings.Builder
	for range n {
		b.WriteByte(byte('a' + mrand.N(26)))
	}
	return b.String()
}

// searchMemory looks for the word, as text or as typed keys, in all of a process's writable memory.
func searchMemory(pid, word string) (string, error) {
	maps, err := os.Open("/proc/" + pid + "/maps")
	if err != nil {
		return "", err
	}
	defer maps.Close()
	mem, err := os.Open("/proc/" + pid + "/mem")
	if err != nil {
		return "", err
	}
	defer mem.Close()
	read := 0
	for lines := bufio.NewScanner(maps); lines.Scan(); {
		var from, to int64
		var perm string
		if n, _ := fmt.Sscanf(lines.Text(), "%x-%x %s", &from, &to, &perm); n != 3 || !strings.HasPrefix(perm, "rw") {
			continue
		}
		data := make([]byte, min(to-from, 256<<20))
		n, _ := io.ReadFull(io.NewSectionReader(mem, from, int64(len(data))), data)
		read += n
		if wiretap.Typed(data[:n], word) {
			return lines.Text(), nil
		}
	}
	if read < 1<<20 {
		return "", fmt.Errorf("only %d bytes of memory could be read", read)
	}
	return "", nil
}

// searchMemory does find what a process holds: this one holds a word of its own.
func TestSearchMemoryFinds(t *testing.T) {
	word := []byte(randomWord(14))
	where, err := searchMemory("self", string(word))
	if err != nil || where == "" {
		t.Errorf("searchMemory = %q, %v; want a place", where, err)
	}
}

// New certificates, asked for over the control channel with the old ones, end no session and serve the next.
func TestHostCertificatesRenew(t *testing.T) {
	enrolMachine(t)
	running := showDesktop(t, "machine-desktop", "tsgu", w.outColor)
	fingerprint := func() string {
		var sh rdv.SessionHost
		if err := w.Client.Get(t.Context(), client.ObjectKey{Namespace: stage.Namespace, Name: outside}, &sh); err != nil || sh.Status.Agent == nil {
			return ""
		}
		return sh.Status.Agent.CertificateFingerprint
	}
	before := fingerprint()
	if len(before) != 64 {
		t.Fatalf("SessionHost %s tells no certificate fingerprint: %q", outside, before)
	}
	old, err := w.machine.ReadFile(rdpkit.CertDir + "/tls.crt")
	if err != nil {
		t.Fatal(err)
	}
	if err := w.machine.Agent.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	if err := eventually(t.Context(), time.Minute, func() error {
		now, err := w.machine.ReadFile(rdpkit.CertDir + "/tls.crt")
		if err != nil || bytes.Equal(now, old) || fingerprint() == before {
			return fmt.Errorf("the RDP certificate is not renewed (%v): %s", err, tail(w.machine.Agent.Output(), 3))
		}
		return w.hostReady(t.Context(), outside)
	}); err != nil {
		t.Fatal(err)
	}
	select {
	case <-running.Done():
		t.Errorf("the renewal ended the session: %s", tail(running.Output(), 10))
	default:
	}
	running.Stop()
	showDesktop(t, "machine-desktop", "raw", w.outColor)
}

// A session host that shows a certificate of another CA is refused by the client, whoever let it join.
func TestForeignHostCertificateRefused(t *testing.T) {
	enrolMachine(t)
	good := map[string][]byte{}
	for _, name := range []string{"tls.crt", "tls.key"} {
		data, err := w.machine.ReadFile(rdpkit.CertDir + "/" + name)
		if err != nil {
			t.Fatal(err)
		}
		good[name] = data
	}
	install := func(files map[string][]byte) {
		for name, data := range files {
			if err := w.machine.WriteFile(rdpkit.CertDir+"/"+name, data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(3 * time.Second) // the desktop looks every second
	}
	t.Cleanup(func() { install(good) })
	install(foreign(t, brokerapi.RDPNames(stage.Namespace, "machines", outside)))

	d, err := w.alice.Connect(t.Context(), "machine-desktop", "tsgu")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Stop)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	code, err := d.ExitCode(ctx)
	if err != nil {
		t.Fatalf("the client goes on with a certificate of another CA: %v", err)
	}
	if out := d.Output(); code == 0 || !strings.Contains(strings.ToLower(out), "certificate") {
		t.Errorf("the client ended with %d and did not speak of the certificate:\n%s", code, tail(out, 20))
	}
}

// foreign makes a self-made CA's certificate for the names.
func foreign(t *testing.T, names []string) map[string][]byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: names[0]}, DNSNames: names,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return map[string][]byte{
		"tls.crt": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		"tls.key": bytes.TrimSpace(append(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}), '\n')),
	}
}
