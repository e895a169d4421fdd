package relay

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Metrics is the relay's handles.
type Metrics struct {
	Sessions   prometheus.Gauge
	Capacity   prometheus.Gauge // MaxSessions
	Pending    prometheus.Gauge
	Splices    prometheus.Gauge
	Bytes      *prometheus.CounterVec // direction: to_client, to_host
	Admissions *prometheus.CounterVec // transport, code ("ok" or a refusal code)
	Joins      *prometheus.CounterVec // result: ok, refused
	Pairs      *prometheus.CounterVec // result: here, peer, refused, late
	Handshakes *prometheus.CounterVec // failures before a request; stage: limit, proxy, tls, head, route, tsgu, arm
	Ended      *prometheus.CounterVec // reason
	Connect    prometheus.Histogram   // seconds from request to joined legs
	Duration   prometheus.Histogram   // seconds that sessions lasted
}

// NewMetrics makes the handles and registers them with reg; with nil they count for nobody.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	const ns, sub = "rendezvous", "relay"
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: ns, Subsystem: sub, Name: name, Help: help}, labels)
	}
	gauge := func(name, help string) prometheus.Gauge {
		return prometheus.NewGauge(prometheus.GaugeOpts{Namespace: ns, Subsystem: sub, Name: name, Help: help})
	}
	m := &Metrics{
		Sessions:   gauge("sessions", "Sessions whose legs are joined."),
		Capacity:   gauge("max_sessions", "Sessions that this pod takes at most: of it, rendezvous_relay_sessions is the use."),
		Pending:    gauge("pending", "Clients between their request and their session."),
		Splices:    gauge("splices", "Agents' connections handed on to another pod."),
		Bytes:      counter("bytes_total", "RDP bytes carried, by direction.", "direction"),
		Admissions: counter("admissions_total", "Clients admitted or refused, by transport and refusal code.", "transport", "code"),
		Joins:      counter("joins_total", "Join requests of agents.", "result"),
		Pairs:      counter("pairs_total", "Channels of MS-TSGU's legacy form: IN channels whose OUT channel was found here or at a peer, or that were refused; OUT channels whose IN channel came too late.", "result"),
		Handshakes: counter("handshake_failures_total", "Connections that ended before a request was understood, by stage.", "stage"),
		Ended:      counter("sessions_ended_total", "Sessions that ended, by reason.", "reason"),
		Connect: prometheus.NewHistogram(prometheus.HistogramOpts{Namespace: ns, Subsystem: sub, Name: "connect_seconds",
			Help: "Time from a client's request to its joined legs.", Buckets: []float64{.01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30}}),
		Duration: prometheus.NewHistogram(prometheus.HistogramOpts{Namespace: ns, Subsystem: sub, Name: "session_seconds",
			Help: "How long sessions lasted.", Buckets: []float64{1, 10, 60, 600, 3600, 4 * 3600, 12 * 3600, 48 * 3600}}),
	}
	if reg != nil {
		reg.MustRegister(m.Sessions, m.Capacity, m.Pending, m.Splices, m.Bytes, m.Admissions, m.Joins, m.Pairs, m.Handshakes, m.Ended, m.Connect, m.Duration)
	}
	return m
}

func (m *Metrics) handshakeFailed(stage string) { m.Handshakes.WithLabelValues(stage).Inc() }

// observe records a duration with the activity id as exemplar.
func observe(h prometheus.Histogram, d time.Duration, activity string) {
	h.(prometheus.ExemplarObserver).ObserveWithExemplar(d.Seconds(), prometheus.Labels{"activity": activity})
}
