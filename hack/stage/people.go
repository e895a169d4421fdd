package stage

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"rendezvous.dev/rendezvous/hack/desktop/rdpkit"
	"rendezvous.dev/rendezvous/hack/netlab"
	"rendezvous.dev/rendezvous/wire/brokerapi"
)

// WorkspaceURL is what users of the samples subscribe to.
const WorkspaceURL = "https://demo-broker.rdv.test"

// people on one stage have cables of their own.
const (
	userCable    = 1
	machineCable = 2
	secondCable  = 4
)

// User is a person at a machine of their own: a network namespace, a Debian 13 with FreeRDP 3 and a screen, and rdv.
type User struct {
	*rdpkit.Client
	net *netlab.Host
}

// NewUser sets the first user's machine up. It trusts the company's CA, as users' machines do.
func (s *Stage) NewUser(ctx context.Context, roots rdpkit.Roots) (*User, error) {
	return s.newUser(ctx, roots, "user", userCable)
}

// NewSecondUser sets a machine up for somebody beside the first user.
func (s *Stage) NewSecondUser(ctx context.Context, roots rdpkit.Roots) (*User, error) {
	return s.newUser(ctx, roots, "second", secondCable)
}

func (s *Stage) newUser(ctx context.Context, roots rdpkit.Roots, label string, cable int) (*User, error) {
	if err := s.buildTools(ctx); err != nil {
		return nil, err
	}
	net, err := netlab.New(ctx, label, cable)
	if err != nil {
		return nil, err
	}
	box, err := rdpkit.NewClient(ctx, roots, rdpkit.ClientOptions{BoxOptions: rdpkit.BoxOptions{
		Netns: net.Name, Hostname: "users-machine", DNS: []string{DNS}, CAs: [][]byte{s.CompanyCA},
		Binds: []rdpkit.Bind{
			{Host: filepath.Join(s.toolDir(), "rdv"), Box: "/usr/local/bin/rdv", ReadOnly: true},
			{Host: filepath.Join(s.toolDir(), "signin"), Box: "/usr/local/bin/signin", ReadOnly: true},
		},
	}})
	if err != nil {
		net.Close()
		return nil, err
	}
	return &User{Client: box, net: net}, nil
}

// Close takes the machine away.
func (u *User) Close() {
	u.Client.Close()
	u.net.Close()
}

