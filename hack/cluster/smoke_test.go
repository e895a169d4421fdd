package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"rendezvous.dev/rendezvous/hack/cluster/imagetar"
)

// These tests need a machine of their own and root, so they run only when asked:
//
//	RDV_CLUSTER_SMOKE=use go test -run TestSmoke -v .        on a cluster that is up, which stays up
//	RDV_CLUSTER_SMOKE=destroy go test -run TestRecovery -v . kills and removes clusters, and leaves one up
func smoke(t *testing.T, mode string) *cluster {
	t.Helper()
	if os.Getenv("RDV_CLUSTER_SMOKE") != mode {
		t.Skipf("needs RDV_CLUSTER_SMOKE=%s", mode)
	}
	return &cluster{layout: stateLayout()}
}

const smokeNamespace = "rdv-smoke"

func TestSmoke(t *testing.T) {
	c := smoke(t, "use")
	probe := buildProbe(t)
	loadProbe(t, c, probe)
	c.must(t, "", "create", "namespace", smokeNamespace)
	t.Cleanup(func() {
		_, _ = c.kubectl(context.Background(), "", "delete", "namespace", smokeNamespace, "--timeout=60s")
	})
	c.must(t, smokePod, "apply", "-f", "-")
	c.must(t, "", "-n", smokeNamespace, "wait", "--for=condition=Ready", "--timeout=60s", "pod/probe")
	service := strings.TrimSpace(c.must(t, "", "-n", smokeNamespace, "get", "service", "hello", "-o", "jsonpath={.spec.clusterIP}"))

	// kube-proxy learns of a ready pod a moment after the API server does.
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := eventually(ctx, 200*time.Millisecond, func(ctx context.Context) error {
		_, err := command(ctx, probe, "get", "http://"+service+":8080")
		return err
	}); err != nil {
		t.Fatal(err)
	}

	t.Run("exec and DNS in a pod", func(t *testing.T) {
		got := c.must(t, "", "-n", smokeNamespace, "exec", "probe", "-c", "serve", "--", "/probe", "lookup", "hello")
		if !strings.Contains(got, service) {
			t.Errorf("the pod resolves its Service to %q, want %s", got, service)
		}
		if got := c.must(t, "", "-n", smokeNamespace, "exec", "probe", "-c", "serve", "--", "/probe", "get", "http://hello:8080"); got != "hello" {
			t.Errorf("the pod reaches itself through its Service: %q", got)
		}
	})
	t.Run("logs", func(t *testing.T) {
		if got := c.must(t, "", "-n", smokeNamespace, "logs", "probe", "-c", "serve"); got != "serving\n" {
			t.Errorf("logs = %q", got)
		}
	})
	t.Run("port-forward", func(t *testing.T) { portForward(t, c) })
	t.Run("Service from the host", func(t *testing.T) {
		if got := output(t, probe, "get", "http://"+service+":8080"); got != "hello" {
			t.Errorf("answer = %q", got)
		}
	})
	t.Run("from another network namespace", func(t *testing.T) { fromNamespace(t, probe, service) })
	t.Run("platform DNS", func(t *testing.T) {
		want := strings.TrimSpace(c.must(t, "", "-n", "dex", "get", "service", "dex", "-o", "jsonpath={.spec.clusterIP}"))
		if got := output(t, probe, "lookup", "dex.rdv.test.", dnsIP); !strings.Contains(got, want) {
			t.Errorf("dex.rdv.test = %q, want %s", got, want)
		}
	})
	t.Run("certificates", func(t *testing.T) { certificates(t, c) })
	t.Run("certificate requests", func(t *testing.T) { certificateRequest(t, c) })
	t.Run("tokens with groups", func(t *testing.T) { tokens(t, c) })
	t.Run("slow termination of a sidecar", func(t *testing.T) {
		c.must(t, "", "-n", smokeNamespace, "delete", "pod", "probe", "--wait=false")
		// The log ends with the container, so this waits for as long as it drains.
		if got := c.must(t, "", "-n", smokeNamespace, "logs", "--follow", "probe", "-c", "linger"); !strings.Contains(got, "drained") {
			t.Errorf("the sidecar's log is %q: it was not let drain", got)
		}
	})
}

