package tlsid

import (
	"crypto/tls"
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Metrics count what connections and lists of one daemon come to. A nil one counts nothing.
type Metrics struct {
	lists      *prometheus.CounterVec // pushed, by result
	handshakes *prometheus.CounterVec // by result
	closed     prometheus.Counter
}

// NewMetrics returns metrics whose names begin with a namespace and "_tls_".
func NewMetrics(namespace string) *Metrics {
	ns := namespace + "_tls_"
	m := &Metrics{
		lists: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: ns + "pushed_lists_total",
			Help: "Revocation lists that the lease service sent, by result: applied, known, older, signature, garbage, large.",
		}, []string{"result"}),
		handshakes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: ns + "handshakes_total", Help: "TLS handshakes by result: full, resumed, failed.",
		}, []string{"result"}),
		closed: prometheus.NewCounter(prometheus.CounterOpts{
			Name: ns + "revoked_connections_total", Help: "Connections closed because the other side's certificate was taken back.",
		}),
	}
	for _, r := range []string{"full", "resumed", "failed"} {
		m.handshakes.WithLabelValues(r)
	}
	for _, r := range []string{resultApplied, resultKnown, resultOlder, resultSignature, resultGarbage, resultLarge} {
		m.lists.WithLabelValues(r) // an alert looks for increases, and a series that begins above 0 has none
	}
	return m
}

// The results of a pushed list.
const (
	resultApplied   = "applied"
	resultKnown     = "known" // in force already
	resultOlder     = "older"
	resultSignature = "signature"
	resultGarbage   = "garbage"
	resultLarge     = "large"
)

// Describe implements prometheus.Collector.
func (m *Metrics) Describe(ch chan<- *prometheus.Desc) {
	m.lists.Describe(ch)
	m.handshakes.Describe(ch)
	m.closed.Describe(ch)
}

// Collect implements prometheus.Collector.
func (m *Metrics) Collect(ch chan<- prometheus.Metric) {
	m.lists.Collect(ch)
	m.handshakes.Collect(ch)
	m.closed.Collect(ch)
}

func (m *Metrics) list(applied bool, err error) {
	if m == nil {
		return
	}
	result := resultGarbage
	switch {
	case applied:
		result = resultApplied
	case err == nil:
		result = resultKnown
	case errors.Is(err, ErrListOlder):
		result = resultOlder
	case errors.Is(err, ErrListSignature):
		result = resultSignature
	case errors.Is(err, ErrListLarge):
		result = resultLarge
	}
	m.lists.WithLabelValues(result).Inc()
}

func (m *Metrics) handshake(cs tls.ConnectionState, err error) {
	if m == nil {
		return
	}
	result := "full"
	switch {
	case err != nil:
		result = "failed"
	case cs.DidResume:
		result = "resumed"
	}
	m.handshakes.WithLabelValues(result).Inc()
}

func (m *Metrics) revoked(n int) {
	if m != nil {
		m.closed.Add(float64(n))
	}
}

// Count makes a source count in m from now on.
func (s *Source) Count(m *Metrics) { s.m.Store(m) }

// Register registers metrics of this source, which is the only one of its program: those of NewMetrics, and when its
// certificate ends and its list is due. It counts in them from now on. A nil registry does nothing.
func (s *Source) Register(r prometheus.Registerer, namespace string) {
	if r == nil {
		return
	}
	m := NewMetrics(namespace)
	at := func(name, help string, f func(*material) time.Time) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: namespace + "_tls_" + name, Help: help}, func() float64 {
			if t := f(s.cur.Load()); !t.IsZero() {
				return float64(t.Unix())
			}
			return 0
		})
	}
	r.MustRegister(m,
		at("certificate_end_timestamp_seconds", "When the program's own certificate ends; 0 = it has none.", func(m *material) time.Time {
			if m.cert.Leaf == nil {
				return time.Time{}
			}
			return m.cert.Leaf.NotAfter
		}),
		at("list_due_timestamp_seconds", "When the first of the revocation lists is due again; 0 = there is none.", (*material).due),
	)
	s.Count(m)
}
