package feed

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/binary"
	"encoding/pem"
	"encoding/xml"
	"flag"
	"image"
	"image/png"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf16"

	"rendezvous.dev/rendezvous/broker/model"
)

var update = flag.Bool("update", false, "rewrite the golden files")

var (
	desktop = &model.Resource{Name: "linux-desktop", DisplayName: "Linux desktop", Type: model.Desktop, Pool: "linux",
		Redirection: model.Redirection{Clipboard: true, Audio: true}}
	app = &model.Resource{Name: "editor", DisplayName: "Editor <\"π\">", Type: model.RemoteApp, Pool: "linux", Program: "||editor", Arguments: "--new\r\ngatewayhostname:s:evil",
		Redirection: model.Redirection{Clipboard: true, Microphone: true, Drives: true, Printers: true, SmartCards: true, Ports: true}}
	gw = &model.Gateway{Name: "gateway-a", Hostname: "gateway-a.rdv.test", Port: 443}
)

func desktopFile() File {
	return File{Resource: desktop, Gateway: gw, Address: "linux.ns.rdv.internal", Ticket: "TICKET"}
}

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s differs (go test -update rewrites it); got\n%s", path, got)
	}
}

func TestLines(t *testing.T) {
	custom := desktopFile()
	custom.Properties = []string{
		"Authentication Level:i:1", "audiocapturemode:i:1", "use  MultiMon :i:1", "autoreconnection   enabled:i:0", "bad\r\ngatewayhostname:s:evil",
		"gatewayhostname:s:evil", "Full Address:s:evil", "signscope:s:", "pcb:s:x", "no colon",
	}
	policy := desktopFile()
	policy.Properties = []string{
		"redirectdrives:i:1", "DrivesToRedirect:s:*", "usbdevicestoredirect:s:*", "audiocapturemode:i:1", "redirectsmartcards:i:1", "redirectclipboard:i:0",
		"Authentication  Level :i:0", "enablecredsspsupport:i:0", "negotiate security layer:i:0", "kdcproxyname:s:evil", "alternate   shell:s:cmd", "Full  Address:s:evil",
		"server port:i:3390", "remoteapplicationmode:i:1", "remoteapplicationprogram:s:cmd", "resourceprovider:s:arm", "password  51:b:00",
	}
	if got, want := strings.Join(Lines(policy), "\n"), strings.Join(Lines(desktopFile()), "\n"); got != want {
		t.Errorf("properties changed what is Rendezvous' to set:\n%s", got)
	}
	account := desktopFile()
	account.Account = "alice"
	account.Properties = []string{"username:s:root", "prompt for credentials:i:1", "password:s:another"}
	arm := desktopFile()
	arm.ARM = true
	for name, f := range map[string]File{
		"desktop.rdp": desktopFile(),
		"account.rdp": account,
		"arm.rdp":     arm,
		"app.rdp":     {Resource: app, Gateway: gw, Address: "linux.ns.rdv.internal", Ticket: "TICKET", Verified: true},
		"custom.rdp":  custom,
	} {
		t.Run(name, func(t *testing.T) { golden(t, name, []byte(strings.Join(Lines(f), "\n")+"\n")) })
	}
}

func TestEncode(t *testing.T) {
	got := Encode([]string{"a:s:é", "b:s:😀"})
	want := append([]byte{0xff, 0xfe}, "a\x00:\x00s\x00:\x00\xe9\x00\r\x00\n\x00b\x00:\x00s\x00:\x00\x3d\xd8\x00\xde\r\x00\n\x00"...)
	if !bytes.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// signer makes a publisher's certificate with a key that Windows clients know, and the CA that issued it.
func signer(t *testing.T) (cert *tls.Certificate, ca []byte) {
	t.Helper()
	make := func(name string, isCA bool, parent *x509.Certificate, parentKey *rsa.PrivateKey) (*x509.Certificate, *rsa.PrivateKey) {
		key, err := rsa.GenerateKey(rand.Reader, 2048)
		if err != nil {
			t.Fatal(err)
		}
		tmpl := &x509.Certificate{
			SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, IsCA: isCA, BasicConstraintsValid: true,
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
		}
		if isCA {
			tmpl.KeyUsage = x509.KeyUsageCertSign
		} else { // as the operator asks cert-manager for
			tmpl.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning, x509.ExtKeyUsageEmailProtection}
		}
		if parent == nil {
			parent, parentKey = tmpl, key
		}
		der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, key.Public(), parentKey)
		if err != nil {
			t.Fatal(err)
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return c, key
	}
	root, rootKey := make("root", true, nil, nil)
	mid, midKey := make("intermediate", true, root, rootKey)
	leaf, key := make("Example Ltd", false, mid, midKey)
	return &tls.Certificate{Certificate: [][]byte{leaf.Raw, mid.Raw}, PrivateKey: key, Leaf: leaf},
		pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.Raw})
}

