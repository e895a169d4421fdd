package enrol

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"strings"

	"rendezvous.dev/rendezvous/broker/model"
	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/identity"
)

const (
	maxCSR         = 16 << 10
	minRSA, maxRSA = 2048, 4096
)

// All that a request may ask for is alternative names, in the one attribute for extensions (RFC 2985, 5.4.2). Issuers get
// the request as it came, and some of them act on attributes that Go doesn't read.
var (
	oidSubjectAltName   = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidExtensionRequest = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 14}
)

// attributeNames are of attributes that a person may know by name.
var attributeNames = map[string]string{
	"1.2.840.113549.1.9.7":   "challengePassword",
	"1.2.840.113549.1.9.2":   "unstructuredName",
	"1.3.6.1.4.1.311.2.1.14": "Microsoft's certificate extensions",
	"1.3.6.1.4.1.311.13.2.1": "Microsoft's enrolment name and value",
	"1.3.6.1.4.1.311.13.2.2": "Microsoft's cryptographic provider",
	"1.3.6.1.4.1.311.13.2.3": "Microsoft's version of Windows",
	"1.3.6.1.4.1.311.21.20":  "Microsoft's client information",
	"1.2.840.113549.1.9.14":  "extension request",
	"2.5.29.17":              "subject alternative name",
	"2.5.29.37":              "extended key usage",
	"2.5.29.19":              "basic constraints",
	"1.3.6.1.4.1.311.20.2":   "Microsoft's template name",
	"1.3.6.1.4.1.311.21.7":   "Microsoft's template",
	"1.3.6.1.4.1.311.25.2":   "Microsoft's security identifier",
	"1.3.6.1.4.1.311.20.2.3": "Microsoft's user principal name",
}

func named(oid asn1.ObjectIdentifier) string {
	if name := attributeNames[oid.String()]; name != "" {
		return fmt.Sprintf("%v (%s)", oid, name)
	}
	return oid.String()
}

// checkClientCSR takes a request for exactly one identity, and nothing else, and gives the fingerprint of its key.
func checkClientCSR(text string, id identity.ID) (csr []byte, key string, err error) {
	parsed, names, err := parseCSR(text, id.Host)
	if err != nil {
		return nil, "", err
	}
	if len(parsed.URIs) != 1 || names != 1 || parsed.URIs[0].String() != id.String() {
		return nil, "", fmt.Errorf("its only name must be the URI %s", id)
	}
	return []byte(text), identity.KeyFingerprint(parsed.RawSubjectPublicKeyInfo), nil
}

// checkRDPCSR takes a request for exactly the host's RDP names, over a key of the kind that the pool chooses, if it does.
func checkRDPCSR(text string, id identity.ID, pool *model.Pool) ([]byte, error) {
	want := brokerapi.RDPNames(id.Namespace, id.Pool, id.Host)
	csr, names, err := parseCSR(text, append([]string{id.Host}, want...)...)
	if err != nil {
		return nil, err
	}
	got := slices.Clone(csr.DNSNames)
	slices.Sort(got)
	sorted := slices.Clone(want)
	slices.Sort(sorted)
	if names != len(want) || !slices.Equal(got, sorted) {
		return nil, fmt.Errorf("its only names must be the DNS names %s", strings.Join(want, " and "))
	}
	if pool.RDPKeyChosen {
		if err := pool.RDPKey.Holds(csr.PublicKey); err != nil {
			return nil, fmt.Errorf("%w, as spec.rdpCertificate.privateKey of HostPool %s says: the agent asks again once it has heard of that; update one that doesn't know this field", err, pool.Name)
		}
	}
	return []byte(text), nil
}

