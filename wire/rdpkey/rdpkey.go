// Package rdpkey says which kind of private key a session host's RDP server has: a pool chooses it, the agent makes the key,
// and the broker holds the certificate request against it. Names and meanings are cert-manager's (spec.privateKey of a
// Certificate).
package rdpkey

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
)

// Algorithms and encodings.
const (
	RSA   = "RSA"
	ECDSA = "ECDSA"
	PKCS1 = "PKCS1"
	PKCS8 = "PKCS8"
)

// Kind is a kind of key. The zero value says nothing; Complete fills the rest in.
type Kind struct {
	// Algorithm is RSA or ECDSA.
	Algorithm string `json:"algorithm,omitempty"`
	// Size in bits: 2048, 3072 or 4096 for RSA; 256, 384 or 521 for ECDSA.
	Size int `json:"size,omitempty"`
	// Encoding of the file: PKCS1 (for ECDSA: SEC 1, as cert-manager has it) or PKCS8.
	Encoding string `json:"encoding,omitempty"`
}

// Complete fills in what is left out: ECDSA, 256 bits or for RSA 2048, PKCS8.
func (k Kind) Complete() Kind {
	if k.Algorithm == "" {
		k.Algorithm = ECDSA
	}
	if k.Size == 0 {
		k.Size = map[string]int{RSA: 2048, ECDSA: 256}[k.Algorithm]
	}
	if k.Encoding == "" {
		k.Encoding = PKCS8
	}
	return k
}

func (k Kind) String() string { return fmt.Sprintf("%s of %d bits", k.Algorithm, k.Size) }

// Generate makes a key (PEM) of the completed kind.
func (k Kind) Generate() ([]byte, error) {
	k = k.Complete()
	var key crypto.Signer
	var err error
	switch k.Algorithm {
	case RSA:
		if k.Size != 2048 && k.Size != 3072 && k.Size != 4096 {
			return nil, fmt.Errorf("RSA keys have 2048, 3072 or 4096 bits, not %d", k.Size)
		}
		key, err = rsa.GenerateKey(rand.Reader, k.Size)
	case ECDSA:
		curve := map[int]elliptic.Curve{256: elliptic.P256(), 384: elliptic.P384(), 521: elliptic.P521()}[k.Size]
		if curve == nil {
			return nil, fmt.Errorf("ECDSA keys have 256, 384 or 521 bits, not %d", k.Size)
		}
		key, err = ecdsa.GenerateKey(curve, rand.Reader)
	default:
		return nil, fmt.Errorf("keys of algorithm %q are not known here: is the agent older than the broker?", k.Algorithm)
	}
	if err != nil {
		return nil, err
	}
	block := &pem.Block{Type: "PRIVATE KEY"}
	switch k.Encoding {
	case PKCS8:
		block.Bytes, err = x509.MarshalPKCS8PrivateKey(key)
	case PKCS1:
		if r, ok := key.(*rsa.PrivateKey); ok {
			block.Type, block.Bytes = "RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(r)
			break
		}
		block.Type = "EC PRIVATE KEY"
		block.Bytes, err = x509.MarshalECPrivateKey(key.(*ecdsa.PrivateKey))
	default:
		return nil, fmt.Errorf("the encoding of a key is PKCS1 or PKCS8, not %q", k.Encoding)
	}
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(block), nil
}

// Parse reads a key (PEM) and says of which kind it is.
func Parse(data []byte) (crypto.Signer, Kind, error) {
	block, _ := pem.Decode(data)
	if block == nil {
		return nil, Kind{}, errors.New("no PEM block")
	}
	var key any
	var err error
	kind := Kind{Encoding: PKCS1}
	switch block.Type {
	case "RSA PRIVATE KEY":
		key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
	case "EC PRIVATE KEY":
		key, err = x509.ParseECPrivateKey(block.Bytes)
	default:
		kind.Encoding = PKCS8
		key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
	}
	if err != nil {
		return nil, Kind{}, err
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, Kind{}, fmt.Errorf("a %T signs nothing", key)
	}
	public := of(signer.Public())
	if public.Algorithm == "" {
		return nil, Kind{}, fmt.Errorf("it is a %T, neither an ECDSA nor an RSA key", key)
	}
	kind.Algorithm, kind.Size = public.Algorithm, public.Size
	return signer, kind, nil
}

// Holds says why a public key is not of the kind. The encoding is the holder's alone.
func (k Kind) Holds(public crypto.PublicKey) error {
	k = k.Complete()
	if got := of(public); got.Algorithm != k.Algorithm || got.Size != k.Size {
		return fmt.Errorf("its key must be %s", k)
	}
	return nil
}

func of(public crypto.PublicKey) Kind {
	switch p := public.(type) {
	case *rsa.PublicKey:
		return Kind{Algorithm: RSA, Size: p.N.BitLen()}
	case *ecdsa.PublicKey:
		return Kind{Algorithm: ECDSA, Size: p.Curve.Params().BitSize}
	}
	return Kind{}
}
