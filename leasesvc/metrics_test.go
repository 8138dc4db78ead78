package leasesvc

import (
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/dstm-project/dstm/lease"
)

func TestMetrics(t *testing.T) {
	r := prometheus.NewRegistry()
	m := newMetrics(r)
	m.binds.WithLabelValues("granted").Inc()
	m.ended.WithLabelValues("idle").Inc()
	m.hints.WithLabelValues("ready").Inc()
	m.refused.WithLabelValues("role").Inc()
	s := &Server{m: m, fence: lease.NewFenceSet(lease.FenceConfig{FailStatic: time.Hour}, 0, 0, lease.Member{TEP: "tep1"})}
	r.MustRegister(state{s})
	problems, err := testutil.GatherAndLint(r)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
	if n, err := testutil.GatherAndCount(r); err != nil || n < 8 {
		t.Errorf("%d series, %v", n, err)
	}
}
