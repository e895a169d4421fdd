package main

import (
	"embed"
	"encoding/base64"
	"fmt"
	"os"
	"strings"
	"text/template"

	"rendezvous.dev/rendezvous/hack/cluster/pki"
)

//go:embed config/*
var configFiles embed.FS

// render fills one of the embedded configuration files.
func render(name string, values any) (string, error) {
	text, err := configFiles.ReadFile("config/" + name)
	if err != nil {
		return "", err
	}
	t, err := template.New(name).Option("missingkey=error").Parse(string(text))
	if err != nil {
		return "", err
	}
	var b strings.Builder
	if err := t.Execute(&b, values); err != nil {
		return "", err
	}
	return b.String(), nil
}

// nodeValues is what the node's configuration files name.
func (l layout) nodeValues(pauseRef string) map[string]any {
	return map[string]any{
		"Dir": l.dir, "Socket": l.containerdSocket(), "PauseImage": pauseRef,
		"NodeName": nodeName, "NodeIP": nodeIP, "PodDevice": podDevice, "PodCIDR": podCIDR, "PodGateway": podGateway,
		"DNSIP": dnsIP, "Domain": clusterDomain,
	}
}

// nodeConfigs are the configuration files of the programs of the node, by name.
func (l layout) nodeConfigs(pauseRef string) (map[string]string, error) {
	files := map[string]string{}
	for name, file := range map[string]string{
		"containerd.toml": "containerd.toml",
		"kubelet.yaml":    "kubelet.yaml",
		"kube-proxy.yaml": "kube-proxy.yaml",
		"10-rdv.conflist": "cni/10-rdv.conflist",
	} {
		text, err := render(name, l.nodeValues(pauseRef))
		if err != nil {
			return nil, err
		}
		files[file] = text
	}
	return files, nil
}

// clients are the users that hold a kubeconfig: file name → common name and groups.
var clients = map[string]pki.Leaf{
	"admin":                   {CommonName: "kubernetes-admin", Organization: []string{"system:masters"}},
	"kube-controller-manager": {CommonName: "system:kube-controller-manager"},
	"kube-scheduler":          {CommonName: "system:kube-scheduler"},
	"kube-proxy":              {CommonName: "system:kube-proxy"},
	policyProgram:             {CommonName: "rdv:netpol"},
	"kubelet":                 {CommonName: "system:node:" + nodeName, Organization: []string{"system:nodes"}},
}

// leaves are the other certificates of the cluster's authority.
var leaves = map[string]pki.Leaf{
	"etcd": {CommonName: "etcd", Server: true, Hosts: []string{nodeIP}},
	"kube-apiserver": {CommonName: "kube-apiserver", Server: true, Hosts: []string{
		nodeIP, apiIP, "127.0.0.1", "localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc",
		"kubernetes.default.svc." + clusterDomain,
	}},
	"kube-apiserver-etcd":     {CommonName: "kube-apiserver"},
	"kube-apiserver-kubelet":  {CommonName: "kube-apiserver-kubelet-client"},
	"kubelet-server":          {CommonName: nodeName, Server: true, Hosts: []string{nodeName, nodeIP}},
	"kube-controller-manager": {CommonName: "kube-controller-manager", Server: true, Hosts: []string{nodeIP}},
	"kube-scheduler":          {CommonName: "kube-scheduler", Server: true, Hosts: []string{nodeIP}},
}

// writePKI makes every key, certificate and kubeconfig of a new cluster.
func (l layout) writePKI() error {
	dir := l.path("pki")
	ca, err := pki.NewCA("rendezvous development cluster")
	if err != nil {
		return err
	}
	if err := ca.Write(dir, "ca"); err != nil {
		return err
	}
	for name, leaf := range leaves {
		pair, err := ca.Issue(leaf)
		if err != nil {
			return err
		}
		if err := pair.Write(dir, name); err != nil {
			return err
		}
	}
	for name, leaf := range clients {
		pair, err := ca.Issue(leaf)
		if err != nil {
			return err
		}
		file := l.kubeconfig(name)
		if name == "admin" {
			file = l.adminKubeconfig()
			if err := pair.Write(dir, "admin"); err != nil { // for this program's own health checks
				return err
			}
		}
		if err := writeFile(file, []byte(kubeconfig(name, ca, pair)), 0o600); err != nil {
			return err
		}
	}

	frontProxyCA, err := pki.NewCA("rendezvous development cluster, front proxy")
	if err != nil {
		return err
	}
	frontProxy, err := frontProxyCA.Issue(pki.Leaf{CommonName: "front-proxy-client"})
	if err != nil {
		return err
	}
	serviceAccounts, err := pki.NewCA("service accounts") // only its key is used
	if err != nil {
		return err
	}
	if err := frontProxyCA.Write(dir, "front-proxy-ca"); err != nil {
		return err
	}
	if err := frontProxy.Write(dir, "front-proxy-client"); err != nil {
		return err
	}
	if err := os.WriteFile(l.key("service-accounts"), serviceAccounts.KeyPEM(), 0o600); err != nil {
		return err
	}
	return os.WriteFile(l.path("pki", "service-accounts.pub"), serviceAccounts.PublicPEM(), 0o644)
}

// kubeconfig is self-contained, so that it can be copied anywhere on the machine.
func kubeconfig(user string, ca, pair *pki.Pair) string {
	b64 := base64.StdEncoding.EncodeToString
	return fmt.Sprintf(`apiVersion: v1
kind: Config
clusters:
- name: rendezvous
  cluster:
    server: %s
    certificate-authority-data: %s
users:
- name: %s
  user:
    client-certificate-data: %s
    client-key-data: %s
contexts:
- name: rendezvous
  context: {cluster: rendezvous, user: %s}
current-context: rendezvous
`, apiURL, b64(ca.CertPEM()), user, b64(pair.CertPEM()), b64(pair.KeyPEM()), user)
}
