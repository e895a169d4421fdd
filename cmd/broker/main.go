// Command broker is one replica of a workspace's broker. See package broker.
package main

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/go-logr/logr"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"
	ctrllog "sigs.k8s.io/controller-runtime/pkg/log"

	"rendezvous.dev/rendezvous/broker"
	"rendezvous.dev/rendezvous/broker/inventory"
	"rendezvous.dev/rendezvous/wire/config"
	"rendezvous.dev/rendezvous/wire/version"
)

// linked is the version, set by the linker.
var linked = ""

func main() {
	if err := run(); err != nil {
		slog.Error("broker stopped", "error", err)
		os.Exit(1)
	}
}

func run() error {
	file := flag.String("config", config.BrokerFile, "configuration file; oidc-ca.crt may stand beside it")
	metricsAddr := flag.String("metrics-addr", fmt.Sprintf(":%d", config.PortMetrics), "address of /metrics, /healthz and /readyz")
	level := slog.LevelInfo
	flag.TextVar(&level, "log-level", level, "debug, info, warn or error")
	version.AddFlag(flag.CommandLine, linked)
	flag.Parse()
	log := slog.New(slog.NewJSONHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
	slog.SetDefault(log)
	log.Info("starting", "version", version.Line(linked))
	klog.SetSlogLogger(log)
	ctrllog.SetLogger(logr.FromSlogHandler(log.Handler()))

	var cfg config.Broker
	if err := config.Load(*file, &cfg); err != nil {
		return err
	}
	// The pod's service account, or where $KUBECONFIG is set, what it says.
	kube, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(clientcmd.NewDefaultClientConfigLoadingRules(), nil).ClientConfig()
	if err != nil {
		return fmt.Errorf("broker: how to reach Kubernetes: %w", err)
	}
	inv, err := inventory.New(kube, cfg.Namespace, cfg.Workspace, log)
	if err != nil {
		return err
	}
	name, err := podName()
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	return broker.Run(ctx, broker.Options{
		Config: cfg, ConfigDir: filepath.Dir(*file),
		TLSDir: config.TLSDir, BusDir: config.BusDir, TicketsDir: config.TicketsDir, SigningDir: config.SigningDir,
		Name: name, PodIP: os.Getenv("POD_IP"), Host: listenHost(os.Getenv("POD_IP")),
		MetricsAddr: *metricsAddr, Inventory: inv, Log: log, Linger: config.Linger,
	})
}

// listenHost is every address of the pod's family.
func listenHost(podIP string) string {
	if strings.Contains(podIP, ":") {
		return "::"
	}
	return "0.0.0.0"
}

// podName tells replicas apart.
func podName() (string, error) {
	if name := os.Getenv("POD_NAME"); name != "" {
		return name, nil
	}
	return os.Hostname()
}
