package gateway

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"rendezvous.dev/rendezvous/wire/refusal"
)

// Metrics is the gateway container's handles.
type Metrics struct {
	Sessions     prometheus.Gauge
	Bus          *prometheus.GaugeVec   // workspace: 1 while its bus is connected
	Tickets      *prometheus.CounterVec // code: "ok" or a refusal code
	Connects     *prometheus.CounterVec // code
	Entries      *prometheus.CounterVec // code
	Routes       *prometheus.CounterVec // code
	Pings        *prometheus.CounterVec // result: "ok" or "error"
	PeerLatency  *prometheus.GaugeVec   // gateway: seconds of a round trip to another gateway
	ConnectDelay prometheus.Histogram   // seconds until the broker's answer
}

// NewMetrics makes the handles and registers them with reg; with nil they count for nobody.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	const ns, sub = "rendezvous", "gateway"
	counter := func(name, help string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: ns, Subsystem: sub, Name: name, Help: help}, []string{"code"})
	}
	m := &Metrics{
		Sessions: prometheus.NewGauge(prometheus.GaugeOpts{Namespace: ns, Subsystem: sub, Name: "sessions", Help: "Sessions that the relay reports."}),
		Bus:      prometheus.NewGaugeVec(prometheus.GaugeOpts{Namespace: ns, Subsystem: sub, Name: "bus_connected", Help: "1 while a workspace's bus is connected."}, []string{"workspace"}),
		Tickets:  counter("tickets_total", "Tickets checked, by refusal code."),
		Connects: counter("connects_total", "Connects that brokers were asked for, by refusal code."),
		Entries:  counter("entries_total", "Clients that asked which gateway is to serve them, by refusal code."),
		Routes:   counter("routes_total", "Peer relays looked up, by refusal code."),
		Pings: prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: ns, Subsystem: sub, Name: "peer_measurements_total",
			Help: "Rounds of measuring with another gateway, by result."}, []string{"result"}),
		PeerLatency: prometheus.NewGaugeVec(prometheus.GaugeOpts{Namespace: ns, Subsystem: sub, Name: "peer_latency_seconds",
			Help: "Round trip to another gateway's public listener, the shortest of the last rounds."}, []string{"gateway"}),
		ConnectDelay: prometheus.NewHistogram(prometheus.HistogramOpts{Namespace: ns, Subsystem: sub, Name: "connect_seconds",
			Help: "Time until the broker's answer to a connect.", Buckets: []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30}}),
	}
	if reg != nil {
		reg.MustRegister(m.Sessions, m.Bus, m.Tickets, m.Connects, m.Entries, m.Routes, m.Pings, m.PeerLatency, m.ConnectDelay)
	}
	return m
}

func codeOf(e *refusal.Error) string {
	if e == nil {
		return "ok"
	}
	return string(e.Code)
}

func (m *Metrics) authenticated(e *refusal.Error) { m.Tickets.WithLabelValues(codeOf(e)).Inc() }

func (m *Metrics) connected(e *refusal.Error, d time.Duration, activity string) {
	m.Connects.WithLabelValues(codeOf(e)).Inc()
	m.ConnectDelay.(prometheus.ExemplarObserver).ObserveWithExemplar(d.Seconds(), prometheus.Labels{"activity": activity})
}
