package sessionsapi

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net/http"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"rendezvous.dev/rendezvous/wire/door"
)

const (
	// APIService is what config/sessions installs; its caBundle is filled in here.
	APIService = Version + "." + Group
	// ServingSecret has the API's certificate; the operator makes it.
	ServingSecret = "rendezvous-sessions-serving"
	// servingLife and renewBefore are the certificate's. Its own CA is itself, so that a renewal needs nobody else.
	servingLife, renewBefore = 365 * 24 * time.Hour, 60 * 24 * time.Hour
	// settleEvery is between two looks at certificate and APIService.
	settleEvery = 30 * time.Second
	fieldOwner  = "rendezvous-operator-sessions"
)

// Server serves the API until its context ends: controller-runtime's manager runs it, on every replica.
type Server struct {
	Handler http.Handler
	// Addr to listen at.
	Addr string
	// Namespace of the operator, with the Secret of the certificate; Service is what the APIService names there.
	Namespace, Service string
	// Client writes; Reader reads past any cache.
	Client client.Client
	Reader client.Reader
	Log    *slog.Logger

	cert atomic.Pointer[tls.Certificate]
}

// NeedLeaderElection says that replicas that stand by serve too.
func (s *Server) NeedLeaderElection() bool { return false }

// Start implements manager.Runnable.
func (s *Server) Start(ctx context.Context) error {
	server := &http.Server{
		Handler: s.Handler, ConnContext: door.ConnContext, MaxHeaderBytes: 64 << 10, ReadHeaderTimeout: 10 * time.Second, ReadTimeout: 30 * time.Second,
		WriteTimeout: answerTimeout + 15*time.Second, IdleTimeout: 3 * time.Minute, ErrorLog: slog.NewLogLogger(s.Log.Handler(), slog.LevelDebug),
		TLSConfig: &tls.Config{
			MinVersion: tls.VersionTLS12, NextProtos: []string{"h2", "http/1.1"},
			ClientAuth: tls.RequestClientCert, // the Authenticator verifies it, by what the API server says now
			GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
				if c := s.cert.Load(); c != nil {
					return c, nil
				}
				return nil, errors.New("there is no certificate yet")
			},
		},
	}
	l, err := door.Inside(s.Addr, s.Log, nil)
	if err != nil {
		return fmt.Errorf("sessions API: %w", err)
	}
	go s.settle(ctx)
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		<-ctx.Done()
		stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		server.Shutdown(stop)
		server.Close() // watches
	}()
	err = server.ServeTLS(l, "", "")
	if errors.Is(err, http.ErrServerClosed) {
		<-stopped
		return nil
	}
	return fmt.Errorf("sessions API: %w", err)
}

// settle keeps the certificate, and the APIService's trust in it.
func (s *Server) settle(ctx context.Context) {
	said := ""
	for {
		err := s.settleOnce(ctx)
		if now := fmt.Sprint(err); now != said && ctx.Err() == nil {
			if err != nil {
				s.Log.Error("the sessions API can't be served yet", "error", err)
			} else {
				s.Log.Info("the sessions API is served", "address", s.Addr)
			}
			said = now
		}
		pause := settleEvery
		if err != nil {
			pause = 2 * time.Second
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}

func (s *Server) settleOnce(ctx context.Context) error {
	secret, err := s.secret(ctx)
	if err != nil {
		return err
	}
	cert, err := tls.X509KeyPair(secret.Data[corev1.TLSCertKey], secret.Data[corev1.TLSPrivateKeyKey])
	if err != nil {
		return fmt.Errorf("the Secret %s/%s: %w: delete it, and another is made", s.Namespace, ServingSecret, err)
	}
	s.cert.Store(&cert)
	return s.trust(ctx, secret.Data["ca.crt"])
}

// secret gives the certificate's Secret, which it makes or renews where need be. Of two replicas one makes it.
func (s *Server) secret(ctx context.Context) (*corev1.Secret, error) {
	secret := &corev1.Secret{}
	key := client.ObjectKey{Namespace: s.Namespace, Name: ServingSecret}
	err := s.Reader.Get(ctx, key, secret)
	switch {
	case apierrors.IsNotFound(err):
		secret = &corev1.Secret{
			TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Secret"},
			ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace, Name: ServingSecret, Labels: map[string]string{"app.kubernetes.io/name": "rendezvous"}},
			Type:       corev1.SecretTypeTLS,
		}
		if secret.Data, err = selfSigned(s.Service, s.Namespace, nil); err != nil {
			return nil, err
		}
		if err := s.Client.Create(ctx, secret); err == nil {
			return secret, nil
		} else if !apierrors.IsAlreadyExists(err) {
			return nil, fmt.Errorf("make Secret %s: %w", ServingSecret, err)
		}
		secret = &corev1.Secret{}
		err = s.Reader.Get(ctx, key, secret)
	case err == nil && expires(secret.Data[corev1.TLSCertKey]).Before(time.Now().Add(renewBefore)):
		before := secret.DeepCopy()
		if secret.Data, err = selfSigned(s.Service, s.Namespace, before.Data[corev1.TLSCertKey]); err != nil {
			return nil, err
		}
		err = s.Client.Patch(ctx, secret, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{}))
	}
	if err != nil {
		return nil, fmt.Errorf("the Secret %s/%s: %w", s.Namespace, ServingSecret, err)
	}
	return secret, nil
}

func expires(certPEM []byte) time.Time {
	block, _ := pem.Decode(certPEM)
	if block == nil {
		return time.Time{}
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return time.Time{}
	}
	return cert.NotAfter
}

// selfSigned makes a certificate for a Service. The trust is in it and in the one before, which other replicas may still
// show for a moment.
func selfSigned(service, namespace string, before []byte) (map[string][]byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return nil, err
	}
	host := service + "." + namespace + ".svc"
	cert := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: "rendezvous sessions API " + serial.Text(36)}, DNSNames: []string{host},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(servingLife), BasicConstraintsValid: true, IsCA: true,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, cert, cert, key.Public(), key)
	if err != nil {
		return nil, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	certPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return map[string][]byte{
		corev1.TLSCertKey: certPEM, corev1.TLSPrivateKeyKey: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}),
		"ca.crt": append(append([]byte{}, certPEM...), before...),
	}, nil
}

// trust has the API server verify this API by ca. The APIService itself is installed with the operator: whoever leaves it
// out has no such API, and nothing else changes.
func (s *Server) trust(ctx context.Context, ca []byte) error {
	u := &unstructured.Unstructured{}
	u.SetAPIVersion("apiregistration.k8s.io/v1")
	u.SetKind("APIService")
	err := s.Reader.Get(ctx, client.ObjectKey{Name: APIService}, u)
	if apierrors.IsNotFound(err) {
		return fmt.Errorf("there is no APIService %s: apply config/sessions, or start the operator with --sessions-addr= if you don't want it", APIService)
	}
	if err != nil {
		return fmt.Errorf("APIService %s: %w", APIService, err)
	}
	want := base64.StdEncoding.EncodeToString(ca)
	if got, _, _ := unstructured.NestedString(u.Object, "spec", "caBundle"); got == want {
		return nil
	}
	patch := fmt.Appendf(nil, `{"spec":{"caBundle":%q}}`, want)
	if err := s.Client.Patch(ctx, u, client.RawPatch("application/merge-patch+json", patch), client.FieldOwner(fieldOwner)); err != nil {
		return fmt.Errorf("APIService %s: caBundle: %w", APIService, err)
	}
	return nil
}
