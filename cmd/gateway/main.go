// Command gateway is the admission container of a gateway pod. See package gateway.
package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"os/signal"
	"runtime"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"rendezvous.dev/rendezvous/gateway"
	"rendezvous.dev/rendezvous/wire/admission"
	"rendezvous.dev/rendezvous/wire/config"
	"rendezvous.dev/rendezvous/wire/door"
	"rendezvous.dev/rendezvous/wire/version"
)

// linked is the version, set by the linker.
var linked = ""

func main() {
	if err := run(); err != nil {
		slog.Error("gateway stopped", "error", err)
		os.Exit(1)
	}
}

func run() error {
	file := flag.String("config", config.GatewayFile, "configuration file")
	metricsAddr := flag.String("metrics-addr", fmt.Sprintf(":%d", config.PortGatewayMetrics), "address of /metrics, /healthz and /readyz")
	dir := flag.String("workspaces-dir", config.WorkspacesDir, "folder with a folder per workspace: tls.crt, tls.key, ca.crt, ticket.crt")
	socket := flag.String("admission-socket", config.AdmissionSocket, "Unix socket that the relay dials")
	podIP := flag.String("pod-ip", os.Getenv("POD_IP"), "this pod's address, which names the instance")
	peerPort := flag.Uint("peer-port", config.PortPublic, "port of the other relays of this gateway")
	level := slog.LevelInfo
	flag.TextVar(&level, "log-level", level, "debug, info, warn or error")
	version.AddFlag(flag.CommandLine, linked)
	flag.Parse()
	log := slog.New(slog.NewJSONHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
	slog.SetDefault(log)
	log.Info("starting", "version", version.Line(linked))
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(1) // it carries no bytes, and one core is good for 2,000 connects a second: a second would only be woken and put to sleep
	}

	addr, err := netip.ParseAddr(*podIP)
	if err != nil {
		return fmt.Errorf("--pod-ip (or the environment's POD_IP) %q is no address: %w", *podIP, err)
	}
	var cfg config.Gateway
	if err := config.Load(*file, &cfg); err != nil {
		return err
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	g, err := gateway.New(gateway.Options{Config: cfg, Instance: admission.InstanceName(addr), WorkspacesDir: *dir, Log: log,
		Metrics: gateway.NewMetrics(registry), PeerPort: uint16(*peerPort), Linger: config.Linger})
	if err != nil {
		return err
	}

	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	go reload(ctx, *file, g, log)
	metrics := &http.Server{Handler: observe(registry, g), ReadHeaderTimeout: 5 * time.Second, IdleTimeout: 2 * time.Minute}
	ml, err := door.Inside(*metricsAddr, log, nil)
	if err != nil {
		return err
	}
	go metrics.Serve(ml)
	defer metrics.Close()
	l, err := gateway.Listen(*socket)
	if err != nil {
		return err
	}
	log.Info("gateway serves", "gateway", cfg.Gateway, "instance", admission.InstanceName(addr), "socket", *socket)
	return g.Run(ctx, l)
}

// observe serves what Kubernetes and Prometheus ask for.
func observe(registry *prometheus.Registry, g *gateway.Gateway) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{EnableOpenMetrics: true}))
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusOK) })
	mux.HandleFunc("/readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := g.Ready(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
		}
	})
	return mux
}

// reload takes workspaces that come and go over when the file changes.
func reload(ctx context.Context, file string, g *gateway.Gateway, log *slog.Logger) {
	last, _ := os.ReadFile(file)
	tick := time.NewTicker(5 * time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now, err := os.ReadFile(file)
		if err != nil || bytes.Equal(now, last) {
			continue
		}
		last = now
		var cfg config.Gateway
		if err := config.Load(file, &cfg); err != nil {
			log.Error("kept the old configuration", "error", err)
			continue
		}
		g.SetConfig(cfg)
		log.Info("configuration reloaded", "workspaces", len(cfg.Workspaces))
	}
}
