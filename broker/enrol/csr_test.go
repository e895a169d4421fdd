package enrol

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"net/url"
	"slices"
	"strings"
	"testing"

	"rendezvous.dev/rendezvous/broker/model"
	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/rdpkey"
)

func must(t testing.TB, v any, params ...string) []byte {
	t.Helper()
	raw, err := asn1.MarshalWithParams(v, strings.Join(params, ","))
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// attribute is one of a request, with these values (DER).
func attribute(t testing.TB, oid asn1.ObjectIdentifier, values ...[]byte) []byte {
	t.Helper()
	set := asn1.RawValue{Tag: asn1.TagSet, IsCompound: true, Bytes: slices.Concat(values...)}
	return must(t, struct {
		ID     asn1.ObjectIdentifier
		Values asn1.RawValue
	}{oid, set})
}

// altNames is the attribute by which a host asks for its names.
func altNames(t testing.TB, names ...string) []byte {
	t.Helper()
	return attribute(t, oidExtensionRequest, must(t, []pkix.Extension{dnsNames(t, names...)}))
}

func dnsNames(t testing.TB, names ...string) pkix.Extension {
	t.Helper()
	var all []asn1.RawValue
	for _, n := range names {
		all = append(all, asn1.RawValue{Class: 2, Tag: 2, Bytes: []byte(n)})
	}
	return pkix.Extension{Id: oidSubjectAltName, Value: must(t, all)}
}

// rawCSR is a request that carries these attributes as they are, signed with a key of its own.
func rawCSR(t testing.TB, attributes ...[]byte) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	tbs := must(t, struct {
		Version    int
		Subject    pkix.RDNSequence
		PublicKey  asn1.RawValue
		Attributes asn1.RawValue
	}{0, nil, asn1.RawValue{FullBytes: spki}, asn1.RawValue{Class: 2, Tag: 0, IsCompound: true, Bytes: slices.Concat(attributes...)}})
	sum := sha256.Sum256(tbs)
	signature, err := key.Sign(rand.Reader, sum[:], crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	der := must(t, struct {
		TBS       asn1.RawValue
		Algorithm pkix.AlgorithmIdentifier
		Signature asn1.BitString
	}{asn1.RawValue{FullBytes: tbs}, pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 2}}, asn1.BitString{Bytes: signature, BitLength: 8 * len(signature)}})
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
}

// What is forwarded to an issuer asks for the host's names and nothing else, in any form that any issuer might read.
func TestCSRAttributes(t *testing.T) {
	names := brokerapi.RDPNames(ns, "linux", "linux-1")
	good := altNames(t, names...)
	evil := dnsNames(t, "administrator.example.com")
	eku := pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 37}, Value: must(t, []asn1.ObjectIdentifier{{1, 3, 6, 1, 4, 1, 311, 20, 2, 2}})}
	microsoft := asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 311, 2, 1, 14}
	pair := asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 311, 13, 2, 1}
	password := asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 7}
	unknown := asn1.ObjectIdentifier{1, 2, 3, 4}
	for _, c := range []struct {
		name       string
		attributes [][]byte
		says       string // empty: it is taken
	}{
		{"the names alone", [][]byte{good}, ""},
		{"no attribute", nil, "only names must be"},
		{"Microsoft's extensions", [][]byte{good, attribute(t, microsoft, must(t, []pkix.Extension{evil, eku}))}, "1.3.6.1.4.1.311.2.1.14 (Microsoft's certificate extensions)"},
		{"Microsoft's extensions first", [][]byte{attribute(t, microsoft, must(t, []pkix.Extension{evil})), good}, "1.3.6.1.4.1.311.2.1.14"},
		{"Microsoft's name and value", [][]byte{good, attribute(t, pair, must(t, struct{ Name, Value asn1.RawValue }{
			asn1.RawValue{Tag: 30, Bytes: []byte("\x00C")}, asn1.RawValue{Tag: 30, Bytes: []byte("\x00U")},
		}))}, "1.3.6.1.4.1.311.13.2.1 (Microsoft's enrolment name and value)"},
		{"a challenge password", [][]byte{good, attribute(t, password, must(t, "secret"))}, "1.2.840.113549.1.9.7 (challengePassword)"},
		{"an unknown attribute", [][]byte{good, attribute(t, unknown, must(t, 1))}, "1.2.3.4"},
		{"an unknown attribute without a value", [][]byte{good, attribute(t, unknown)}, "1.2.3.4"},
		{"the names twice", [][]byte{good, good}, "1.2.840.113549.1.9.14 (extension request) more than once"},
		{"other names in a second attribute", [][]byte{good, attribute(t, oidExtensionRequest, must(t, []pkix.Extension{evil}))}, "more than once"},
		{"other names in a second value", [][]byte{attribute(t, oidExtensionRequest, must(t, []pkix.Extension{dnsNames(t, names...)}), must(t, []pkix.Extension{evil}))}, "has 2 values"},
		{"no value", [][]byte{attribute(t, oidExtensionRequest)}, ""},
		{"the extension twice", [][]byte{attribute(t, oidExtensionRequest, must(t, []pkix.Extension{dnsNames(t, names...), evil}))}, ""},
		{"a usage too", [][]byte{attribute(t, oidExtensionRequest, must(t, []pkix.Extension{dnsNames(t, names...), eku}))}, "2.5.29.37 (extended key usage)"},
		{"bytes behind the extensions", [][]byte{attribute(t, oidExtensionRequest, must(t, []any{dnsNames(t, names...), 7}))}, ""},
		{"an attribute that is none", [][]byte{good, must(t, 7)}, ""},
		{"bytes behind the names", [][]byte{attribute(t, oidExtensionRequest, must(t, []pkix.Extension{{Id: oidSubjectAltName, Value: append(dnsNames(t, names...).Value, 0)}}))}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := checkRDPCSR(rawCSR(t, c.attributes...), linux1, &model.Pool{})
			switch {
			case c.name == "the names alone":
				if err != nil {
					t.Errorf("refused: %v", err)
				}
			case err == nil:
				t.Error("taken")
			case !strings.Contains(err.Error(), c.says):
				t.Errorf("%q does not say %q", err, c.says)
			}
		})
	}
	// The same holds for the identity.
	uri := attribute(t, oidExtensionRequest, must(t, []pkix.Extension{{
		Id: oidSubjectAltName, Value: must(t, []asn1.RawValue{{Class: 2, Tag: 6, Bytes: []byte(linux1.String())}}),
	}}))
	if _, _, err := checkClientCSR(rawCSR(t, uri), linux1); err != nil {
		t.Error(err)
	}
	if _, _, err := checkClientCSR(rawCSR(t, uri, attribute(t, microsoft, must(t, []pkix.Extension{evil}))), linux1); err == nil || !strings.Contains(err.Error(), "1.3.6.1.4.1.311.2.1.14") {
		t.Errorf("clientCSR: %v", err)
	}
}

