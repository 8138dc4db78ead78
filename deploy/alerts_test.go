// Package deploy has no code: its test looks after the files beside it.
package deploy

import (
	"crypto/tls"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/dstm-project/dstm/internal/daemon"
	"github.com/dstm-project/dstm/internal/pki"
	"github.com/dstm-project/dstm/internal/tlsid"
	"github.com/dstm-project/dstm/leasesvc"
	"github.com/dstm-project/dstm/leasesvc/store/boltstore"
)

func promtool(t *testing.T, args ...string) (string, error) {
	t.Helper()
	path, err := exec.LookPath("promtool")
	if err != nil {
		const hint = "no promtool: install it with `hack/deps test`, then go test ./deploy/"
		if os.Getenv("DSTM_TEST_ROOT") == "1" {
			t.Fatal(hint)
		}
		t.Skip(hint)
	}
	out, err := exec.Command(path, args...).CombinedOutput()
	return string(out), err
}

// TestAlerts: Prometheus takes the rules, and they fire and keep quiet as testdata says.
func TestAlerts(t *testing.T) {
	if out, err := promtool(t, "check", "rules", "alerts.yaml"); err != nil {
		t.Errorf("promtool check rules: %v\n%s", err, out)
	}
	if out, err := promtool(t, "test", "rules", "testdata/alerts_test.yaml"); err != nil {
		t.Errorf("promtool test rules: %v\n%s", err, out)
	}
}

// TestAlertsAreTested: a change of any threshold of alerts.yaml is noticed.
func TestAlertsAreTested(t *testing.T) {
	rules, err := os.ReadFile("alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	tests, err := os.ReadFile("testdata/alerts_test.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for old, planted := range map[string]string{
		`>= 0.75`:             `>= 0.77`,
		`>= 0.85`:             `>= 0.87`,
		`>= 0.95`:             `>= 0.97`,
		`FREE|RESERVED`:       `FREE`,
		`{result="POOL_DRY"}`: ``,
		`dstm_leasesvc_teps{state="serving"} == 0`:                             `dstm_leasesvc_teps{state="live"} == 2`,
		`state="live"} - ignoring (state) dstm_leasesvc_teps{state="serving"}`: `state="member"} - ignoring (state) dstm_leasesvc_teps{state="serving"}`,
		`state="member"} - ignoring (state) dstm_leasesvc_teps{state="live"}`:  `state="member"} - ignoring (state) dstm_leasesvc_teps{state="serving"}`,
		`increase(dstm_leasesvc_digest_mismatches_total[15m]) > 0`:             `dstm_leasesvc_digest_mismatches_total > 0`,
		`< 14 * 86400`: `< 13 * 86400`,
		`dstm_hostd_tls_certificate_end_timestamp_seconds > 0`:  `dstm_hostd_tls_certificate_end_timestamp_seconds`,
		`dstm_leasesvc_tls_list_due_timestamp_seconds < time()`: `dstm_leasesvc_tls_list_due_timestamp_seconds < time() - 7200`,
		`>= 2`:                                `>= 1`,
		` or absent(up{job="dstm-leasesvc"})`: ``,
	} {
		dir := t.TempDir()
		changed := strings.Replace(string(rules), old, planted, 1)
		if changed == string(rules) {
			t.Errorf("%s is not in alerts.yaml", old)
			continue
		}
		for name, text := range map[string]string{"alerts.yaml": changed, "testdata/alerts_test.yaml": string(tests)} {
			path := filepath.Join(dir, name)
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := promtool(t, "test", "rules", filepath.Join(dir, "testdata/alerts_test.yaml")); err == nil {
			t.Errorf("%s instead of %s is not noticed", planted, old)
		}
	}
}

// TestAlertsDocumented: docs/capacity.md names the alerts, in their order, and no other.
func TestAlertsDocumented(t *testing.T) {
	names := func(path, pattern string) []string {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		var out []string
		for _, m := range regexp.MustCompile(pattern).FindAllStringSubmatch(string(b), -1) {
			out = append(out, m[1])
		}
		return out
	}
	alerts, docs := names("alerts.yaml", `(?m)- alert: (\w+)$`), names("../docs/capacity.md", `(?m)^\| (DSTM\w+) \|`)
	if len(alerts) == 0 || !slices.Equal(alerts, docs) {
		t.Errorf("alerts %v\ndocumented %v", alerts, docs)
	}
}

// TestAlertMetrics: every series that a rule asks for is one that a real lease service registers, or the scraper's own, or
// recorded by another rule.
func TestAlertMetrics(t *testing.T) {
	known := map[string]bool{"up": true}
	for _, name := range registered(t) {
		known[name] = true
	}
	var file struct {
		Groups []struct {
			Rules []struct{ Record, Alert, Expr string }
		}
	}
	b, err := os.ReadFile("alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal(b, &file); err != nil {
		t.Fatal(err)
	}
	series := regexp.MustCompile(`\b(up|process_\w+|dstm[\w:]+)\b(?:[\[{ ]|$)`)
	seen := map[string]bool{}
	for _, g := range file.Groups {
		for _, r := range g.Rules {
			if r.Record != "" {
				known[r.Record] = true
			}
			for _, m := range series.FindAllStringSubmatch(r.Expr, -1) {
				if seen[m[1]] = true; !known[m[1]] {
					t.Errorf("%s%s asks for %s, which nobody makes", r.Record, r.Alert, m[1])
				}
			}
		}
	}
	if len(seen) != 11 {
		t.Errorf("series found: %v, want 11", seen)
	}
}

// registered returns the names of everything that a lease service shows, and of what every daemon shows of its certificate.
func registered(t *testing.T) []string {
	t.Helper()
	cfg, err := leasesvc.LoadConfig("leasesvc.yaml")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "lease.db")
	if err := boltstore.Create(path); err != nil {
		t.Fatal(err)
	}
	st, err := boltstore.Open(boltstore.Options{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	reg := daemon.NewRegistry()
	if _, err := leasesvc.New(t.Context(), cfg, leasesvc.Deps{
		Store: st, Server: &tls.Config{}, Log: slog.New(slog.DiscardHandler), Registry: reg,
	}); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := pki.Init(dir, "example.net", time.Hour); err != nil {
		t.Fatal(err)
	}
	files, err := pki.Issue(dir, dir, tlsid.ID{TrustDomain: "example.net", Cell: "lab", Role: tlsid.RoleTEP, Name: "tep1"}, pki.Options{})
	if err != nil {
		t.Fatal(err)
	}
	id, err := tlsid.Open(files, tlsid.RoleTEP, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	for _, daemon := range []string{"dstm_leasesvc", "dstm_tepd", "dstm_hostd"} {
		id.Register(reg, daemon)
	}
	descs := make(chan *prometheus.Desc)
	go func() {
		reg.Describe(descs)
		close(descs)
	}()
	var names []string
	fq := regexp.MustCompile(`fqName: "([^"]+)"`)
	for d := range descs {
		names = append(names, fq.FindStringSubmatch(d.String())[1])
	}
	return names
}
