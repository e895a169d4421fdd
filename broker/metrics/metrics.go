// Package metrics holds the broker's handles for Prometheus. They are made once and passed in; there is no global registry.
package metrics

import "github.com/prometheus/client_golang/prometheus"

// Metrics of one broker process.
type Metrics struct {
	// Connects by result: "accepted", or the refusal's code.
	Connects *prometheus.CounterVec
	// Entries counts clients that asked an entry gateway where to go, by result: "here", "elsewhere", "retry" (a host is on
	// its way), or the refusal's code.
	Entries *prometheus.CounterVec
	// ConnectSeconds from a gateway's request to the answer, by result "accepted" or "refused".
	ConnectSeconds *prometheus.HistogramVec
	// PlacementSeconds of one decision.
	PlacementSeconds prometheus.Histogram
	// HostTries counts hosts asked for a session, by answer: "accepted", or the refusal's code.
	HostTries *prometheus.CounterVec
	// LoginsRefused counts logins by connection that hosts on this broker refused, by reason (bus.LoginReasons).
	LoginsRefused *prometheus.CounterVec
	// SessionsEnded counts live sessions that brokers had ended, by cause: "user-revoked", "ticket-revoked", "grant-removed",
	// "resource-removed" or "group-lost".
	SessionsEnded *prometheus.CounterVec
	// SessionActs counts what was asked to be done to sessions, by act ("end", "disconnect", "message") and result: "done", or
	// the refusal's code.
	SessionActs *prometheus.CounterVec
	// Feed counts answers of the HTTPS API by path and code.
	Feed *prometheus.CounterVec
	// GroupsUnread counts requests with a token whose groups are none, or not all, by reason: "absent", "elsewhere" or
	// "unreadable".
	GroupsUnread *prometheus.CounterVec
	// Enrolments by kind ("pool", "host", "renewal") and result.
	Enrolments *prometheus.CounterVec
	// StrangersEnded counts connections that ended before anybody had vouched for them, by listener ("bus", "feed", "sessions" or
	// "metrics") and reason (door.EndedLimit and the like).
	StrangersEnded *prometheus.CounterVec
	// Writes to the API server by object and result.
	Writes *prometheus.CounterVec
}

// New makes the handles and registers them; with a nil registry they work and show nowhere.
func New(reg prometheus.Registerer) *Metrics {
	m := &Metrics{
		Connects:         counter("connects_total", "Connect requests answered.", "result"),
		Entries:          counter("entries_total", "Clients that asked a gateway which gateway is to serve them.", "result"),
		ConnectSeconds:   prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "rendezvous_broker_connect_seconds", Help: "Time to answer a connect request.", Buckets: []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30}}, []string{"result"}),
		PlacementSeconds: prometheus.NewHistogram(prometheus.HistogramOpts{Name: "rendezvous_broker_placement_seconds", Help: "Time to find the host to ask.", Buckets: []float64{.00001, .0001, .001, .0025, .005, .01, .05, .25}}),
		HostTries:        counter("host_tries_total", "Session hosts asked for a session.", "result"),
		LoginsRefused:    counter("logins_refused_total", "Logins that session hosts refused because they were not the session's own.", "reason"),
		SessionsEnded:    counter("sessions_ended_total", "Live sessions ended because access was taken back.", "cause"),
		SessionActs:      counter("session_acts_total", "What users and administrators asked to be done to sessions.", "act", "result"),
		Feed:             counter("http_requests_total", "Requests to the feed and enrolment API.", "path", "code"),
		GroupsUnread:     counter("groups_unread_total", "Requests with a token from which groups could not be read.", "reason"),
		Enrolments:       counter("enrolments_total", "Certificates asked for by session hosts.", "kind", "result"),
		StrangersEnded:   counter("strangers_ended_total", "Connections that ended before anybody vouched for them: too many at once, nothing said, or a PROXY protocol header that can't be read.", "listener", "reason"),
		Writes:           counter("writes_total", "Writes to the Kubernetes API.", "object", "result"),
	}
	if reg != nil {
		reg.MustRegister(m.Connects, m.Entries, m.ConnectSeconds, m.PlacementSeconds, m.HostTries, m.LoginsRefused, m.SessionsEnded, m.SessionActs, m.Feed, m.GroupsUnread, m.Enrolments, m.StrangersEnded, m.Writes)
	}
	return m
}

func counter(name, help string, labels ...string) *prometheus.CounterVec {
	return prometheus.NewCounterVec(prometheus.CounterOpts{Name: "rendezvous_broker_" + name, Help: help}, labels)
}

// Gauge registers a gauge that is asked when it is read.
func Gauge(reg prometheus.Registerer, name, help string, value func() float64) {
	reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "rendezvous_broker_" + name, Help: help}, value))
}
