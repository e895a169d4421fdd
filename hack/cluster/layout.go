package main

import (
	"os"
	"path/filepath"
)

// Addresses of the cluster. They exist on this machine only: the node's address
// sits on a bridge without ports, pods behind another bridge, and Services are
// kube-proxy's rewrites. Packets to any of them that arrive from a physical
// device are dropped (see network.go).
const (
	nodeName   = "rdv-node"
	nodeIP     = "10.89.0.1"
	nodeDevice = "rdv-node0" // a bridge, as not every kernel has dummy devices

	podCIDR    = "10.244.0.0/16"
	podGateway = "10.244.0.1"
	podDevice  = "rdv-pods0"

	serviceCIDR = "10.96.0.0/16"
	apiIP       = "10.96.0.1" // the Service kubernetes.default
	dnsIP       = "10.96.0.10"

	clusterDomain = "cluster.local"
	apiURL        = "https://" + nodeIP + ":6443"
	etcdURL       = "https://" + nodeIP + ":2379"
)

// lockFile is one per machine, as the addresses and devices are.
const lockFile = "/run/rendezvous-cluster.lock"

// layout names the files of a cluster's state directory.
type layout struct{ dir string }

func stateLayout() layout {
	if dir := os.Getenv("RDV_CLUSTER_DIR"); dir != "" {
		return layout{filepath.Clean(dir)}
	}
	return layout{"/var/lib/rendezvous-cluster"}
}

func (l layout) path(parts ...string) string {
	return filepath.Join(append([]string{l.dir}, parts...)...)
}

func (l layout) bin(program string) string { return l.path("bin", program) }
func (l layout) log(name string) string    { return l.path("log", name+".log") }
func (l layout) pidFile(name string) string {
	return l.path("pid", name+".json")
}
func (l layout) crt(name string) string        { return l.path("pki", name+".crt") }
func (l layout) key(name string) string        { return l.path("pki", name+".key") }
func (l layout) config(name string) string     { return l.path("config", name) }
func (l layout) kubeconfig(user string) string { return l.path("config", user+".kubeconfig") }
func (l layout) adminKubeconfig() string       { return l.path("kubeconfig") }
func (l layout) containerdSocket() string      { return l.path("run", "containerd", "containerd.sock") }
func (l layout) recordFile() string            { return l.path("cluster.json") }

// cacheDir holds built programs and images; it outlives clusters and clones.
func cacheDir() (string, error) {
	base := os.Getenv("XDG_CACHE_HOME")
	if base == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return "", err
		}
		base = filepath.Join(home, ".cache")
	}
	dir := filepath.Join(base, "rendezvous", "cluster")
	return dir, os.MkdirAll(dir, 0o755)
}
