package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"time"
)

// component is one long-running program of the cluster.
type component struct {
	name   string
	argv   []string
	health func(context.Context) error
}

// components are all programs, in the order in which they need each other.
func (c *cluster) components() []component {
	l := c.layout
	kubeconfigs := func(name string) []string {
		file := l.kubeconfig(name)
		return []string{
			"--kubeconfig=" + file, "--authentication-kubeconfig=" + file, "--authorization-kubeconfig=" + file,
			"--bind-address=" + nodeIP, "--leader-elect=false",
			"--tls-cert-file=" + l.crt(name), "--tls-private-key-file=" + l.key(name),
		}
	}
	return []component{
		{
			name: "containerd",
			argv: []string{"/usr/bin/containerd", "--config", l.config("containerd.toml")},
			health: func(ctx context.Context) error {
				_, err := c.ctr(ctx, "version")
				return err
			},
		},
		{
			name: "etcd",
			argv: []string{
				l.bin("etcd"), "--name=rdv", "--data-dir=" + l.path("etcd"), "--unsafe-no-fsync",
				"--listen-client-urls=" + etcdURL, "--advertise-client-urls=" + etcdURL,
				"--listen-peer-urls=https://" + nodeIP + ":2380", "--initial-advertise-peer-urls=https://" + nodeIP + ":2380",
				"--initial-cluster=rdv=https://" + nodeIP + ":2380",
				"--client-cert-auth", "--trusted-ca-file=" + l.crt("ca"), "--cert-file=" + l.crt("etcd"), "--key-file=" + l.key("etcd"),
				"--peer-client-cert-auth", "--peer-trusted-ca-file=" + l.crt("ca"), "--peer-cert-file=" + l.crt("etcd"), "--peer-key-file=" + l.key("etcd"),
				"--log-level=warn",
			},
			health: c.get(etcdURL + "/health"),
		},
		{
			name: "kube-apiserver",
			argv: []string{
				l.bin("kube-apiserver"), "--advertise-address=" + nodeIP, "--bind-address=" + nodeIP, "--secure-port=6443",
				"--tls-cert-file=" + l.crt("kube-apiserver"), "--tls-private-key-file=" + l.key("kube-apiserver"),
				"--client-ca-file=" + l.crt("ca"),
				"--etcd-servers=" + etcdURL, "--etcd-cafile=" + l.crt("ca"),
				"--etcd-certfile=" + l.crt("kube-apiserver-etcd"), "--etcd-keyfile=" + l.key("kube-apiserver-etcd"),
				"--kubelet-certificate-authority=" + l.crt("ca"), "--kubelet-client-certificate=" + l.crt("kube-apiserver-kubelet"),
				"--kubelet-client-key=" + l.key("kube-apiserver-kubelet"), "--kubelet-preferred-address-types=InternalIP",
				"--requestheader-client-ca-file=" + l.crt("front-proxy-ca"), "--requestheader-allowed-names=front-proxy-client",
				"--requestheader-username-headers=X-Remote-User", "--requestheader-group-headers=X-Remote-Group",
				"--requestheader-extra-headers-prefix=X-Remote-Extra-",
				"--proxy-client-cert-file=" + l.crt("front-proxy-client"), "--proxy-client-key-file=" + l.key("front-proxy-client"),
				"--service-account-issuer=https://kubernetes.default.svc." + clusterDomain,
				"--service-account-key-file=" + l.path("pki", "service-accounts.pub"),
				"--service-account-signing-key-file=" + l.key("service-accounts"),
				"--service-cluster-ip-range=" + serviceCIDR,
				"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged=true",
			},
			health: c.get(apiURL + "/readyz"),
		},
		{
			name: "kube-controller-manager",
			argv: append([]string{
				l.bin("kube-controller-manager"), "--use-service-account-credentials",
				"--service-account-private-key-file=" + l.key("service-accounts"), "--root-ca-file=" + l.crt("ca"),
				"--cluster-signing-cert-file=" + l.crt("ca"), "--cluster-signing-key-file=" + l.key("ca"),
				"--cluster-cidr=" + podCIDR, "--service-cluster-ip-range=" + serviceCIDR, "--allocate-node-cidrs", "--node-cidr-mask-size=16",
			}, kubeconfigs("kube-controller-manager")...),
			health: c.get("https://" + nodeIP + ":10257/healthz"),
		},
		{
			name:   "kube-scheduler",
			argv:   append([]string{l.bin("kube-scheduler")}, kubeconfigs("kube-scheduler")...),
			health: c.get("https://" + nodeIP + ":10259/healthz"),
		},
		{
			name: "kubelet",
			argv: []string{
				l.bin("kubelet"), "--config=" + l.config("kubelet.yaml"), "--kubeconfig=" + l.kubeconfig("kubelet"),
				"--root-dir=" + l.path("kubelet"), "--cert-dir=" + l.path("pki"),
				"--hostname-override=" + nodeName, "--node-ip=" + nodeIP,
				"--node-labels=topology.kubernetes.io/region=rdv,topology.kubernetes.io/zone=rdv-a,rendezvous.dev/node=development",
			},
			health: c.get("http://" + nodeIP + ":10248/healthz"),
		},
		{
			name:   "kube-proxy",
			argv:   []string{l.bin("kube-proxy"), "--config=" + l.config("kube-proxy.yaml")},
			health: c.get("http://" + nodeIP + ":10256/healthz"),
		},
		{
			name: policyProgram,
			argv: []string{
				l.bin(policyProgram), "--kubeconfig=" + l.kubeconfig(policyProgram), "--hostname-override=" + nodeName,
				"--service-cidr=" + serviceCIDR, "--health-address=" + nodeIP + ":20244",
			},
			health: c.get("http://" + nodeIP + ":20244/healthz"),
		},
	}
}

