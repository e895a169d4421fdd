// Command manager is the operator.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"os"

	certmanager "github.com/cert-manager/cert-manager/pkg/apis/certmanager/v1"
	"github.com/go-logr/logr"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/klog/v2"
	ctrl "sigs.k8s.io/controller-runtime"
	ctrlconfig "sigs.k8s.io/controller-runtime/pkg/config"
	"sigs.k8s.io/controller-runtime/pkg/healthz"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"

	"rendezvous.dev/rendezvous/controllers"
	"rendezvous.dev/rendezvous/controllers/render"
	"rendezvous.dev/rendezvous/wire/version"
)

// linked is the version, set by the linker.
var linked = ""

func main() {
	if err := run(); err != nil {
		slog.Error("manager ends", "error", err.Error())
		os.Exit(1)
	}
}

func run() error {
	var (
		images      render.Options
		metricsAddr = flag.String("metrics-addr", ":9090", "address of /metrics, /healthz and /readyz")
		leaderElect = flag.Bool("leader-elect", true, "work only while holding the Lease, so that replicas can stand by")
		leaseNS     = flag.String("leader-election-namespace", "", "namespace of the Lease; empty means the pod's own")
		logLevel    = flag.String("log-level", "info", "debug, info, warn or error")
		watched     = flag.String("watch-namespaces", os.Getenv("WATCH_NAMESPACES"), "the only namespaces to look at, with commas between; empty means all. The operator then needs Roles in these instead of a ClusterRole: config/namespaced")
	)
	var sessions sessionsOptions
	flag.StringVar(&sessions.addr, "sessions-addr", "", "address at which sessions.live.rendezvous.dev is served to the Kubernetes API server; empty means not at all")
	flag.StringVar(&sessions.namespace, "sessions-namespace", env("POD_NAMESPACE", "rendezvous-system"), "the operator's namespace, for the certificate of that API")
	flag.StringVar(&sessions.service, "sessions-service", "rendezvous-sessions", "the Service that its APIService names")
	flag.StringVar(&images.BrokerImage, "broker-image", env("RELATED_IMAGE_BROKER", "rendezvous/broker:dev"), "image of brokers")
	flag.StringVar(&images.GatewayImage, "gateway-image", env("RELATED_IMAGE_GATEWAY", "rendezvous/gateway:dev"), "image of gateways' admission container")
	flag.StringVar(&images.RelayImage, "relay-image", env("RELATED_IMAGE_RELAY", "rendezvous/relay:dev"), "image of gateways' relay sidecar")
	flag.StringVar(&images.AgentImage, "agent-image", env("RELATED_IMAGE_AGENT", "rendezvous/agent:dev"), "image of session hosts' agent sidecar")
	flag.StringVar(&images.ClusterDomain, "cluster-domain", "cluster.local", "domain that ends the cluster's DNS names")
	version.AddFlag(flag.CommandLine, linked)
	images.OperatorNamespace = os.Getenv("POD_NAMESPACE")
	var clusterNetworks []netip.Prefix
	flag.Func("cluster-cidr", "an address range of the cluster's own that neither nodes nor ServiceCIDRs show, such as the pods' with some network plugins; desktops can't reach it; may be repeated", func(text string) error {
		network, err := netip.ParsePrefix(text)
		if err != nil {
			return fmt.Errorf("%q is no address range such as 10.244.0.0/16", text)
		}
		clusterNetworks = append(clusterNetworks, network)
		return nil
	})
	flag.Parse()

	var level slog.Level
	if err := level.UnmarshalText([]byte(*logLevel)); err != nil {
		return fmt.Errorf("--log-level: %w", err)
	}
	logger := slog.New(slog.NewJSONHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
	slog.SetDefault(logger)
	ctrl.SetLogger(logr.FromSlogHandler(logger.Handler()))
	logger.Info("starting", "version", version.Line(linked))
	klog.SetLogger(logr.FromSlogHandler(logger.Handler()))

	namespaces, err := controllers.Namespaces(*watched)
	if err != nil {
		return fmt.Errorf("--watch-namespaces: %w", err)
	}
	config, err := ctrl.GetConfig()
	if err != nil {
		return fmt.Errorf("no cluster to work on: %w", err)
	}
	// Metrics hold counts and names of objects, no secret: they are plain HTTP, as on every other component, and the
	// NetworkPolicy of config/manager keeps them inside the cluster.
	live := &healthz.Handler{Checks: map[string]healthz.Checker{"ping": healthz.Ping}}
	var synced readiness
	mgr, err := ctrl.NewManager(config, ctrl.Options{
		Scheme: controllers.NewScheme(),
		Metrics: metricsserver.Options{
			BindAddress: *metricsAddr,
			ExtraHandlers: map[string]http.Handler{
				"/healthz": http.StripPrefix("/healthz", live),
				"/readyz":  http.StripPrefix("/readyz", &healthz.Handler{Checks: map[string]healthz.Checker{"caches": synced.check}}),
			},
		},
		Cache:                   controllers.CacheOptions(namespaces...),
		Controller:              ctrlconfig.Controller{MaxConcurrentReconciles: controllers.MaxConcurrentReconciles},
		LeaderElection:          *leaderElect,
		LeaderElectionID:        "manager.rendezvous.dev",
		LeaderElectionNamespace: *leaseNS,
		// The process ends as soon as the manager has stopped, so the Lease can be given up at once.
		LeaderElectionReleaseOnCancel: true,
	})
	if err != nil {
		return err
	}
	if _, err := mgr.GetRESTMapper().RESTMapping(certmanager.SchemeGroupVersion.WithKind(certmanager.CertificateKind).GroupKind(), certmanager.SchemeGroupVersion.Version); err != nil {
		if meta.IsNoMatchError(err) {
			return errors.New("cert-manager is not installed in this cluster: install it first, see https://cert-manager.io")
		}
		return fmt.Errorf("look for cert-manager: %w", err)
	}
	noClusterIssuers := false
	if len(namespaces) > 0 {
		if noClusterIssuers, err = controllers.MayNotReadClusterIssuers(context.Background(), mgr.GetClient()); err != nil {
			return err
		}
		logger.Info("held to namespaces", "namespaces", namespaces, "reads ClusterIssuers", !noClusterIssuers)
	}
	if err := controllers.Setup(mgr, controllers.Options{Render: images, ClusterNetworks: clusterNetworks, NoClusterIssuers: noClusterIssuers}); err != nil {
		return err
	}
	if err := sessions.add(mgr, images, logger); err != nil {
		return err
	}
	ctx := ctrl.SetupSignalHandler()
	synced.watch(ctx, mgr.GetCache())
	return mgr.Start(ctx)
}

func env(name, fallback string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return fallback
}
