package leasesvc

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/dstm-project/dstm/lease"
)

// metrics of the service. With a nil registerer they count and nobody sees it.
type metrics struct {
	binds     *prometheus.CounterVec // by result: granted, renewed, or the reason of the refusal
	ended     *prometheus.CounterVec // by reason
	hints     *prometheus.CounterVec // by state
	refused   *prometheus.CounterVec // calls refused before they reached the leases, by cause
	commits   prometheus.Counter
	addresses *prometheus.GaugeVec // by pool and state
	attended  prometheus.Gauge
	teps      *prometheus.GaugeVec // by state: member, live, serving
	digests   prometheus.Counter
}

func newMetrics(r prometheus.Registerer) *metrics {
	const ns = "dstm_leasesvc"
	m := &metrics{
		binds: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: ns + "_binds_total", Help: "Bind and Renew calls by result.",
		}, []string{"result"}),
		ended: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: ns + "_leases_ended_total", Help: "Leases that ended, by reason.",
		}, []string{"reason"}),
		hints: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: ns + "_hints_total", Help: "Hint calls by the state they were answered with.",
		}, []string{"state"}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: ns + "_refused_total", Help: "Calls and reported addresses refused before they reached the leases, by cause.",
		}, []string{"cause"}),
		commits: prometheus.NewCounter(prometheus.CounterOpts{
			Name: ns + "_commits_total", Help: "Events of addresses that were committed to the store.",
		}),
		addresses: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: ns + "_addresses", Help: "Addresses by pool and state.",
		}, []string{"pool", "state"}),
		attended: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: ns + "_attended_hosts", Help: "Hosts with a live Attend stream.",
		}),
		teps: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: ns + "_teps", Help: "Gateways of the fence set by state.",
		}, []string{"state"}),
		digests: prometheus.NewCounter(prometheus.CounterOpts{
			Name: ns + "_digest_mismatches_total", Help: "Heartbeats whose digest was not the service's.",
		}),
	}
	// An alert looks for increases, and a series that begins above 0 has none.
	m.binds.WithLabelValues(lease.ReasonPoolDry.String())
	if r != nil {
		r.MustRegister(m.binds, m.ended, m.hints, m.refused, m.commits, m.digests)
	}
	return m
}

// state are the metrics that say how things are, taken when somebody asks.
type state struct{ s *Server }

func (c state) parts() []prometheus.Collector {
	return []prometheus.Collector{c.s.m.addresses, c.s.m.attended, c.s.m.teps}
}

// Describe implements prometheus.Collector.
func (c state) Describe(ch chan<- *prometheus.Desc) {
	for _, p := range c.parts() {
		p.Describe(ch)
	}
}

// Collect implements prometheus.Collector.
func (c state) Collect(ch chan<- prometheus.Metric) {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	c.s.m.observe(c.s.cores, c.s.hosts.attended(), c.s.fence.Status(c.s.now().Mono))
	for _, p := range c.parts() {
		p.Collect(ch)
	}
}

func (m *metrics) observe(cores []*lease.Core, attended int, teps []lease.TEPStatus) {
	for _, c := range cores {
		st := c.Stats()
		for s, n := range map[lease.State]int{
			lease.Free: st.Free, lease.Reserved: st.Reserved, lease.Bound: st.Bound, lease.Revoking: st.Revoking,
			lease.Hold: st.Hold, lease.Conflict: st.Conflict,
		} {
			m.addresses.WithLabelValues(c.Pool().Name, s.String()).Set(float64(n))
		}
		m.addresses.WithLabelValues(c.Pool().Name, "CUT").Set(float64(st.Cut)) // leased by port sets
	}
	m.attended.Set(float64(attended))
	var live, serving int
	for _, t := range teps {
		if t.Live {
			live++
		}
		if t.Serving {
			serving++
		}
	}
	m.teps.WithLabelValues("member").Set(float64(len(teps)))
	m.teps.WithLabelValues("live").Set(float64(live))
	m.teps.WithLabelValues("serving").Set(float64(serving))
}