// TestRecovery kills what can be killed, at many points of a boot, and wants each
// next "up" to end in health.
func TestRecovery(t *testing.T) {
	c := smoke(t, "destroy")
	program := filepath.Join(t.TempDir(), "cluster")
	output(t, "go", "build", "-o", program, ".")

	up := func(t *testing.T) {
		t.Helper()
		began := time.Now()
		output(t, program, "up")
		output(t, program, "status")
		t.Logf("up took %.1f s", time.Since(began).Seconds())
	}
	kill := func(t *testing.T, name string) {
		t.Helper()
		if p, ok := running(c.pidFile(name)); ok {
			_ = syscall.Kill(p.PID, syscall.SIGKILL)
		}
	}
	t.Run("down, down, up", func(t *testing.T) {
		output(t, program, "down")
		output(t, program, "down")
		up(t)
	})
	for _, comp := range c.components() {
		t.Run("kill "+comp.name, func(t *testing.T) {
			kill(t, comp.name)
			up(t)
		})
	}
	t.Run("kill shims and lose the state directory's record", func(t *testing.T) {
		if err := stopAll(findProcesses(c.isShim)); err != nil {
			t.Fatal(err)
		}
		if err := c.writeRecord(record{}); err != nil {
			t.Fatal(err)
		}
		up(t)
	})
	// From before the first program runs until the addons come up.
	for _, after := range []time.Duration{50, 200, 500, 1500, 3500, 5500, 8000} {
		t.Run(fmt.Sprintf("kill the command %d ms into a boot", after), func(t *testing.T) {
			output(t, program, "down")
			cmd := exec.Command(program, "up")
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(after * time.Millisecond)
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			if after == 1500 {
				kill(t, "containerd")
			}
			up(t)
		})
	}
	t.Run("down leaves nothing", func(t *testing.T) {
		output(t, program, "down")
		if left := findProcesses(c.isComponent); len(left) != 0 {
			t.Errorf("processes: %v", left)
		}
		if left := findProcesses(c.isShim); len(left) != 0 {
			t.Errorf("shims: %v", left)
		}
		data, err := os.ReadFile("/proc/self/mountinfo")
		if err != nil {
			t.Fatal(err)
		}
		if left := mountPoints(string(data), c.dir); len(left) != 0 {
			t.Errorf("mounts: %v", left)
		}
		for _, file := range []string{c.dir, "/sys/class/net/" + nodeDevice, "/sys/class/net/" + podDevice} {
			if _, err := os.Stat(file); err == nil {
				t.Errorf("%s is still there", file)
			}
		}
		if rules := output(t, "nft", "list", "ruleset"); strings.Contains(rules, "kube-proxy") || strings.Contains(rules, nftTable) {
			t.Errorf("packet rules:\n%s", rules)
		}
		up(t)
	})
}

const smokePod = `
apiVersion: v1
kind: Pod
metadata: {name: probe, namespace: rdv-smoke, labels: {app: probe}}
spec:
  terminationGracePeriodSeconds: 60
  initContainers:
  - name: linger
    image: localhost/rdv-cluster/probe:smoke
    restartPolicy: Always
    args: [linger, 8s]
  containers:
  - name: serve
    image: localhost/rdv-cluster/probe:smoke
    args: [serve]
    ports: [{containerPort: 8080}]
    readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}
---
apiVersion: v1
kind: Service
metadata: {name: hello, namespace: rdv-smoke}
spec:
  selector: {app: probe}
  ports: [{port: 8080}]
`

