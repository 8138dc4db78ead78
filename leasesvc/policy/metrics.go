package policy

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// result is how a decision came about; a label of metrics.
type result string

const (
	allowed         result = "allowed"
	allowedDespite  result = "allowed_failure" // a plugin failed, with on_failure: open
	deniedByRule    result = "denied_rule"
	deniedByQuota   result = "denied_quota"
	deniedByPlugin  result = "denied_plugin"
	deniedByFailure result = "denied_failure" // a plugin failed, with on_failure: closed
	canceled        result = "canceled"       // the caller has gone
)

// metrics of all policies. With a nil registerer they count and nobody sees it. Plugins are labels by their configured names.
type metrics struct {
	decisions *prometheus.CounterVec
	seconds   prometheus.Histogram
	evictions prometheus.Counter
	calls     *prometheus.CounterVec
	callTime  *prometheus.HistogramVec
	restarts  *prometheus.CounterVec
	breakers  *prometheus.GaugeVec
	running   *prometheus.GaugeVec
}

// buckets of both histograms, in seconds; the hard limit of a budget is 0.5 s.
func timeBuckets() []float64 {
	return []float64{.00001, .0001, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1}
}

func newMetrics(r prometheus.Registerer, plugins []PluginConfig) *metrics {
	const ns = "dstm_policy"
	m := &metrics{
		decisions: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: ns + "_decisions_total", Help: "Decisions about new leases by result.",
		}, []string{"result"}),
		seconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: ns + "_decision_seconds", Help: "Time to a decision.", Buckets: timeBuckets(),
		}),
		evictions: prometheus.NewCounter(prometheus.CounterOpts{
			Name: ns + "_quota_evictions_total", Help: "Hosts and /64 forgotten before their quota was full again.",
		}),
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: ns + "_plugin_calls_total", Help: "Questions to plugins by result.",
		}, []string{"plugin", "result"}),
		callTime: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: ns + "_plugin_call_seconds", Help: "Time to the answer of a plugin or its failure.", Buckets: timeBuckets(),
		}, []string{"plugin"}),
		restarts: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: ns + "_plugin_restarts_total", Help: "Starts of plugins after the first, good or bad.",
		}, []string{"plugin"}),
		breakers: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: ns + "_plugin_breaker_state", Help: "Circuit breaker of a plugin: 0 closed, 1 half-open, 2 open.",
		}, []string{"plugin"}),
		running: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: ns + "_plugin_up", Help: "Whether a plugin's process runs.",
		}, []string{"plugin"}),
	}
	if r != nil {
		r.MustRegister(m.decisions, m.seconds, m.evictions, m.calls, m.callTime, m.restarts, m.breakers, m.running)
	}
	for _, p := range plugins {
		m.restarts.WithLabelValues(p.Name)
		m.of(p.Name).breaker(closed)
		m.of(p.Name).up(false)
	}
	return m
}

func (m *metrics) decided(why result, took time.Duration) {
	m.decisions.WithLabelValues(string(why)).Inc()
	m.seconds.Observe(took.Seconds())
}

func (m *metrics) evicted() { m.evictions.Inc() }

func (m *metrics) of(plugin string) pluginMetrics { return pluginMetrics{m, plugin} }

// pluginMetrics are the metrics of one plugin.
type pluginMetrics struct {
	m    *metrics
	name string
}

func (p pluginMetrics) called(how outcome, took time.Duration) {
	p.m.calls.WithLabelValues(p.name, string(how)).Inc()
	p.m.callTime.WithLabelValues(p.name).Observe(took.Seconds())
}

func (p pluginMetrics) restarted() { p.m.restarts.WithLabelValues(p.name).Inc() }

func (p pluginMetrics) breaker(s breakerState) { p.m.breakers.WithLabelValues(p.name).Set(float64(s)) }

func (p pluginMetrics) up(yes bool) {
	v := 0.0
	if yes {
		v = 1
	}
	p.m.running.WithLabelValues(p.name).Set(v)
}
