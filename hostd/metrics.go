package hostd

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/dstm-project/dstm/dataplane"
	"github.com/dstm-project/dstm/leasesvc/leaseclient"
)

// metrics are off when nothing is registered: counting into an unregistered collector costs nothing that matters.
type metrics struct {
	triggers *prometheus.CounterVec
	calls    *prometheus.CounterVec
	seconds  *prometheus.HistogramVec
	packets  *prometheus.CounterVec
	states   *prometheus.GaugeVec
	attend   prometheus.Gauge
}

func newMetrics(r prometheus.Registerer, path dataplane.Host) *metrics {
	m := &metrics{
		triggers: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "dstm_triggers_total",
			Help: "What could have asked for a lease; causes packet, dns and manual do ask.",
		}, []string{"cause"}),
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "dstm_hostd_calls_total",
			Help: "Calls to the lease service by kind (bind, renew, release) and result (ok, error, or the reason of a refusal).",
		}, []string{"call", "result"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "dstm_hostd_call_seconds",
			Help:    "Duration of calls to the lease service.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5},
		}, []string{"call"}),
		packets: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "dstm_hostd_held_packets_total",
			Help: "Packets that waited for a lease, by what became of them (sent, dropped).",
		}, []string{"result"}),
		states: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "dstm_hostd_state",
			Help: "1 for the state that the lease keeper is in, 0 for the others.",
		}, []string{"state"}),
		attend: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "dstm_hostd_attended",
			Help: "1 while the host is registered at the lease service.",
		}),
	}
	if r != nil {
		r.MustRegister(m.triggers, m.calls, m.seconds, m.packets, m.states, m.attend, newPathCollector(path))
	}
	for c := range causeNames {
		m.triggers.WithLabelValues(Cause(c).String())
	}
	m.state(StateIdle)
	return m
}

func (m *metrics) trigger(c Cause) { m.triggers.WithLabelValues(c.String()).Inc() }

func (m *metrics) heldPackets(result string, n int) {
	m.packets.WithLabelValues(result).Add(float64(n))
}

func (m *metrics) call(kind string, err error, d time.Duration) {
	result := "ok"
	if err != nil {
		result = "error"
		if r := leaseclient.ReasonOf(err); r != 0 {
			result = r.String()
		}
	}
	m.calls.WithLabelValues(kind, result).Inc()
	m.seconds.WithLabelValues(kind).Observe(d.Seconds())
}

func (m *metrics) state(s State) {
	for i, name := range stateNames {
		v := 0.0
		if State(i) == s {
			v = 1
		}
		m.states.WithLabelValues(name).Set(v)
	}
}

func (m *metrics) attended(yes bool) {
	v := 0.0
	if yes {
		v = 1
	}
	m.attend.Set(v)
}

// pathCollector reads the packet path's counters when they are asked for. While there is no packet path there are none.
type pathCollector struct {
	path                     dataplane.Host
	packets, consumed, drops *prometheus.Desc
}

func newPathCollector(path dataplane.Host) *pathCollector {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc(name, help, append([]string{"direction"}, labels...), nil)
	}
	return &pathCollector{
		path:     path,
		packets:  desc("dstm_hostd_packets_total", "Packets by direction (up = from this host) and way (rx, tx).", "way"),
		consumed: desc("dstm_hostd_consumed_packets_total", "Packets handed to the kernel or the daemon on purpose."),
		drops:    desc("dstm_hostd_dropped_packets_total", "Packets dropped, by reason.", "reason"),
	}
}

// Describe implements prometheus.Collector.
func (c *pathCollector) Describe(ch chan<- *prometheus.Desc) {
	ch <- c.packets
	ch <- c.consumed
	ch <- c.drops
}

// Collect implements prometheus.Collector.
func (c *pathCollector) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	n, err := c.path.Counters(ctx)
	if err != nil {
		return
	}
	for name, d := range map[string]dataplane.Direction{"up": n.Up, "down": n.Down} {
		counter := func(desc *prometheus.Desc, v uint64, labels ...string) {
			ch <- prometheus.MustNewConstMetric(desc, prometheus.CounterValue, float64(v), append([]string{name}, labels...)...)
		}
		counter(c.packets, d.Rx, "rx")
		counter(c.packets, d.Tx, "tx")
		counter(c.consumed, d.Consumed)
		for reason, v := range d.Drops {
			counter(c.drops, v, reason.String())
		}
	}
}