func (c *cluster) must(t *testing.T, stdin string, args ...string) string {
	t.Helper()
	out, err := c.kubectl(t.Context(), stdin, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func output(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := command(t.Context(), name, args...)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

func buildProbe(t *testing.T) string {
	t.Helper()
	t.Setenv("CGO_ENABLED", "0")
	file := filepath.Join(t.TempDir(), "probe")
	output(t, "go", "build", "-o", file, "./probe")
	return file
}

func loadProbe(t *testing.T, c *cluster, probe string) {
	t.Helper()
	tar := filepath.Join(t.TempDir(), "probe.tar")
	err := imagetar.WriteFile(tar, imagetar.Image{
		Ref: "localhost/rdv-cluster/probe:smoke", Entrypoint: []string{"/probe"},
		Files: []imagetar.File{{Path: "/probe", Source: probe, Mode: 0o755}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := run(t.Context(), []string{"load", tar}); err != nil {
		t.Fatal(err)
	}
}

func portForward(t *testing.T, c *cluster) {
	cmd := exec.CommandContext(t.Context(), c.bin("kubectl"), "--kubeconfig="+c.adminKubeconfig(),
		"-n", smokeNamespace, "port-forward", "--address=127.0.0.1", "pod/probe", ":8080")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	buf := make([]byte, 200)
	n, err := out.Read(buf) // "Forwarding from 127.0.0.1:PORT -> 8080"
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(string(buf[:n]))
	resp, err := http.Get("http://" + fields[2])
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if body, _ := io.ReadAll(resp.Body); string(body) != "hello" {
		t.Errorf("answer = %q", body)
	}
}

// fromNamespace asks from a network namespace that is cabled to the host, as
// other tests of the project make them.
func fromNamespace(t *testing.T, probe, service string) {
	const ns, cable = "rdv-smoke", "rdv-smoke0"
	output(t, "ip", "netns", "add", ns)
	t.Cleanup(func() { _ = exec.Command("ip", "netns", "del", ns).Run() })
	for _, args := range []string{
		"link add " + cable + " type veth peer name eth0 netns " + ns,
		"addr add 10.99.77.1/30 dev " + cable,
		"link set " + cable + " up",
		"-n " + ns + " addr add 10.99.77.2/30 dev eth0",
		"-n " + ns + " link set eth0 up",
		"-n " + ns + " route add default via 10.99.77.1",
	} {
		output(t, "ip", strings.Fields(args)...)
	}
	if got := output(t, "ip", "netns", "exec", ns, probe, "get", "http://"+service+":8080"); got != "hello" {
		t.Errorf("through the Service: %q", got)
	}
	if got := output(t, "ip", "netns", "exec", ns, probe, "lookup", "hello.rdv-smoke.svc.cluster.local.", dnsIP); !strings.Contains(got, service) {
		t.Errorf("DNS answers %q, want %s", got, service)
	}
}

// certificates wants a leaf of each kind of key, and one renewed early.
func certificates(t *testing.T, c *cluster) {
	for _, key := range []string{"Ed25519", "ECDSA", "RSA"} {
		name := "leaf-" + strings.ToLower(key)
		c.must(t, fmt.Sprintf(`
apiVersion: cert-manager.io/v1
kind: Certificate
metadata: {name: %[1]s, namespace: rdv-smoke}
spec:
  secretName: %[1]s
  duration: 1h
  renewBefore: 59m50s
  dnsNames: [smoke.rdv.test]
  privateKey: {algorithm: %[2]s, rotationPolicy: Always}
  issuerRef: {name: rdv-demo-ca, kind: ClusterIssuer}
`, name, key), "apply", "-f", "-")
	}
	for _, name := range []string{"leaf-ed25519", "leaf-ecdsa", "leaf-rsa"} {
		c.must(t, "", "-n", smokeNamespace, "wait", "--for=condition=Ready", "--timeout=30s", "certificate/"+name)
		c.must(t, "", "-n", smokeNamespace, "wait", "--for=jsonpath={.status.revision}=2", "--timeout=60s", "certificate/"+name)
	}
}

// certificateRequest wants a request made by hand to be approved and signed.
func certificateRequest(t *testing.T, c *cluster) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: "smoke"}, DNSNames: []string{"smoke.rdv.test"},
	}, key)
	if err != nil {
		t.Fatal(err)
	}
	csr := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
	c.must(t, fmt.Sprintf(`
apiVersion: cert-manager.io/v1
kind: CertificateRequest
metadata: {name: by-hand, namespace: rdv-smoke}
spec:
  request: %s
  usages: [client auth]
  issuerRef: {name: rdv-demo-ca, kind: ClusterIssuer}
`, base64.StdEncoding.EncodeToString(csr)), "apply", "-f", "-")
	c.must(t, "", "-n", smokeNamespace, "wait", "--for=condition=Ready", "--timeout=30s", "certificaterequest/by-hand")
	encoded := c.must(t, "", "-n", smokeNamespace, "get", "certificaterequest", "by-hand", "-o", "jsonpath={.status.certificate}")
	chain, err := base64.StdEncoding.DecodeString(encoded)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(chain)
	if block == nil {
		t.Fatalf("no certificate in %q", chain)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	if !key.PublicKey.Equal(cert.PublicKey) {
		t.Error("the certificate is for another key")
	}
}

// tokens wants Dex to issue ID tokens with each user's groups, over a certificate
// of the company's authority.
func tokens(t *testing.T, c *cluster) {
	encoded := c.must(t, "", "-n", "cert-manager", "get", "secret", "rdv-demo-ca", "-o", `jsonpath={.data.tls\.crt}`)
	ca, err := base64.StdEncoding.DecodeString(encoded)
	if err != nil {
		t.Fatal(err)
	}
	address := strings.TrimSpace(c.must(t, "", "-n", "dex", "get", "service", "dex", "-o", "jsonpath={.spec.clusterIP}"))
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(bytes.TrimSpace(ca))
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: roots},
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, net.JoinHostPort(address, "5556"))
		},
	}}
	for user, groups := range map[string][]string{"alice": {"engineers"}, "bob": {"finance"}, "carol": nil} {
		resp, err := client.PostForm("https://dex.rdv.test:5556/dex/token", url.Values{
			"grant_type": {"password"}, "client_id": {"rdv"}, "scope": {"openid email groups profile"},
			"username": {user + "@example.test"}, "password": {user + "-demo"},
		})
		if err != nil {
			t.Fatal(err)
		}
		var answer struct {
			IDToken string `json:"id_token"`
		}
		err = json.NewDecoder(resp.Body).Decode(&answer)
		resp.Body.Close()
		parts := strings.Split(answer.IDToken, ".")
		if err != nil || len(parts) != 3 {
			t.Fatalf("%s: %s, no token (%v)", user, resp.Status, err)
		}
		payload, err := base64.RawURLEncoding.DecodeString(parts[1])
		if err != nil {
			t.Fatal(err)
		}
		var claims struct {
			Aud    string
			Groups []string
		}
		if err := json.Unmarshal(payload, &claims); err != nil {
			t.Fatal(err)
		}
		if claims.Aud != "rdv" || !slices.Equal(claims.Groups, groups) {
			t.Errorf("%s: claims %s, want audience rdv and groups %v", user, payload, groups)
		}
	}
}
