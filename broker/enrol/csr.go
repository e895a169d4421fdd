package enrol

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"strings"

	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/identity"
)

const (
	maxCSR         = 16 << 10
	minRSA, maxRSA = 2048, 4096
)

var oidSubjectAltName = asn1.ObjectIdentifier{2, 5, 29, 17}

// checkClientCSR takes a request for exactly one identity, and nothing else.
func checkClientCSR(text string, id identity.ID) ([]byte, error) {
	csr, names, err := parseCSR(text, id.Host)
	if err != nil {
		return nil, err
	}
	if len(csr.URIs) != 1 || names != 1 || csr.URIs[0].String() != id.String() {
		return nil, fmt.Errorf("its only name must be the URI %s", id)
	}
	return []byte(text), nil
}

// checkRDPCSR takes a request for exactly the host's RDP names.
func checkRDPCSR(text string, id identity.ID) ([]byte, error) {
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
	for _, e := range csr.Extensions {
		if !e.Id.Equal(oidSubjectAltName) {
			return nil, 0, fmt.Errorf("it asks for the extension %v", e.Id)
		}
		var all []asn1.RawValue
		if rest, err := asn1.Unmarshal(e.Value, &all); err != nil || len(rest) > 0 {
			return nil, 0, errors.New("its alternative names can't be read")
		}
		names += len(all)
	}
	return csr, names, nil
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