// Where the pool chooses the kind of key, no other is signed.
func TestRDPKeyOfThePoolsChoice(t *testing.T) {
	rsa := &model.Pool{Name: "linux", RDPKey: rdpkey.Kind{Algorithm: rdpkey.RSA, Size: 3072}, RDPKeyChosen: true}
	for name, c := range map[string]struct {
		pool *model.Pool
		kind rdpkey.Kind
		says string // empty: it is taken
	}{
		"as chosen":                 {rsa, rdpkey.Kind{Algorithm: rdpkey.RSA, Size: 3072, Encoding: rdpkey.PKCS1}, ""},
		"another size":              {rsa, rdpkey.Kind{Algorithm: rdpkey.RSA}, "its key must be RSA of 3072 bits, as spec.rdpCertificate.privateKey of HostPool linux says"},
		"another algorithm":         {rsa, rdpkey.Kind{}, "its key must be RSA of 3072 bits"},
		"nothing chosen, and RSA":   {&model.Pool{RDPKey: rdpkey.Kind{}.Complete()}, rdpkey.Kind{Algorithm: rdpkey.RSA}, ""},
		"nothing chosen, and ECDSA": {&model.Pool{RDPKey: rdpkey.Kind{}.Complete()}, rdpkey.Kind{}, ""},
	} {
		data, err := c.kind.Generate()
		if err != nil {
			t.Fatal(err)
		}
		key, _, err := rdpkey.Parse(data)
		if err != nil {
			t.Fatal(err)
		}
		der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{DNSNames: brokerapi.RDPNames(ns, "linux", "linux-1")}, key)
		if err != nil {
			t.Fatal(err)
		}
		_, err = checkRDPCSR(string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})), linux1, c.pool)
		if c.says == "" && err != nil || c.says != "" && (err == nil || !strings.Contains(err.Error(), c.says)) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Whatever request is taken carries one attribute at most, which names the host's names and nothing else.
func FuzzCSR(f *testing.F) {
	names := brokerapi.RDPNames(ns, "linux", "linux-1")
	for _, text := range []string{
		rawCSR(f), rawCSR(f, altNames(f, names...)), rawCSR(f, altNames(f, names...), altNames(f, names...)),
		rawCSR(f, altNames(f, names...), attribute(f, asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 311, 2, 1, 14}, must(f, []pkix.Extension{}))),
	} {
		block, _ := pem.Decode([]byte(text))
		f.Add(block.Bytes)
	}
	uri, _ := url.Parse(linux1.String())
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{uri}}, key)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(der)
	f.Fuzz(func(t *testing.T, der []byte) {
		text := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
		_, rdp := checkRDPCSR(text, linux1, &model.Pool{})
		_, _, client := checkClientCSR(text, linux1)
		// What stands in it apart from its signature, which no fuzzer makes, is checked in any case.
		csr, err := x509.ParseCertificateRequest(der)
		if err != nil {
			if rdp == nil || client == nil {
				t.Fatal("taken, though it can't be read")
			}
			return
		}
		extensions, err := requestedExtensions(csr.RawTBSCertificateRequest)
		if err == nil && len(extensions) != len(csr.Extensions) {
			t.Fatalf("%d extensions here, %d by Go", len(extensions), len(csr.Extensions))
		}
		if rdp == nil && (len(extensions) != 1 || len(csr.DNSNames) != len(names) || len(csr.URIs)+len(csr.EmailAddresses)+len(csr.IPAddresses) > 0) {
			t.Fatalf("an RDP request with %+v", extensions)
		}
		if client == nil && (len(extensions) != 1 || len(csr.URIs) != 1 || csr.URIs[0].String() != linux1.String() || len(csr.DNSNames) > 0) {
			t.Fatalf("an identity's request with %+v", extensions)
		}
	})
}