// parseCSR reads a request whose signature and key are right, and that asks for no more than alternative names and one
// of the common names. It also counts the alternative names of every kind, those that Go doesn't know included.
func parseCSR(text string, commonNames ...string) (csr *x509.CertificateRequest, names int, err error) {
	if len(text) > maxCSR {
		return nil, 0, fmt.Errorf("it is longer than %d bytes", maxCSR)
	}
	block, rest := pem.Decode([]byte(text))
	if block == nil || block.Type != "CERTIFICATE REQUEST" || len(strings.TrimSpace(string(rest))) > 0 {
		return nil, 0, errors.New("it must be one PEM block of type CERTIFICATE REQUEST")
	}
	var outer struct {
		TBS       asn1.RawValue
		Algorithm pkix.AlgorithmIdentifier
		Signature asn1.BitString
	}
	if rest, err := asn1.Unmarshal(block.Bytes, &outer); err != nil || len(rest) > 0 {
		return nil, 0, errors.New("it can't be read")
	}
	extensions, err := requestedExtensions(outer.TBS.FullBytes) // first, for it names what Go's parser would refuse without a name
	if err != nil {
		return nil, 0, err
	}
	if csr, err = x509.ParseCertificateRequest(block.Bytes); err != nil {
		return nil, 0, errors.New("it can't be read")
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, 0, errors.New("it is not signed with its own key")
	}
	if err := checkKey(csr.PublicKey); err != nil {
		return nil, 0, err
	}
	s := csr.Subject
	if len(s.Names) > 1 || len(s.Names) == 1 && !slices.Contains(commonNames, s.CommonName) {
		return nil, 0, fmt.Errorf("its subject must be empty, or the common name %s alone", strings.Join(commonNames, " or "))
	}
	for i, e := range extensions {
		if !e.Id.Equal(oidSubjectAltName) {
			return nil, 0, fmt.Errorf("it asks for the extension %s", named(e.Id))
		}
		if i > 0 {
			return nil, 0, fmt.Errorf("it asks for the extension %s more than once", named(e.Id))
		}
		var all []asn1.RawValue
		if rest, err := asn1.Unmarshal(e.Value, &all); err != nil || len(rest) > 0 {
			return nil, 0, errors.New("its alternative names can't be read")
		}
		names += len(all)
	}
	return csr, names, nil
}

// requestedExtensions reads the extensions that a request asks for. Attributes of every other kind, a second one of this
// kind, and one with more than one value are errors. Go's own parser skips those, and issuers may not.
func requestedExtensions(tbs []byte) ([]pkix.Extension, error) {
	var info struct {
		Version    int
		Subject    asn1.RawValue
		PublicKey  asn1.RawValue
		Attributes []asn1.RawValue `asn1:"tag:0"`
	}
	if rest, err := asn1.Unmarshal(tbs, &info); err != nil || len(rest) > 0 {
		return nil, errors.New("it can't be read")
	}
	var extensions []pkix.Extension
	for i, raw := range info.Attributes {
		var attribute struct {
			ID     asn1.ObjectIdentifier
			Values []asn1.RawValue `asn1:"set"`
		}
		if rest, err := asn1.Unmarshal(raw.FullBytes, &attribute); err != nil || len(rest) > 0 {
			return nil, fmt.Errorf("its attribute number %d can't be read", i+1)
		}
		switch {
		case !attribute.ID.Equal(oidExtensionRequest):
			return nil, fmt.Errorf("it carries the attribute %s: leave it out", named(attribute.ID))
		case i > 0:
			return nil, fmt.Errorf("it carries the attribute %s more than once", named(attribute.ID))
		case len(attribute.Values) != 1:
			return nil, fmt.Errorf("its attribute %s has %d values, not one", named(attribute.ID), len(attribute.Values))
		}
		if rest, err := asn1.Unmarshal(attribute.Values[0].FullBytes, &extensions); err != nil || len(rest) > 0 {
			return nil, fmt.Errorf("its attribute %s can't be read", named(attribute.ID))
		}
	}
	return extensions, nil
}

func checkKey(key any) error {
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		if k.Curve.Params().BitSize >= 256 {
			return nil
		}
	case ed25519.PublicKey:
		return nil
	case *rsa.PublicKey:
		if n := k.N.BitLen(); n >= minRSA && n <= maxRSA {
			return nil
		}
	}
	return fmt.Errorf("its key must be ECDSA on P-256 or more, Ed25519, or RSA of %d to %d bits", minRSA, maxRSA)
}
