// Command netpol enforces the cluster's NetworkPolicies, by kube-router's policy controller alone: its router and its Service
// proxy stay out. It runs on the node, beside kube-proxy, and writes iptables rules and ipsets.
package main

import (
	"context"
	"flag"
	"fmt"
	"net/http"
	"os"
	"os/signal"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/cloudnativelabs/kube-router/v2/pkg/controllers/netpol"
	"github.com/cloudnativelabs/kube-router/v2/pkg/healthcheck"
	"github.com/cloudnativelabs/kube-router/v2/pkg/options"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"
)

func main() {
	config := options.NewKubeRouterConfig()
	config.EnableIPv4 = true
	config.RunFirewall = true
	config.ClusterIPCIDRs = nil
	kubeconfig := flag.String("kubeconfig", "", "file that says how to reach the API server")
	health := flag.String("health-address", "", "address that answers /healthz once the first rules are in place")
	flag.StringVar(&config.HostnameOverride, "hostname-override", "", "the node's name")
	flag.Func("service-cidr", "the Services' addresses", func(cidr string) error {
		config.ClusterIPCIDRs = append(config.ClusterIPCIDRs, cidr)
		return nil
	})
	flag.DurationVar(&config.IPTablesSyncPeriod, "sync-period", time.Minute, "how often all rules are compared, changes aside")
	klog.InitFlags(nil)
	flag.Parse()
	if err := run(config, *kubeconfig, *health); err != nil {
		fmt.Fprintln(os.Stderr, "netpol:", err)
		os.Exit(1)
	}
}

// run enforces policies until the process is told to end. The rules stay then, as a node's do.
func run(config *options.KubeRouterConfig, kubeconfig, health string) error {
	clientConfig, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return err
	}
	client, err := kubernetes.NewForConfig(clientConfig)
	if err != nil {
		return err
	}
	stop := make(chan struct{})
	factory := informers.NewSharedInformerFactory(client, 0)
	pods := factory.Core().V1().Pods().Informer()
	namespaces := factory.Core().V1().Namespaces().Informer()
	policies := factory.Networking().V1().NetworkPolicies().Informer()
	factory.Start(stop)
	for kind, synced := range factory.WaitForCacheSync(stop) {
		if !synced {
			return fmt.Errorf("list of %v can't be read", kind)
		}
	}

	tables, sets, err := netpol.NewIPTablesHandlers(config)
	if err != nil {
		return err
	}
	if err := awaitNode(client, config.HostnameOverride); err != nil {
		return err
	}
	var ipsets sync.Mutex
	controller, err := netpol.NewNetworkPolicyController(client, config, pods, policies, namespaces, &ipsets, tables, sets)
	if err != nil {
		return err
	}
	if _, err := pods.AddEventHandler(controller.PodEventHandler); err != nil {
		return err
	}
	if _, err := namespaces.AddEventHandler(controller.NamespaceEventHandler); err != nil {
		return err
	}
	if _, err := policies.AddEventHandler(controller.NetworkPolicyEventHandler); err != nil {
		return err
	}

	// A heartbeat opens each comparison of all rules; the second one says that the first has come to its end.
	beats := make(chan *healthcheck.ControllerHeartbeat, 10)
	var seen atomic.Int64
	go func() {
		for range beats {
			seen.Add(1)
		}
	}()
	http.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) {
		if seen.Load() < 2 {
			controller.RequestFullSync()
			http.Error(w, "the first rules are not in place yet", http.StatusServiceUnavailable)
		}
	})
	failed := make(chan error, 1)
	go func() { failed <- http.ListenAndServe(health, nil) }()
	var running sync.WaitGroup
	running.Add(1)
	go controller.Run(beats, stop, &running)

	ended := make(chan os.Signal, 1)
	signal.Notify(ended, syscall.SIGINT, syscall.SIGTERM)
	select {
	case err = <-failed:
	case <-ended:
	}
	close(stop)
	return err
}

// awaitNode waits until the node has registered: the controller wants its addresses at once.
func awaitNode(client kubernetes.Interface, name string) (err error) {
	for range 120 {
		if _, err = client.CoreV1().Nodes().Get(context.Background(), name, metav1.GetOptions{}); err == nil {
			return nil
		}
		time.Sleep(time.Second)
	}
	return fmt.Errorf("node %s: %w", name, err)
}
