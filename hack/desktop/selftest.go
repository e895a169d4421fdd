package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"rendezvous.dev/rendezvous/hack/desktop/rdpkit"
)

// The name that a host's certificate carries and that the client verifies; it resolves to the machine's address here.
const poolName = "pool.ns.rdv.internal"

var (
	machineAddr = netip.MustParsePrefix("192.0.2.1/30")
	userAddr    = netip.MustParsePrefix("192.0.2.2/30")
	forwarder   = netip.AddrPortFrom(machineAddr.Addr(), 3389)
)

// selftest connects the client to the machine as a gateway would, by a forwarder beside the desktop, and checks each
// thing that the end-to-end tests rely on.
func selftest(ctx context.Context, log *slog.Logger, pictureFile string) (err error) {
	begin := time.Now()
	step := func(name string) {
		log.Info(name, "after", time.Since(begin).Round(10*time.Millisecond).String())
	}
	roots, err := rdpkit.Ensure(ctx, log)
	if err != nil {
		return err
	}
	step("roots ready")

	var cleanup []func() error
	defer func() {
		for i := len(cleanup) - 1; i >= 0; i-- {
			err = errors.Join(err, cleanup[i]())
		}
	}()
	machineNet, err := rdpkit.NewNetns("machine")
	if err != nil {
		return err
	}
	cleanup = append(cleanup, machineNet.Close)
	userNet, err := rdpkit.NewNetns("user")
	if err != nil {
		return err
	}
	cleanup = append(cleanup, userNet.Close)
	if err := rdpkit.Join(machineNet, machineAddr, userNet, userAddr); err != nil {
		return err
	}
	company, stranger := newCA("Company CA"), newCA("Another CA")

	colour := rdpkit.RandomColor()
	machine, err := rdpkit.NewMachine(ctx, roots, rdpkit.MachineOptions{
		BoxOptions: rdpkit.BoxOptions{Netns: machineNet.Name, Hostname: "desk-1"},
		Color:      rdpkit.Hex(colour),
	})
	if err != nil {
		return err
	}
	cleanup = append(cleanup, machine.Close)
	install := func(ca *authority) (serial *big.Int, err error) {
		cert, key, serial := ca.issue(poolName)
		if err := machine.WriteFile(rdpkit.CertDir+"/tls.crt", cert, 0o644); err != nil {
			return nil, err
		}
		return serial, machine.WriteFile(rdpkit.CertDir+"/tls.key", key, 0o640)
	}
	stopForwarding, err := forward(machineNet)
	if err != nil {
		return err
	}
	cleanup = append(cleanup, stopForwarding)
	client, err := rdpkit.NewClient(ctx, roots, rdpkit.ClientOptions{BoxOptions: rdpkit.BoxOptions{
		Netns: userNet.Name, Hostname: "laptop", CAs: [][]byte{company.pem()},
		Hosts: map[string]string{poolName: machineAddr.Addr().String()},
	}})
	if err != nil {
		return err
	}
	cleanup = append(cleanup, client.Close)
	step("user's machine ready")

	// Without a certificate there is no server at all.
	if listeners, err := machine.Listeners(); err != nil || len(listeners) != 1 || listeners[0] != forwarder {
		return fmt.Errorf("before there is a certificate only %v may listen, not %v (%v)", forwarder, listeners, err)
	}
	first, err := install(company)
	if err != nil {
		return err
	}
	if err := machine.WaitServing(ctx); err != nil {
		return err
	}
	if err := expectSerial(ctx, userNet, company, first); err != nil {
		return err
	}
	step("desktop serves with its first certificate")

	session, err := client.Start(rdpkit.FreeRDP("/v:"+poolName, "/u:demo", "/p:demo", "/tls:secrets-file:/tmp/keys")...)
	if err != nil {
		return err
	}
	picture, err := see(ctx, client, session, func(ctx context.Context) (rdpkit.Picture, error) {
		return client.WaitForColor(ctx, colour, 0.3)
	})
	if err != nil {
		return fmt.Errorf("first connection: %w\n%s", err, machine.Desktop.Output())
	}
	share := picture.Fraction(colour)
	keys, err := client.ReadFile("/tmp/keys")
	if err != nil || !strings.Contains(string(keys), "CLIENT_TRAFFIC_SECRET_0") {
		return fmt.Errorf("FreeRDP's log of TLS secrets shows no TLS 1.3: %v\n%s", err, keys)
	}
	if !strings.Contains(machine.Desktop.Output(), "TLSv1.3 with cipher") {
		return errors.New("xrdp's log shows no TLS 1.3")
	}
	log.Info("desktop seen", "colour", rdpkit.Hex(colour), "fraction", fmt.Sprintf("%.2f", share), "tls", "1.3",
		"after", time.Since(begin).Round(10*time.Millisecond).String())

	canary := strings.ToLower(rand.Text())
	if err := client.Type(ctx, "echo hello > /tmp/"+canary+"\n"); err != nil {
		return err
	}
	if err := within(ctx, 10*time.Second, func() error {
		_, err := machine.ReadFile("/tmp/" + canary)
		return err
	}); err != nil {
		shot, _ := client.Screenshot(ctx)
		return errors.Join(fmt.Errorf("what was typed did not arrive: %w", err), save(shot, pictureFile))
	}
	step("typing arrives")
	if picture, err = client.Screenshot(ctx); err != nil {
		return err
	}
	if err := save(picture, pictureFile); err != nil {
		return err
	}

	listeners, err := machine.Listeners()
	if err != nil {
		return err
	}
	for _, l := range listeners {
		if l != forwarder && !l.Addr().IsLoopback() {
			return fmt.Errorf("%v listens on the machine, reachable from outside", l)
		}
	}
	step("nothing else listens to the outside")

	renewed, err := install(company)
	if err != nil {
		return err
	}
	if err := within(ctx, 10*time.Second, func() error { return expectSerial(ctx, userNet, company, renewed) }); err != nil {
		return fmt.Errorf("after a renewal: %w", err)
	}
	select {
	case <-session.Done():
		return fmt.Errorf("the renewal ended the session\n%s", session.Output())
	default:
	}
	session.Stop()
	if err := within(ctx, 10*time.Second, func() error {
		if shot, err := client.Screenshot(ctx); err != nil || shot.Fraction(colour) > 0 {
			return fmt.Errorf("the desktop is still seen after the client's end (%v)", err)
		}
		return nil
	}); err != nil {
		return err
	}
	step("renewed certificate serves, session unharmed")

	rdpFile := "full address:s:" + poolName + "\r\nusername:s:demo\r\nauthentication level:i:1\r\n"
	if err := client.WriteFile("/root/desktop.rdp", []byte(rdpFile), 0o600); err != nil {
		return err
	}
	session, err = client.Start(rdpkit.FreeRDP("/root/desktop.rdp", "/p:demo")...)
	if err != nil {
		return err
	}
	if _, err := see(ctx, client, session, func(ctx context.Context) (rdpkit.Picture, error) {
		return client.WaitForColor(ctx, colour, 0.3)
	}); err != nil {
		return fmt.Errorf("connection from an .rdp file: %w", err)
	}
	session.Stop()
	step("desktop seen again, from an .rdp file")

	if _, err := install(stranger); err != nil {
		return err
	}
	if err := within(ctx, 10*time.Second, func() error {
		if expectSerial(ctx, userNet, company, renewed) == nil {
			return errors.New("the old certificate still serves")
		}
		return nil
	}); err != nil {
		return err
	}
	session, err = client.Start(rdpkit.FreeRDP("/v:"+poolName, "/u:demo", "/p:demo")...)
	if err != nil {
		return err
	}
	refusal, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	code, err := session.ExitCode(refusal)
	if err != nil || code == 0 || !strings.Contains(session.Output(), "ERRCONNECT_TLS_CONNECT_FAILED") {
		return fmt.Errorf("a certificate of another CA must be refused, but FreeRDP ended with %d, %v\n%s", code, err, session.Output())
	}
	log.Info("certificate of another CA refused", "exit", code, "after", time.Since(begin).Round(10*time.Millisecond).String())
	fmt.Println("ok")
	return nil
}

