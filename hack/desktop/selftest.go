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
	"image/color"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
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

// person is somebody who logs in by connection: whoever comes to port is forwarded from an address that is this person's.
type person struct {
	name string
	uid  int
	port uint16
	from string
}

var (
	alice = person{"alice", 20001, 3389, "127.5.6.1"}
	bob   = person{"bob", 20002, 3390, "127.5.6.2"}
)

// logIn is the command line of a person's client, which sends the name and some password, as which none is asked for.
func (p person) logIn(args ...string) []string {
	return rdpkit.FreeRDP(append([]string{fmt.Sprintf("/v:%s:%d", poolName, p.port), "/u:" + p.name, "/p:any"}, args...)...)
}

// loginFolder stands for the agent's: accounts, and a helper that knows whose address is whose.
func loginFolder(people ...person) (dir string, err error) {
	if dir, err = os.MkdirTemp("", "rdv-login-"); err != nil {
		return "", err
	}
	var helper, passwd, group strings.Builder
	helper.WriteString("#!/bin/sh\ncase \"$* $PAM_TYPE $PAM_SERVICE $PAM_RHOST $PAM_USER\" in\n")
	for _, p := range people {
		fmt.Fprintf(&helper, "'pam auth xrdp-sesman %s %s') exit 0 ;;\n", p.from, p.name)
		fmt.Fprintf(&passwd, "%s:*:%d:%d::/home/%s:/bin/bash\n", p.name, p.uid, p.uid, p.name)
		fmt.Fprintf(&group, "%s:*:%d:\n", p.name, p.uid)
	}
	helper.WriteString("esac\nexit 1\n")
	return dir, errors.Join(
		os.Chmod(dir, 0o755),
		os.WriteFile(filepath.Join(dir, "login"), []byte(helper.String()), 0o755),
		os.Mkdir(filepath.Join(dir, "accounts"), 0o755),
		os.WriteFile(filepath.Join(dir, "accounts", "passwd"), []byte(passwd.String()), 0o644),
		os.WriteFile(filepath.Join(dir, "accounts", "group"), []byte(group.String()), 0o644),
	)
}

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

	logins, err := loginFolder(alice, bob)
	if err != nil {
		return err
	}
	cleanup = append(cleanup, func() error { return os.RemoveAll(logins) })
	colour := rdpkit.RandomColor()
	machine, err := rdpkit.NewMachine(ctx, roots, rdpkit.MachineOptions{
		BoxOptions: rdpkit.BoxOptions{Netns: machineNet.Name, Hostname: "desk-1"},
		Color:      rdpkit.Hex(colour),
		LoginDir:   logins,
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
	for _, p := range []person{alice, bob} {
		stopForwarding, err := forward(machineNet, p)
		if err != nil {
			return err
		}
		cleanup = append(cleanup, stopForwarding)
	}
	var clients []*rdpkit.Client
	for _, name := range []string{"laptop", "tablet"} {
		c, err := rdpkit.NewClient(ctx, roots, rdpkit.ClientOptions{BoxOptions: rdpkit.BoxOptions{
			Netns: userNet.Name, Hostname: name, CAs: [][]byte{company.pem()},
			Hosts: map[string]string{poolName: machineAddr.Addr().String()},
		}})
		if err != nil {
			return err
		}
		cleanup = append(cleanup, c.Close)
		clients = append(clients, c)
	}
	client, other := clients[0], clients[1]
	step("users' machines ready")

	// Without a certificate there is no server at all.
	if listeners, err := machine.Listeners(); err != nil || slices.Contains(listeners, rdpkit.RDPAddr) {
		return fmt.Errorf("before there is a certificate nothing may serve, but %v listen (%v)", listeners, err)
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

	session, err := client.Start(alice.logIn("/tls:secrets-file:/tmp/keys")...)
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
		if l != rdpkit.RDPAddr && l.Addr() != machineAddr.Addr() {
			return fmt.Errorf("%v listens on the machine, beside xrdp and this test", l)
		}
	}
	step("nothing else listens, not even on the loopback")
	if err := sideBySide(ctx, machine, other, colour); err != nil {
		return err
	}
	step("another user beside the first, each in a session of their own, and only there")

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

	rdpFile := "full address:s:" + poolName + "\r\nusername:s:alice\r\nauthentication level:i:1\r\n"
	if err := client.WriteFile("/root/desktop.rdp", []byte(rdpFile), 0o600); err != nil {
		return err
	}
	session, err = client.Start(rdpkit.FreeRDP("/root/desktop.rdp", "/p:any")...)
	if err != nil {
		return err
	}
	if _, err := see(ctx, client, session, func(ctx context.Context) (rdpkit.Picture, error) {
		return client.WaitForColor(ctx, colour, 0.3)
	}); err != nil {
		return fmt.Errorf("connection from an .rdp file: %w", err)
	}
	if err := expectSessions(ctx, machine, rdpkit.Session{User: "alice", UID: alice.uid, Resumed: 1}); err != nil {
		return err
	}
	step("the same session seen again, from an .rdp file")
	if err := client.Type(ctx, rdpkit.LogOut); err != nil {
		return err
	}
	if _, err := session.ExitCode(ctx); err != nil {
		return err
	}
	if err := expectSessions(ctx, machine); err != nil {
		return err
	}
	step("logged out")

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
	session, err = client.Start(alice.logIn()...)
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

// sideBySide lets bob in while alice works: to a desktop of his own, from which he neither sees nor reaches hers, and as
// nobody else.
func sideBySide(ctx context.Context, machine *rdpkit.Machine, client *rdpkit.Client, colour color.RGBA) error {
	theirs := rdpkit.Session{User: alice.name, UID: alice.uid}
	if err := expectSessions(ctx, machine, theirs); err != nil {
		return err
	}
	// By his connection he is not alice.
	posing := bob
	posing.name = alice.name
	session, err := client.Start(posing.logIn()...)
	if err != nil {
		return err
	}
	if err := within(ctx, 10*time.Second, func() error {
		if !strings.Contains(machine.Desktop.Output(), "AUTHFAIL: user="+alice.name+" ip="+bob.from) {
			return errors.New("bob posed as alice, and sesman refused nobody")
		}
		return nil
	}); err != nil {
		return fmt.Errorf("%w\n%s", err, machine.Desktop.Output())
	}
	session.Stop()

	if session, err = client.Start(bob.logIn()...); err != nil {
		return err
	}
	defer session.Stop()
	if _, err := see(ctx, client, session, func(ctx context.Context) (rdpkit.Picture, error) {
		return client.WaitForColor(ctx, colour, 0.3)
	}); err != nil {
		return fmt.Errorf("bob's connection: %w\n%s", err, machine.Desktop.Output())
	}
	if err := client.Type(ctx, "id -un > whoami; ls /home/alice > looked 2>&1; DISPLAY=:10 xsetroot -solid red > painted 2>&1\n"); err != nil {
		return err
	}
	for file, want := range map[string]string{"whoami": "bob\n", "looked": "Permission denied", "painted": "Authorization required"} {
		if err := within(ctx, 10*time.Second, func() error {
			got, err := machine.ReadFile("/home/bob/" + file)
			if err == nil && !strings.Contains(string(got), want) {
				err = fmt.Errorf("bob's file %s says %q, not %q", file, got, want)
			}
			return err
		}); err != nil {
			return err
		}
	}
	if err := expectSessions(ctx, machine, theirs, rdpkit.Session{User: bob.name, UID: bob.uid}); err != nil {
		return err
	}
	if err := client.Type(ctx, rdpkit.LogOut); err != nil {
		return err
	}
	if _, err := session.ExitCode(ctx); err != nil {
		return err
	}
	return expectSessions(ctx, machine, theirs)
}

// expectSessions compares users and how often their sessions were resumed.
func expectSessions(ctx context.Context, machine *rdpkit.Machine, want ...rdpkit.Session) error {
	return within(ctx, 10*time.Second, func() error {
		got, err := machine.Sessions(ctx)
		if err != nil {
			return err
		}
		same := slices.EqualFunc(got, want, func(a, b rdpkit.Session) bool {
			return a.User == b.User && a.UID == b.UID && a.Resumed == b.Resumed && time.Since(a.Started) < time.Hour
		})
		if !same {
			return fmt.Errorf("the machine's sessions are %+v, not %+v", got, want)
		}
		return nil
	})
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

// forward stands for agent and gateway: it takes a person's connections at the machine's address and brings them to the
// desktop, from the person's address.
func forward(machine *rdpkit.Netns, p person) (stop func() error, err error) {
	var l net.Listener
	if err := machine.Do(func() (err error) {
		l, err = net.Listen("tcp", netip.AddrPortFrom(machineAddr.Addr(), p.port).String())
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
					dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(p.from)}}
					inside, err = dialer.Dial("tcp", rdpkit.RDPAddr.String())
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
