package rdpkey

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"strings"
	"testing"
)

// Each kind comes out of its own file, and passes for no other.
func TestKinds(t *testing.T) {
	kinds := []Kind{
		{}, {Algorithm: ECDSA, Size: 384, Encoding: PKCS1}, {Algorithm: ECDSA, Size: 521}, {Algorithm: RSA}, {Algorithm: RSA, Size: 3072, Encoding: PKCS1},
	}
	for _, k := range kinds {
		data, err := k.Generate()
		if err != nil {
			t.Fatalf("%v: %v", k, err)
		}
		signer, got, err := Parse(data)
		if err != nil || got != k.Complete() {
			t.Errorf("%v: its file is of %v, %v", k, got, err)
			continue
		}
		for _, other := range kinds {
			if err := other.Holds(signer.Public()); (err == nil) != (other == k) {
				t.Errorf("a key of %v as one of %v: %v", k.Complete(), other.Complete(), err)
			}
		}
	}
	for want, k := range map[string]Kind{
		"1024": {Algorithm: RSA, Size: 1024}, "224": {Algorithm: ECDSA, Size: 224}, "Ed25519": {Algorithm: "Ed25519", Size: 256}, "PEM": {Encoding: "PEM"},
	} {
		if _, err := k.Generate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v", k, err)
		}
	}
	_, ed, _ := ed25519.GenerateKey(rand.Reader)
	der, _ := x509.MarshalPKCS8PrivateKey(ed)
	for name, text := range map[string][]byte{
		"nothing": nil, "no key": []byte("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"), "Ed25519": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}),
	} {
		if _, _, err := Parse(text); err == nil {
			t.Errorf("%s was read", name)
		}
	}
}
