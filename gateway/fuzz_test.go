package gateway

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"testing"
	"time"

	"rendezvous.dev/rendezvous/wire/identity"
)

// Whatever a workspace's ticket file holds, the keys that are taken are all of its own signer's certificates, or none is.
func FuzzTicketKeys(f *testing.F) {
	signer := identity.TicketSigner("ns", "ws")
	certificate := func(ids ...identity.ID) []byte {
		public, key, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			f.Fatal(err)
		}
		template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Unix(2_000_000_000, 0)}
		for _, id := range ids {
			template.URIs = append(template.URIs, id.URI())
		}
		der, err := x509.CreateCertificate(rand.Reader, template, template, public, key)
		if err != nil {
			f.Fatal(err)
		}
		return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	}
	good := certificate(signer)
	f.Add(good)
	f.Add(append(append([]byte("# two\n"), good...), certificate(signer)...))
	f.Add(append(append([]byte{}, good...), certificate(identity.TicketSigner("ns", "other"))...))
	f.Add(certificate(signer, identity.Broker("ns", "ws")))
	f.Add([]byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		keys, err := ticketKeys(data, signer)
		if (err == nil) != (len(keys) > 0) {
			t.Fatalf("%d keys and %v", len(keys), err)
		}
		blocks := 0
		for block, rest := pem.Decode(data); block != nil && err == nil; block, rest = pem.Decode(rest) {
			cert, parsed := x509.ParseCertificate(block.Bytes)
			if parsed != nil {
				t.Fatalf("taken with a certificate that can't be read: %v", parsed)
			}
			if id, err := identity.FromCertificate(cert); err != nil || id != signer {
				t.Fatalf("the certificate of %v counts: %v", id, err)
			}
			if key, ok := cert.PublicKey.(ed25519.PublicKey); !ok || !key.Equal(keys[blocks]) {
				t.Fatal("another key than the certificate's")
			}
			blocks++
		}
		if err == nil && blocks != len(keys) {
			t.Fatalf("%d keys of %d certificates", len(keys), blocks)
		}
	})
}