// get is a health check: url answers 200 to the cluster's administrator.
func (c *cluster) get(url string) func(context.Context) error {
	return func(ctx context.Context) error {
		client, err := c.httpClient()
		if err != nil {
			return err
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return err
		}
		resp, err := client.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("%s answers %s", url, resp.Status)
		}
		return nil
	}
}

// httpClient trusts the cluster's authority and shows the administrator's
// certificate. It is made anew each time, as a fresh boot makes a fresh authority.
func (c *cluster) httpClient() (*http.Client, error) {
	ca, err := os.ReadFile(c.crt("ca"))
	if err != nil {
		return nil, err
	}
	pair, err := tls.LoadX509KeyPair(c.crt("admin"), c.key("admin"))
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	return &http.Client{
		Timeout: 3 * time.Second,
		Transport: &http.Transport{
			DisableKeepAlives: true,
			TLSClientConfig:   &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12},
		},
	}, nil
}

// start makes sure that a component runs and waits for its health.
func (c *cluster) start(ctx context.Context, comp component) error {
	began := time.Now()
	if _, up := running(c.pidFile(comp.name)); !up {
		if err := startDetached(comp.argv, nil, c.log(comp.name), c.pidFile(comp.name)); err != nil {
			return fmt.Errorf("starting %s: %w", comp.name, err)
		}
	}
	if err := c.await(ctx, comp); err != nil {
		return err
	}
	say("%s is up (%.1f s)", comp.name, time.Since(began).Seconds())
	return nil
}

// await waits until comp is healthy, and gives up early when it has died.
func (c *cluster) await(ctx context.Context, comp component) error {
	ctx, cancel := context.WithTimeout(ctx, componentTimeout)
	defer cancel()
	died := false
	err := eventually(ctx, 100*time.Millisecond, func(ctx context.Context) error {
		if _, up := running(c.pidFile(comp.name)); !up {
			died = true
			return nil
		}
		return comp.health(ctx)
	})
	if died {
		err = errors.New("it ended")
	}
	if err != nil {
		return fmt.Errorf("%s is not healthy: %w; the end of %s:\n%s", comp.name, err, c.log(comp.name), logTail(c.log(comp.name)))
	}
	return nil
}

// kubectl runs the cluster's own kubectl as its administrator.
func (c *cluster) kubectl(ctx context.Context, stdin string, args ...string) (string, error) {
	return commandInput(ctx, strings.NewReader(stdin), c.bin("kubectl"), append([]string{"--kubeconfig=" + c.adminKubeconfig()}, args...)...)
}

// ctr runs containerd's client in the kubelet's namespace.
func (c *cluster) ctr(ctx context.Context, args ...string) (string, error) {
	return command(ctx, "ctr", append([]string{"--address", c.containerdSocket(), "--namespace", "k8s.io"}, args...)...)
}
