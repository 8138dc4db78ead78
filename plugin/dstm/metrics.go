package dstm

import (
	"github.com/coredns/coredns/plugin"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

// The metrics live in the default registry, where CoreDNS's prometheus plugin looks for them.
var (
	hintsTotal = promauto.NewCounterVec(prometheus.CounterOpts{
		Namespace: plugin.Namespace, Subsystem: pluginName, Name: "hints_total",
		Help: "Hints sent to the lease service, by result: ready, pending, refused, timeout or error.",
	}, []string{"result"})
	hintSeconds = promauto.NewHistogram(prometheus.HistogramOpts{
		Namespace: plugin.Namespace, Subsystem: pluginName, Name: "hint_duration_seconds",
		Help:    "Time from a hint to its answer.",
		Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1},
	})
	lookupsTotal = promauto.NewCounterVec(prometheus.CounterOpts{
		Namespace: plugin.Namespace, Subsystem: pluginName, Name: "lookups_total",
		Help: "Own look-ups of the other address family, by type asked for.",
	}, []string{"type"})
	holdSeconds = promauto.NewHistogramVec(prometheus.HistogramOpts{
		Namespace: plugin.Namespace, Subsystem: pluginName, Name: "hold_duration_seconds",
		Help:    "Time that answers were held back.",
		Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1},
	}, []string{"server"})
	unheldTotal = promauto.NewCounterVec(prometheus.CounterOpts{
		Namespace: plugin.Namespace, Subsystem: pluginName, Name: "hold_overflow_total",
		Help: "Answers given at once and without a hint because max_held queries were worked on already.",
	}, []string{"server"})
	heldNow = promauto.NewGauge(prometheus.GaugeOpts{
		Namespace: plugin.Namespace, Subsystem: pluginName, Name: "held_queries",
		Help: "Queries worked on now: look-up or hint under way.",
	})
	hostsKnown = promauto.NewGauge(prometheus.GaugeOpts{
		Namespace: plugin.Namespace, Subsystem: pluginName, Name: "host_sources",
		Help: "Source addresses of registered hosts in the local tables.",
	})
	inSync = promauto.NewGauge(prometheus.GaugeOpts{
		Namespace: plugin.Namespace, Subsystem: pluginName, Name: "tables_in_sync",
		Help: "Host tables that follow their lease service now; one for each distinct configuration.",
	})
	watchFailures = promauto.NewCounter(prometheus.CounterOpts{
		Namespace: plugin.Namespace, Subsystem: pluginName, Name: "watch_failures_total",
		Help: "Host streams that ended or could not be opened.",
	})
)
