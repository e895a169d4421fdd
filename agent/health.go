package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"time"
)

// socketName is the one thing that an agent listens on, inside its private state folder.
const socketName = "agent.sock"

// Health is what a running agent says of itself.
type Health struct {
	Host      string `json:"host"`
	Enrolled  bool   `json:"enrolled"`
	Connected bool   `json:"connected"` // a control channel to a broker stands
	RDPReady  bool   `json:"rdpReady"`
	Message   string `json:"message,omitempty"`
	// Problem is why this host has not enrolled, or has no channel, as of the last try.
	Problem string `json:"problem,omitempty"`
	// Refused says that the broker refuses this machine for good: it takes a person to change that.
	Refused  bool `json:"refused,omitempty"`
	Sessions int  `json:"sessions"`
	Stopping bool `json:"stopping"`
}

// Ready says that the host can be given sessions.
func (h Health) Ready() bool { return h.Connected && h.RDPReady && !h.Stopping }

func (a *Agent) serveHealth() (*http.Server, error) {
	l, err := listenPrivate(filepath.Join(a.opts.StateDir, socketName))
	if err != nil {
		return nil, fmt.Errorf("--state-dir: health socket: %w", err)
	}
	s := &http.Server{ReadTimeout: 5 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(a.health())
	})}
	go s.Serve(l)
	return s, nil
}

func (a *Agent) health() Health {
	_, stopping := a.ledger.inForce()
	a.mu.Lock()
	defer a.mu.Unlock()
	return Health{
		Host: a.opts.Host, Enrolled: a.member != nil, Connected: a.conn != nil, RDPReady: a.probed.ready,
		Message: a.probed.why, Problem: a.problem, Refused: a.refusedForGood, Sessions: a.ledger.count(), Stopping: stopping,
	}
}

// listenPrivate makes a Unix socket that its owner and root alone may speak to. One that a killed process left is replaced.
func listenPrivate(path string) (net.Listener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	if runtime.GOOS != "windows" { // where a socket has no mode and the folder's rights count
		if err := os.Chmod(path, 0o600); err != nil {
			l.Close()
			return nil, err
		}
	}
	return l, nil
}

// CheckHealth asks the agent that runs with stateDir how it is. An error means that none answers: that, and not an
// absent broker, is what a liveness probe should restart it for.
func CheckHealth(ctx context.Context, stateDir string) (Health, error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", filepath.Join(stateDir, socketName))
	}}}
	defer client.CloseIdleConnections()
	var h Health
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://agent/health", nil)
	if err != nil {
		return h, err
	}
	res, err := client.Do(req)
	if err != nil {
		return h, fmt.Errorf("no agent answers in %s: is it running with this --state-dir? %w", stateDir, err)
	}
	defer res.Body.Close()
	return h, json.NewDecoder(res.Body).Decode(&h)
}
