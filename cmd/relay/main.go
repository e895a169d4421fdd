// Command relay is the data path of a gateway pod. See package relay.
package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/pprof"
	"net/netip"
	"os"
	"os/signal"
	"runtime"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"

	"rendezvous.dev/rendezvous/relay"
	"rendezvous.dev/rendezvous/wire/admission"
	"rendezvous.dev/rendezvous/wire/config"
	"rendezvous.dev/rendezvous/wire/door"
	"rendezvous.dev/rendezvous/wire/mtls"
	"rendezvous.dev/rendezvous/wire/version"
)

// admissionPatience is how long a client waits for a gateway container that is being replaced or has died.
const admissionPatience = 3 * time.Second

// linked is the version, set by the linker.
var linked = ""

func main() {
	if err := run(); err != nil {
		slog.Error("relay stopped", "error", err)
		os.Exit(1)
	}
}

func run() error {
	file := flag.String("config", config.RelayFile, "configuration file")
	listen := flag.String("listen", fmt.Sprintf(":%d", config.PortPublic), "address of the public listener")
	metricsAddr := flag.String("metrics-addr", fmt.Sprintf(":%d", config.PortMetrics), "address of /metrics, /healthz and /readyz")
	tlsDir := flag.String("tls-dir", config.TLSDir, "folder with tls.crt and tls.key")
	socket := flag.String("admission-socket", config.AdmissionSocket, "Unix socket of the gateway container")
	podIP := flag.String("pod-ip", os.Getenv("POD_IP"), "this pod's address, which names the instance")
	profile := flag.Bool("pprof", false, "serve Go's profiles at /debug/pprof/ beside the metrics")
	level := slog.LevelInfo
	flag.TextVar(&level, "log-level", level, "debug, info, warn or error")
	version.AddFlag(flag.CommandLine, linked)
	flag.Parse()
	log := slog.New(slog.NewJSONHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
	slog.SetDefault(log)
	log.Info("starting", "version", version.Line(linked))
	defer runtime.KeepAlive(make([]byte, ballast))
	if !*profile {
		runtime.MemProfileRate = 0
	}
	if limit := limitMemory(os.DirFS("/")); limit > 0 {
		log.Info("memory is limited", "bytes", limit)
	}

	addr, err := netip.ParseAddr(*podIP)
	if err != nil {
		return fmt.Errorf("--pod-ip (or the environment's POD_IP) %q is no address: %w", *podIP, err)
	}
	var cfg config.Relay
	if err := config.Load(*file, &cfg); err != nil {
		return err
	}
	certs, err := mtls.NewReloader(*tlsDir, log)
	if err != nil {
		return err
	}
	cc, err := admission.Dial(*socket, admission.Patient(admissionPatience), grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second}, MinConnectTimeout: time.Second}))
	if err != nil {
		return err
	}
	defer cc.Close()
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	r, err := relay.New(relay.Options{Config: cfg, Instance: admission.InstanceName(addr), TLS: certs.ServerConfig(),
		Admission: admission.NewAdmissionClient(cc), Log: log, Metrics: relay.NewMetrics(registry)})
	if err != nil {
		return err
	}

	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	done := make(chan struct{})
	defer close(done)
	go certs.Poll(done, 10*time.Second)
	go reload(done, *file, r, log)

	metrics := &http.Server{Addr: *metricsAddr, Handler: observe(registry, r, *profile), ReadHeaderTimeout: 5 * time.Second, IdleTimeout: 2 * time.Minute}
	ml, err := door.Inside(*metricsAddr, log, nil)
	if err != nil {
		return err
	}
	go metrics.Serve(ml)
	defer metrics.Close()
	l, err := relay.Listen(ctx, *listen)
	if err != nil {
		return err
	}
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	log.Info("relay serves", "gateway", cfg.Gateway, "instance", admission.InstanceName(addr), "address", l.Addr().String())
	return r.Run(ctx, l)
}

// observe serves what Kubernetes and Prometheus ask for.
func observe(registry *prometheus.Registry, r *relay.Relay, profile bool) http.Handler {
	mux := http.NewServeMux()
	if profile {
		mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("/debug/pprof/", pprof.Index)
	}
	mux.Handle("/metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{EnableOpenMetrics: true}))
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusOK) })
	mux.HandleFunc("/readyz", func(w http.ResponseWriter, _ *http.Request) {
		if !r.Ready() {
			http.Error(w, "not serving, or draining", http.StatusServiceUnavailable)
		}
	})
	return mux
}

// reload takes new bounds over when the file changes.
func reload(done <-chan struct{}, file string, r *relay.Relay, log *slog.Logger) {
	last, _ := os.ReadFile(file)
	tick := time.NewTicker(10 * time.Second)
	defer tick.Stop()
	for {
		select {
		case <-done:
			return
		case <-tick.C:
		}
		now, err := os.ReadFile(file)
		if err != nil || bytes.Equal(now, last) {
			continue
		}
		last = now
		var cfg config.Relay
		if err := config.Load(file, &cfg); err != nil {
			log.Error("kept the old configuration", "error", err)
			continue
		}
		r.SetConfig(cfg)
		log.Info("configuration reloaded")
	}
}
