package tepd

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/dstm-project/dstm/dataplane"
	"github.com/dstm-project/dstm/lease/replica"
)

// metrics are off when nothing is registered: counting into an unregistered collector costs nothing that matters.
type metrics struct {
	states       *prometheus.GaugeVec
	streams      prometheus.Counter
	questions    *prometheus.CounterVec // by answer: quiet, session, failed
	applySeconds prometheus.Histogram
	applied      prometheus.Gauge
	bindings     prometheus.Gauge
	announced    prometheus.Gauge
	refused      prometheus.Gauge
	capped       prometheus.Gauge
}

func newMetrics(r prometheus.Registerer, path dataplane.Gateway) *metrics {
	gauge := func(name, help string) prometheus.Gauge {
		return prometheus.NewGauge(prometheus.GaugeOpts{Name: name, Help: help})
	}
	m := &metrics{
		states: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "dstm_tepd_health", Help: "1 for the state of health that the gateway is in, 0 for the others.",
		}, []string{"state"}),
		streams: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "dstm_tepd_sync_ended_total", Help: "Streams to the lease service that ended or could not be opened.",
		}),
		questions: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "dstm_tepd_questions_total", Help: "Questions to other gateways while the lease service was silent, by what they answered.",
		}, []string{"answer"}),
		applySeconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "dstm_tepd_apply_seconds", Help: "Time from a change to the packet path holding it.",
			Buckets: []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5},
		}),
		applied:   gauge("dstm_tepd_applied_rev", "Store revision up to which the packet path holds every record."),
		bindings:  gauge("dstm_tepd_bindings", "Leases that the gateway holds."),
		announced: gauge("dstm_tepd_announced_routes", "Routes that the speaker announces."),
		refused:   gauge("dstm_tepd_refused_routes", "Pools and addresses that are wholly or partly outside of allow_advertise."),
		capped:    gauge("dstm_tepd_capped_host_routes", "Leases without a route of their own because there are more than max_host_routes; 0 = none."),
	}
	if r != nil {
		r.MustRegister(m.states, m.streams, m.questions, m.applySeconds, m.applied, m.bindings, m.announced, m.refused, m.capped,
			newPathCollector(path))
	}
	m.health(Down)
	return m
}

func (m *metrics) health(h Health) {
	for i, name := range healthNames {
		v := 0.0
		if Health(i) == h {
			v = 1
		}
		m.states.WithLabelValues(name).Set(v)
	}
}

func (m *metrics) sync(s replica.Status) {
	m.applied.Set(float64(s.Applied))
	m.bindings.Set(float64(s.Bindings))
}

// pathCollector reads the packet path's counters when they are asked for.
type pathCollector struct {
	path                            dataplane.Gateway
	packets, bytes, consumed, drops *prometheus.Desc
}

func newPathCollector(path dataplane.Gateway) *pathCollector {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc(name, help, append([]string{"direction"}, labels...), nil)
	}
	return &pathCollector{
		path:     path,
		packets:  desc("dstm_tepd_packets_total", "Packets by direction (up = host to IPv4) and way (rx, tx).", "way"),
		bytes:    desc("dstm_tepd_bytes_total", "Bytes by direction and way.", "way"),
		consumed: desc("dstm_tepd_consumed_packets_total", "Packets handed to the kernel or the daemon on purpose."),
		drops:    desc("dstm_tepd_dropped_packets_total", "Packets dropped, by reason.", "reason"),
	}
}

// Describe implements prometheus.Collector.
func (c *pathCollector) Describe(ch chan<- *prometheus.Desc) {
	ch <- c.packets
	ch <- c.bytes
	ch <- c.consumed
	ch <- c.drops
}

// Collect implements prometheus.Collector.
func (c *pathCollector) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	n, err := c.path.Counters(ctx)
	if err != nil {
		ch <- prometheus.NewInvalidMetric(c.packets, err)
		return
	}
	for _, d := range []struct {
		name string
		dataplane.Direction
	}{{"up", n.Up}, {"down", n.Down}} {
		counter := func(desc *prometheus.Desc, v uint64, labels ...string) {
			ch <- prometheus.MustNewConstMetric(desc, prometheus.CounterValue, float64(v), append([]string{d.name}, labels...)...)
		}
		counter(c.packets, d.Rx, "rx")
		counter(c.packets, d.Tx, "tx")
		counter(c.bytes, d.RxBytes, "rx")
		counter(c.bytes, d.TxBytes, "tx")
		counter(c.consumed, d.Consumed)
		for reason, v := range d.Drops {
			counter(c.drops, v, reason.String())
		}
	}
}
