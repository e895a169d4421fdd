// Command dex is upstream's Dex server with a user directory of its own, standing
// for a company's identity provider. Dex's static passwords carry no groups, so
// the directory is a Dex connector (see directory.go); sessions, tokens, keys,
// device flow and login pages are Dex's.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	gosundheit "github.com/AppsFlyer/go-sundheit"
	"github.com/dexidp/dex/server"
	"github.com/dexidp/dex/storage"
	"github.com/dexidp/dex/storage/memory"
)

// config is the configuration file, JSON.
type config struct {
	Issuer string `json:"issuer"`
	Listen string `json:"listen"` // host:port of the HTTPS listener
	// IDTokenSeconds is the lifetime of ID tokens; 3600 when 0.
	IDTokenSeconds int              `json:"idTokenSeconds"`
	Clients        []storage.Client `json:"clients"`
	Users          []user           `json:"users"`
}

func main() {
	file := flag.String("config", "/etc/dex/config.json", "configuration file")
	cert := flag.String("tls-cert", "/etc/dex/tls/tls.crt", "certificate of the HTTPS listener; read anew at each handshake")
	key := flag.String("tls-key", "/etc/dex/tls/tls.key", "its key")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	if err := run(ctx, *file, *cert, *key); err != nil {
		fmt.Fprintln(os.Stderr, "dex:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, file, cert, key string) error {
	cfg, err := readConfig(file)
	if err != nil {
		return err
	}
	logger := slog.New(slog.NewJSONHandler(os.Stderr, nil))
	handler, err := newServer(ctx, cfg, logger)
	if err != nil {
		return err
	}
	srv := &http.Server{
		Addr:              cfg.Listen,
		Handler:           handler,
		TLSConfig:         reloading(cert, key),
		ReadHeaderTimeout: 10 * time.Second,
	}
	go func() {
		<-ctx.Done()
		bounded, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		_ = srv.Shutdown(bounded)
	}()
	if err := srv.ListenAndServeTLS("", ""); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

func readConfig(file string) (config, error) {
	cfg := config{Listen: ":5556", IDTokenSeconds: 3600}
	data, err := os.ReadFile(file)
	if err != nil {
		return cfg, err
	}
	if err := json.Unmarshal(data, &cfg); err != nil {
		return cfg, fmt.Errorf("%s: %w", file, err)
	}
	return cfg, nil
}

// newServer is Dex over memory storage: a restart forgets sessions and signing
// keys, which clients see as a key rotation.
func newServer(ctx context.Context, cfg config, logger *slog.Logger) (http.Handler, error) {
	directory, err := json.Marshal(directoryConfig{Users: cfg.Users})
	if err != nil {
		return nil, err
	}
	server.ConnectorsConfig[directoryType] = func() server.ConnectorConfig { return new(directoryConfig) }
	store := storage.WithStaticClients(memory.New(logger), cfg.Clients)
	store = storage.WithStaticConnectors(store, []storage.Connector{{
		ID: directoryType, Type: directoryType, Name: "Directory", Config: directory,
	}})
	refresh, err := server.NewRefreshTokenPolicy(logger, false, "", "", "")
	if err != nil {
		return nil, err
	}
	return server.NewServer(ctx, server.Config{
		Issuer:             cfg.Issuer,
		Storage:            store,
		SkipApprovalScreen: true,
		PasswordConnector:  directoryType,
		IDTokensValidFor:   time.Duration(cfg.IDTokenSeconds) * time.Second,
		RefreshTokenPolicy: refresh,
		Logger:             logger,
		HealthChecker:      gosundheit.New(),
	})
}
