package rdpkit

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
)

// CertDir is where, in a machine as in a pod, the desktop waits for tls.crt and tls.key.
const CertDir = "/run/rdp-cert"

// LoginDir is where, in a machine as in a pod, the desktop looks for what decides who logs in: the program login, which PAM
// runs, and the folder accounts with passwd and group, from which the accounts come that the machine does not have itself.
const LoginDir = "/run/rendezvous-login"

// RDPAddr is where the desktop serves RDP, reachable from its own machine or pod only.
var RDPAddr = netip.MustParseAddrPort("127.0.0.1:3389")

// MachineOptions describe a session host outside any cluster.
type MachineOptions struct {
	BoxOptions
	// TestLogin is "user:password", or several with blanks between: accounts that log in with a password. For tests that
	// have no agent; empty: only the helper in the login folder decides. One user has one session on a machine: a second
	// connection takes it over from the first.
	TestLogin string
	// LoginDir is a folder of the host that appears, read-only, as the machine's LoginDir, as a pod's agent shares it with
	// the desktop: login, agent.sock, accounts. Empty: an agent in the machine makes that folder.
	LoginDir string
	// Color of the session's background, #rrggbb.
	Color string
}

// Machine is a session host: a [Box] over Roots.Desktop that runs desktop-entrypoint. It serves once a certificate is
// in CertDir; an agent puts it there, started with Start as a program that was bound into the box.
type Machine struct {
	*Box
	// Desktop is the entrypoint; its output is the log of xrdp and sesman too.
	Desktop *Program
}

// NewMachine starts a session host. It does not wait for a certificate; see WaitServing.
func NewMachine(ctx context.Context, roots Roots, opts MachineOptions) (*Machine, error) {
	if opts.LoginDir != "" {
		opts.Binds = append(slices.Clip(opts.Binds), Bind{Host: opts.LoginDir, Box: LoginDir, ReadOnly: true})
	}
	box, err := NewBox(ctx, roots.Desktop, opts.BoxOptions)
	if err != nil {
		return nil, err
	}
	m := &Machine{Box: box}
	if err = os.MkdirAll(m.Path(CertDir), 0o755); err == nil {
		// Not in the box's environment: other programs need no passwords.
		m.Desktop, err = box.Start("env", "RDV_DESKTOP_TEST_LOGIN="+opts.TestLogin, "RDV_DESKTOP_COLOR="+opts.Color, "desktop-entrypoint")
	}
	if err != nil {
		m.Close()
		return nil, err
	}
	return m, nil
}

// WaitServing returns when xrdp listens.
func (m *Machine) WaitServing(ctx context.Context) error {
	err := poll(ctx, 50*time.Millisecond, func() (bool, error) {
		select {
		case <-m.Desktop.Done():
			return true, nil
		default:
		}
		listeners, err := m.Listeners()
		return slices.Contains(listeners, RDPAddr), err
	})
	select {
	case <-m.Desktop.Done():
		err = errors.New("the entrypoint ended")
	default:
	}
	if err != nil {
		return fmt.Errorf("the desktop doesn't serve: %w\n%s", err, lastLines([]byte(m.Desktop.Output()), 15))
	}
	return nil
}

// Listeners are the addresses of all TCP sockets that listen in the box's network namespace.
func (b *Box) Listeners() ([]netip.AddrPort, error) {
	var all []netip.AddrPort
	for _, table := range []string{"tcp", "tcp6"} {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", b.pid, table))
		if errors.Is(err, os.ErrNotExist) {
			continue // no IPv6
		}
		if err != nil {
			return nil, err
		}
		found, err := parseListeners(string(text))
		if err != nil {
			return nil, fmt.Errorf("/proc/net/%s: %w", table, err)
		}
		all = append(all, found...)
	}
	return all, nil
}

// parseListeners reads the kernel's table of sockets: "sl local_address rem_address st …", addresses as 32-bit words in
// the byte order of the machine (little-endian wherever this runs), ports in hexadecimal; state 0A listens.
func parseListeners(table string) ([]netip.AddrPort, error) {
	var found []netip.AddrPort
	for _, line := range strings.Split(table, "\n") {
		field := strings.Fields(line)
		if len(field) < 4 || field[3] != "0A" {
			continue
		}
		address, port, _ := strings.Cut(field[1], ":")
		raw, err := hex.DecodeString(address)
		if err != nil {
			return nil, err
		}
		for word := range slices.Chunk(raw, 4) {
			slices.Reverse(word)
		}
		ip, ok := netip.AddrFromSlice(raw)
		n, err := strconv.ParseUint(port, 16, 16)
		if !ok || err != nil {
			return nil, fmt.Errorf("not an address: %q", field[1])
		}
		found = append(found, netip.AddrPortFrom(ip, uint16(n)))
	}
	return found, nil
}