// verify does what a reader of protocol.md would: it rebuilds the message from signscope and asks openssl.
func verify(t *testing.T, file, ca []byte) error {
	t.Helper()
	if file[0] != 0xff || file[1] != 0xfe {
		t.Fatal("no byte-order mark")
	}
	var units []uint16
	for b := file[2:]; len(b) > 1; b = b[2:] {
		units = append(units, binary.LittleEndian.Uint16(b))
	}
	lines := map[string]string{}
	for _, l := range strings.Split(strings.TrimSuffix(string(utf16.Decode(units)), "\r\n"), "\r\n") {
		name, _, _ := strings.Cut(l, ":")
		lines[strings.ToLower(name)] = l
	}
	var message string
	for _, name := range strings.Split(strings.TrimPrefix(lines["signscope"], "signscope:s:"), ",") {
		message += lines[strings.ToLower(name)] + "\r\n"
	}
	message += lines["signscope"] + "\r\n\x00"
	var raw []byte
	for _, u := range utf16.Encode([]rune(message)) {
		raw = binary.LittleEndian.AppendUint16(raw, u)
	}
	blob, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(lines["signature"], "signature:s:"))
	if err != nil || len(blob) < 12 {
		t.Fatalf("signature: %v", err)
	}
	if n := binary.LittleEndian.Uint32(blob[8:]); int(n) != len(blob)-12 || blob[0] != 1 || blob[2] != 1 || blob[4] != 1 {
		t.Fatalf("signature header %x, %d bytes follow", blob[:12], len(blob)-12)
	}
	dir := t.TempDir()
	write := func(name string, data []byte) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	out, err := exec.Command("openssl", "cms", "-verify", "-binary", "-inform", "DER", "-in", write("sig.der", blob[12:]),
		"-content", write("msg", raw), "-CAfile", write("ca.pem", ca), "-out", os.DevNull).CombinedOutput()
	t.Logf("openssl: %s", out)
	return err
}

func TestSignatureByOpenSSL(t *testing.T) {
	cert, ca := signer(t)
	for name, f := range map[string]File{"desktop": desktopFile(), "app": {Resource: app, Gateway: gw, Address: "a", Ticket: "T", Verified: true}} {
		t.Run(name, func(t *testing.T) {
			signed, err := Sign(Lines(f), cert)
			if err != nil {
				t.Fatal(err)
			}
			file := Encode(signed)
			if err := verify(t, file, ca); err != nil {
				t.Fatal(err)
			}
			replace := func(old, new string) []byte {
				altered := bytes.Replace(file, utf16le(old), utf16le(new), 1)
				if bytes.Equal(altered, file) {
					t.Fatalf("%q is not in the file", old)
				}
				return altered
			}
			for _, c := range [][2]string{
				{"gatewayhostname:s:gateway-a", "gatewayhostname:s:gateway-b"}, {"redirectclipboard:i:1", "redirectclipboard:i:0"},
				{"authentication level:i:" + map[bool]string{true: "1", false: "2"}[f.Verified], "authentication level:i:0"},
				{"alternate full address:s:", "alternate full address:s:x"}, {"signscope:s:Full Address,", "signscope:s:"},
			} {
				if verify(t, replace(c[0], c[1]), ca) == nil {
					t.Errorf("%q made %q was not noticed", c[0], c[1])
				}
			}
			if err := verify(t, replace("gatewayaccesstoken:s:T", "gatewayaccesstoken:s:X"), ca); err != nil {
				t.Errorf("a changed ticket broke the signature: %v", err)
			}
			_, otherCA := signer(t)
			if verify(t, file, otherCA) == nil {
				t.Error("another CA verified it")
			}
		})
	}
}

func TestDocument(t *testing.T) {
	var icon bytes.Buffer
	if err := png.Encode(&icon, image.NewGray(image.Rect(0, 0, 32, 32))); err != nil {
		t.Fatal(err)
	}
	withIcon := *desktop
	withIcon.Icon = icon.Bytes()
	w := Web{
		ID: "ns/demo", Name: "Demo & more", Resources: []*model.Resource{&withIcon, app}, Now: time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC),
		FilePath: func(r string) string { return "/api/v1/resources/" + r + ".rdp" },
		IconPath: func(r string) string { return "/api/v1/resources/" + r + ".png" },
	}
	for _, schema := range []string{Schema11, Schema20} {
		doc, err := Document(w, schema)
		if err != nil {
			t.Fatal(err)
		}
		if err := xml.Unmarshal(doc, new(struct{})); err != nil {
			t.Errorf("not XML: %v", err)
		}
		golden(t, "webfeed-"+schema+".xml", doc)
	}
	empty, err := Document(Web{ID: "x", Name: "x"}, Schema20)
	if err != nil || !bytes.Contains(empty, []byte("<Resources></Resources>")) {
		t.Errorf("an empty list: %v\n%s", err, empty)
	}
}

// Whatever a pool's properties say, the lines that Rendezvous sets stand as they were, each once and on one line.
func FuzzProperties(f *testing.F) {
	f.Add("use multimon:i:1")
	f.Add("Full  Address:s:evil\r\ngatewayhostname:s:evil")
	f.Add("authentication\u00a0level:i:0")
	f.Add("x\u2028y:s:\u202ez\u009b")
	own := Lines(desktopFile())
	f.Fuzz(func(t *testing.T, property string) {
		file := desktopFile()
		file.Properties = []string{property}
		lines := Lines(file)
		names := map[string]bool{}
		for _, l := range lines {
			if strings.ContainsAny(l, "\r\n\x00\u009b\u2028\u202e") || names[nameOf(l)] {
				t.Fatalf("line %q", l)
			}
			names[nameOf(l)] = true
		}
		for _, l := range own {
			if Reserved(l) && !strings.Contains(strings.Join(lines, "\n")+"\n", l+"\n") {
				t.Fatalf("%q is gone from %q", l, lines)
			}
		}
	})
}
