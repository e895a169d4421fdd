package relay

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"rendezvous.dev/rendezvous/wire/admission"
	"rendezvous.dev/rendezvous/wire/wiretest"
)

// TestBehindHAProxy is what people run: HAProxy in TCP mode before a gateway, in each way in which it tells clients'
// addresses, with its own health check. It needs HAProxy, which make unit installs.
func TestBehindHAProxy(t *testing.T) {
	program, err := exec.LookPath("haproxy")
	if err != nil {
		if os.Getenv("RDV_REQUIRE_HAPROXY") != "" {
			t.Fatal("haproxy is not installed: make unit installs it")
		}
		t.Skip("haproxy is not installed")
	}
	for name, options := range map[string]string{
		"version 1":               "send-proxy check-send-proxy",
		"version 2":               "send-proxy-v2 check-send-proxy",
		"version 2 with TLVs":     "send-proxy-v2-ssl-cn proxy-v2-options crc32c,unique-id,authority check-send-proxy",
		"its check has no header": "send-proxy-v2",
	} {
		t.Run(name, func(t *testing.T) {
			seen := make(chan string, 16)
			s := newStack(t, func(o *Options, f *fakeAdmission) {
				o.Config.ProxyNetworks = []string{"127.0.0.1/32"}
				connect := f.connect
				f.connect = func(ctx context.Context, r *admission.ConnectRequest) *admission.ConnectResponse {
					seen <- r.ClientAddr
					return connect(ctx, r)
				}
			})
			dir := t.TempDir()
			l, err := net.Listen("tcp", "127.0.0.1:0") // a free port for it
			if err != nil {
				t.Fatal(err)
			}
			front := l.Addr().String()
			l.Close()
			stats := filepath.Join(dir, "stats") // no comma may be in it
			config := fmt.Sprintf(`
global
  stats socket %s
defaults
  mode tcp
  timeout connect 5s
  timeout client 1m
  timeout server 1m
frontend gateway
  bind %s
  default_backend relays
backend relays
  option httpchk GET /healthz
  server pod %s source 127.0.0.1 check inter 200ms check-ssl verify none %s
`, stats, front, s.addr, options)
			file := filepath.Join(dir, "haproxy.cfg")
			if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command(program, "-db", "-f", file)
			cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
			var out wiretest.Log
			cmd.Stdout, cmd.Stderr = &out, &out
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				cmd.Process.Kill()
				cmd.Wait()
				if t.Failed() {
					t.Log(out.String())
				}
			})
			eventually(t, "its health check finds the pod well", func() bool {
				c, err := net.Dial("unix", stats)
				if err != nil {
					return false
				}
				defer c.Close()
				fmt.Fprintln(c, "show stat")
				for lines := bufio.NewScanner(c); lines.Scan(); {
					if f := strings.Split(lines.Text(), ","); f[0] == "relays" && f[1] == "pod" {
						return f[17] == "UP" && f[36] == "L7OK" && f[37] == "200"
					}
				}
				return false
			})
			pod := s.addr
			s.addr, s.from = front, netip.MustParseAddr("127.0.0.2")
			for _, mode := range modes {
				c, a := s.session(mode)
				c.Write([]byte("x"))
				expect(t, a, "x")
				if addr := <-seen; !strings.HasPrefix(addr, "127.0.0.2:") {
					t.Errorf("%s: the client is %s", mode, addr)
				}
				c.Close()
				a.Close()
			}
			s.addr = pod
			if strings.Contains(s.log.String(), `"level":"WARN"`) {
				t.Errorf("something was warned of: %s", s.log.String())
			}
		})
	}
}
