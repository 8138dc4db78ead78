package policy

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// TestDocumentedMetrics compares the table of docs/policy-plugins.md with the metrics.
func TestDocumentedMetrics(t *testing.T) {
	b, err := os.ReadFile("../../docs/policy-plugins.md")
	if err != nil {
		t.Fatal(err)
	}
	doc := map[string]string{}
	for _, m := range regexp.MustCompile("(?m)^\\| `(dstm_policy_[a-z_]+)` \\| (.*) \\|$").FindAllStringSubmatch(string(b), -1) {
		doc[m[1]] = m[2]
	}
	r := prometheus.NewRegistry()
	m := newMetrics(r, nil)
	p := m.of("a")
	results := map[string][]string{}
	for _, v := range []result{allowed, allowedDespite, deniedByRule, deniedByQuota, deniedByPlugin, deniedByFailure, canceled} {
		m.decided(v, time.Millisecond)
		results["dstm_policy_decisions_total"] = append(results["dstm_policy_decisions_total"], string(v))
	}
	for _, v := range []outcome{outAllowed, outDenied, outTimeout, outInvalid, outError, outDown, outOpen, outBusy, outCanceled} {
		p.called(v, time.Millisecond)
		results["dstm_policy_plugin_calls_total"] = append(results["dstm_policy_plugin_calls_total"], string(v))
	}
	p.restarted()
	p.breaker(closed)
	p.up(true)
	m.evicted()
	all, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range all {
		text, ok := doc[f.GetName()]
		if !ok {
			t.Errorf("%s is not in the table", f.GetName())
		}
		delete(doc, f.GetName())
		for _, l := range f.GetMetric()[0].GetLabel() {
			if !strings.Contains(text, "`"+l.GetName()+"`") {
				t.Errorf("%s: label %s is not in the table", f.GetName(), l.GetName())
			}
		}
		if want := results[f.GetName()]; want != nil {
			_, list, _ := strings.Cut(text, "`result`: ")
			list = regexp.MustCompile(` \([^)]*\)`).ReplaceAllString(list, "")
			if got := strings.Split(list, ", "); !slices.Equal(got, want) {
				t.Errorf("%s: results %v, the table has %v", f.GetName(), want, got)
			}
		}
	}
	for name := range doc {
		t.Errorf("%s is in the table and no metric", name)
	}
}