// Rdv runs rdv on the user's machine and returns what it printed. Its error carries what it said.
func (u *User) Rdv(ctx context.Context, args ...string) (string, error) {
	cmd := u.Command(ctx, append([]string{"rdv"}, args...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return string(out), fmt.Errorf("rdv %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return string(out), nil
}

// signInURL is the line on which rdv login prints where to sign in.
var signInURL = regexp.MustCompile(`(?m)^\s*(https://\S+)\s*$`)

// Login signs the user in: rdv prints a URL, and the browser follows it and fills in the provider's form.
func (u *User) Login(ctx context.Context, user, password string) error {
	login, err := u.Start("rdv", "login", "--no-browser", WorkspaceURL)
	if err != nil {
		return err
	}
	defer login.Stop()
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	var url string
	for url == "" {
		select {
		case <-ctx.Done():
			return fmt.Errorf("rdv login printed no URL to sign in at: %s", login.Output())
		case <-login.Done():
			return fmt.Errorf("rdv login: %s", login.Output())
		case <-time.After(50 * time.Millisecond):
			if m := signInURL.FindStringSubmatch(login.Output()); m != nil {
				url = m[1]
			}
		}
	}
	browser := u.Command(ctx, "signin", url)
	browser.Env = append(browser.Env, "RDV_SIGNIN_USER="+user, "RDV_SIGNIN_PASSWORD="+password)
	if out, err := browser.CombinedOutput(); err != nil {
		return fmt.Errorf("signing in as %s: %w: %s", user, err, out)
	}
	if code, err := login.ExitCode(ctx); err != nil || code != 0 {
		return fmt.Errorf("rdv login ended with %d, %v: %s", code, err, login.Output())
	}
	return nil
}

// Desktop is one connect: rdv with the RDP client that it started.
type Desktop struct {
	*rdpkit.Program
	ActivityID string
}

var activityLine = regexp.MustCompile(`(?i)activity[ :]+([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})`)

// Connect starts `rdv connect` with FreeRDP, with certificate checks on. Who is logged in follows from who signed in.
func (u *User) Connect(ctx context.Context, resource, mode string, freerdp ...string) (*Desktop, error) {
	return u.ConnectWith(ctx, []string{resource, "--mode", mode}, freerdp...)
}

// ConnectWith is Connect with arguments of one's own for `rdv connect`.
func (u *User) ConnectWith(ctx context.Context, rdv []string, freerdp ...string) (*Desktop, error) {
	args := slices.Concat([]string{"rdv", "connect"}, rdv, []string{"--rdp-client", "/usr/bin/xfreerdp3", "--"})
	args = append(args, rdpkit.FreeRDP(freerdp...)[1:]...)
	p, err := u.Start(args...)
	if err != nil {
		return nil, err
	}
	d := &Desktop{Program: p}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for {
		if m := activityLine.FindStringSubmatch(p.Output()); m != nil {
			d.ActivityID = strings.ToLower(m[1])
			return d, nil
		}
		select {
		case <-ctx.Done():
		case <-p.Done():
		case <-time.After(50 * time.Millisecond):
			continue
		}
		p.Stop()
		return nil, fmt.Errorf("rdv connect %s named no activity: %s", strings.Join(rdv, " "), p.Output())
	}
}

// WaitForChange waits until the screen shows something new, other than before, and has come to rest.
func (u *User) WaitForChange(ctx context.Context, before rdpkit.Picture) (rdpkit.Picture, error) {
	last := before
	for {
		select {
		case <-ctx.Done():
			return last, fmt.Errorf("the screen did not change: %w", context.Cause(ctx))
		case <-time.After(time.Second):
		}
		now, err := u.Screenshot(ctx)
		if err != nil {
			return last, err
		}
		if _, share := now.Dominant(); share < 0.97 && bytes.Equal(now.PNG, last.PNG) && !bytes.Equal(now.PNG, before.PNG) {
			return now, nil
		}
		last = now
	}
}

// Gateways lists what the feed offers to choose from.
func (u *User) Gateways(ctx context.Context) ([]brokerapi.Gateway, error) {
	out, err := u.Rdv(ctx, "list", "-o", "json")
	if err != nil {
		return nil, err
	}
	var all brokerapi.Resources
	if err := json.Unmarshal([]byte(out), &all); err != nil {
		return nil, fmt.Errorf("rdv list -o json: %w", err)
	}
	return all.Gateways, nil
}

// companyCAFile is where a machine keeps the company's CA.
const companyCAFile = "/etc/rendezvous/company-ca.crt"

// Machine is a session host outside the cluster, on which nothing can be dialled.
type Machine struct {
	*rdpkit.Machine
	Net   *netlab.Host
	Agent *rdpkit.Program
}

// NewMachine sets up an outside machine with a desktop that shows color, behind a firewall that lets nothing in.
func (s *Stage) NewMachine(ctx context.Context, roots rdpkit.Roots, name, color string) (*Machine, error) {
	if err := s.buildTools(ctx); err != nil {
		return nil, err
	}
	net, err := netlab.New(ctx, "machine", machineCable)
	if err != nil {
		return nil, err
	}
	if err := net.NoInbound(ctx); err != nil {
		net.Close()
		return nil, err
	}
	box, err := rdpkit.NewMachine(ctx, roots, rdpkit.MachineOptions{Color: color, BoxOptions: rdpkit.BoxOptions{
		Netns: net.Name, Hostname: name, DNS: []string{DNS},
		Binds: []rdpkit.Bind{
			{Host: filepath.Join(s.toolDir(), "agent"), Box: "/usr/local/bin/rdv-agent", ReadOnly: true},
			{Host: filepath.Join(s.toolDir(), "intruder"), Box: "/usr/local/bin/intruder", ReadOnly: true},
		},
	}})
	if err != nil {
		net.Close()
		return nil, err
	}
	m := &Machine{Machine: box, Net: net}
	if err := m.WriteFile(companyCAFile, s.CompanyCA, 0o644); err != nil {
		m.Close()
		return nil, err
	}
	return m, nil
}

// Enrol starts the agent on the machine with a registration token, as its systemd unit would.
func (m *Machine) Enrol(token, name string) (err error) {
	if err := m.WriteFile("/etc/rendezvous/token", []byte(token), 0o600); err != nil {
		return err
	}
	return m.StartAgent(name)
}

// StartAgent starts the agent of a machine that has its token, or has enrolled.
func (m *Machine) StartAgent(name string) (err error) {
	m.Agent, err = m.Start("rdv-agent", "run", "--broker", WorkspaceURL, "--token-file", "/etc/rendezvous/token", "--host", name, "--ca-file", companyCAFile,
		"--state-dir", "/var/lib/rendezvous-agent", "--rdp-addr", rdpkit.RDPAddr.String(), "--rdp-cert-dir", rdpkit.CertDir,
		"--login-dir", rdpkit.LoginDir, "--login-shared")
	return err
}

// Close takes the machine away.
func (m *Machine) Close() {
	m.Machine.Close()
	m.Net.Close()
}

func (s *Stage) toolDir() string { return filepath.Join(s.Root, "bin", "linux") }

// buildTools compiles what people's machines run besides the images' binaries, static.
func (s *Stage) buildTools(ctx context.Context) error {
	for dir, pkgs := range map[string][]string{s.Root: {"./cmd/rdv", "./cmd/kubectl-rdv"}, filepath.Join(s.Root, "hack"): {"./signin", "./intruder"}} {
		cmd := exec.CommandContext(ctx, "go", append([]string{"build", "-trimpath", "-o", s.toolDir() + "/"}, pkgs...)...)
		cmd.Dir, cmd.Env = dir, append(cmd.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("stage: go build %v: %w: %s", pkgs, err, out)
		}
	}
	return nil
}

// Tool is the path of one of the product's binaries, or of buildTools', that machines of the stage run.
func (s *Stage) Tool(name string) string { return filepath.Join(s.toolDir(), name) }
