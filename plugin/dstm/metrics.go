package dstm

import (
	"github.com/coredns/coredns/plugin"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/dstm-project/dstm/internal/tlsid"
)

// queryResult is what became of an address query of a registered host.
type queryResult uint8

const (
	queryLeased   queryResult = iota // holds a lease: nothing to do
	queryQuiet                       // refused or without success a moment ago
	queryOff                         // hints are switched off, or no address is free
	queryDenied                      // name on the deny-list
	queryNotOnly                     // not IPv4-only
	queryOnly                        // IPv4-only
	queryBusy                        // a hint is under way and the answer is not held for it
	queryOverload                    // max_held reached
	queryResults
)

// hintResult is what became of a hint.
type hintResult uint8

const (
	hintReady   hintResult = iota // the host's path is up
	hintPending                   // not in time
	hintRefused
	hintFailed // the lease service was not reached
	hintResults
)

// Labels in the order of the constants.
var (
	queryLabels = [queryResults]string{"leased", "quiet", "off", "denied", "not_ipv4_only", "ipv4_only", "busy", "overload"}
	hintLabels  = [hintResults]string{"ready", "pending", "refused", "error"}
)

// metrics are shared by all server blocks and outlive reloads.
type metrics struct {
	queries       [queryResults]prometheus.Counter
	hints         [hintResults]prometheus.Counter
	held          prometheus.Gauge
	hold          prometheus.Histogram
	hosts         prometheus.Gauge
	watchUp       prometheus.Gauge
	watchFailures prometheus.Counter
	tls           *tlsid.Metrics
}

// newMetrics registers the metrics with reg; nil registers nothing.
func newMetrics(reg prometheus.Registerer) *metrics {
	opts := func(n, help string) prometheus.Opts {
		return prometheus.Opts{Namespace: plugin.Namespace, Subsystem: name, Name: n, Help: help}
	}
	queries := prometheus.NewCounterVec(prometheus.CounterOpts(opts("queries_total", "Address queries of registered hosts, by what became of them.")), []string{"result"})
	hints := prometheus.NewCounterVec(prometheus.CounterOpts(opts("hints_total", "Hints sent to the lease service, by result.")), []string{"result"})
	m := &metrics{
		held:          prometheus.NewGauge(prometheus.GaugeOpts(opts("held_queries", "Queries whose answer is held at this moment."))),
		hosts:         prometheus.NewGauge(prometheus.GaugeOpts(opts("hosts", "Source addresses of registered hosts."))),
		watchUp:       prometheus.NewGauge(prometheus.GaugeOpts(opts("watches_in_sync", "Lease services whose list of hosts is up to date."))),
		watchFailures: prometheus.NewCounter(prometheus.CounterOpts(opts("watch_failures_total", "Times that the list of hosts was lost or not to be had."))),
		hold: prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: plugin.Namespace, Subsystem: name, Name: "hold_seconds", Help: "How long answers were held.",
			Buckets: []float64{.001, .002, .005, .01, .02, .05, .1, .25, .5, 1},
		}),
		tls: tlsid.NewMetrics(plugin.Namespace + "_" + name),
	}
	for i := range m.queries {
		m.queries[i] = queries.WithLabelValues(queryLabels[i])
	}
	for i := range m.hints {
		m.hints[i] = hints.WithLabelValues(hintLabels[i])
	}
	if reg != nil {
		reg.MustRegister(queries, hints, m.held, m.hosts, m.watchUp, m.watchFailures, m.hold, m.tls)
	}
	return m
}

func (m *metrics) query(r queryResult) { m.queries[r].Inc() }
func (m *metrics) hint(r hintResult)   { m.hints[r].Inc() }