// see waits for a picture as long as the program that should bring it runs, 30 seconds at most.
func see(ctx context.Context, c *rdpkit.Client, p *rdpkit.Program, wait func(context.Context) (rdpkit.Picture, error)) (rdpkit.Picture, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, 30*time.Second, errors.New("not seen in 30 s"))
	defer cancel()
	ctx, ended := context.WithCancelCause(ctx)
	defer ended(nil)
	go func() {
		select {
		case <-p.Done():
			ended(errors.New("the client ended"))
		case <-ctx.Done():
		}
	}()
	picture, err := wait(ctx)
	if err != nil {
		err = fmt.Errorf("%w\n%s", err, p.Output())
	}
	return picture, err
}

// within tries f until it succeeds, d at most.
func within(ctx context.Context, d time.Duration, f func() error) error {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	for {
		err := f()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func save(p rdpkit.Picture, file string) error {
	if file == "" || p.Image == nil {
		return nil
	}
	return p.Save(file)
}

// expectSerial connects from the user's side and checks which certificate answers, in TLS 1.3.
func expectSerial(ctx context.Context, from *rdpkit.Netns, ca *authority, serial *big.Int) error {
	var conn net.Conn
	if err := from.Do(func() (err error) {
		conn, err = net.DialTimeout("tcp", forwarder.String(), 5*time.Second)
		return err
	}); err != nil {
		return err
	}
	defer conn.Close()
	roots := x509.NewCertPool()
	roots.AddCert(ca.cert)
	state, err := rdpkit.Probe(ctx, conn, &tls.Config{RootCAs: roots, ServerName: poolName, MinVersion: tls.VersionTLS13})
	if err != nil {
		return err
	}
	if got := state.PeerCertificates[0].SerialNumber; got.Cmp(serial) != 0 {
		return fmt.Errorf("the server's certificate has serial %x, not %x", got, serial)
	}
	return nil
}

// forward stands for agent and gateway: it takes connections at the machine's address and brings them to the desktop.
func forward(machine *rdpkit.Netns) (stop func() error, err error) {
	var l net.Listener
	if err := machine.Do(func() (err error) {
		l, err = net.Listen("tcp", forwarder.String())
		return err
	}); err != nil {
		return nil, err
	}
	go func() {
		for {
			outside, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer outside.Close()
				var inside net.Conn
				if err := machine.Do(func() (err error) {
					inside, err = net.Dial("tcp", rdpkit.RDPAddr.String())
					return err
				}); err != nil {
					return
				}
				defer inside.Close()
				var wg sync.WaitGroup
				for _, pair := range [][2]net.Conn{{inside, outside}, {outside, inside}} {
					wg.Go(func() {
						io.Copy(pair[0], pair[1])
						pair[0].(*net.TCPConn).CloseWrite()
					})
				}
				wg.Wait()
			}()
		}
	}()
	return l.Close, nil
}

// authority is a certificate authority of this run.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newCA(name string) *authority {
	template := certificate(name)
	template.IsCA, template.BasicConstraintsValid = true, true
	template.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	der := must(x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key))
	return &authority{cert: must(x509.ParseCertificate(der)), key: key}
}

func (a *authority) pem() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw})
}

func (a *authority) issue(name string) (cert, key []byte, serial *big.Int) {
	template := certificate(name)
	template.DNSNames = []string{name}
	template.KeyUsage = x509.KeyUsageDigitalSignature
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	k := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	der := must(x509.CreateCertificate(rand.Reader, template, a.cert, &k.PublicKey, a.key))
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: must(x509.MarshalPKCS8PrivateKey(k))}), template.SerialNumber
}

func certificate(name string) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: must(rand.Int(rand.Reader, big.NewInt(1<<62))),
		Subject:      pkix.Name{CommonName: name},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(24 * time.Hour),
	}
}

// must is for key and certificate making from constants, which fails only by a mistake in this file.
func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
