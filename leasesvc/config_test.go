package leasesvc_test

import (
	"os"
	"strings"
	"testing"
	"time"

	"github.com/dstm-project/dstm/leasesvc"
)

func TestReferenceConfig(t *testing.T) {
	if _, err := leasesvc.LoadConfig("../deploy/leasesvc.yaml"); err != nil {
		t.Error(err)
	}
}

// TestReferencePolicy reads what the reference shows of policies in comments.
func TestReferencePolicy(t *testing.T) {
	b, err := os.ReadFile("../deploy/leasesvc.yaml")
	if err != nil {
		t.Fatal(err)
	}
	head, rest, _ := strings.Cut(string(b), "\npolicy:")
	section, tail, found := strings.Cut(rest, "\nadmin:")
	if !found {
		t.Fatal("no section policy before admin")
	}
	section = strings.ReplaceAll(section, "\n  # ", "\n  ")
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	section = strings.Replace(section, "/usr/local/lib/dstm/policy-webhook", program, 1)
	c, err := leasesvc.ParseConfig("leasesvc.yaml", []byte(head+"\npolicy:"+section+"\nadmin:"+tail))
	if err != nil {
		t.Fatal(err)
	}
	if p := c.Policy; len(p.Rules) != 1 || len(p.Plugins) != 1 || p.Quotas.Per64.Binds != 300 || p.Budget != 50*time.Millisecond {
		t.Errorf("policy %+v", p)
	}
}

// TestPolicyDefaults: keys that a section leaves out keep their defaults.
func TestPolicyDefaults(t *testing.T) {
	b, err := os.ReadFile("../deploy/leasesvc.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, section := range []string{"policy: {quotas: {per_host: {binds: 3, window: 1m}}}\n", "policy: {}\n", ""} {
		head, rest, _ := strings.Cut(string(b), "policy:  ")
		_, tail, _ := strings.Cut(rest, "\nadmin:")
		c, err := leasesvc.ParseConfig("leasesvc.yaml", []byte(head+section+"admin:"+tail))
		if err != nil {
			t.Fatalf("%q: %v", section, err)
		}
		if p := c.Policy; p.Budget != 50*time.Millisecond || p.Dir != "/run/dstm-leasesvc" {
			t.Errorf("%q: budget %s, dir %s", section, p.Budget, p.Dir)
		}
	}
}

// TestConfigErrors changes one thing of the reference at a time.
func TestConfigErrors(t *testing.T) {
	b, err := os.ReadFile("../deploy/leasesvc.yaml")
	if err != nil {
		t.Fatal(err)
	}
	good := string(b)
	for _, c := range []struct{ name, from, to, want string }{
		{"unknown key", "cell: lab", "cel: lab", `unknown key "cel" (did you mean "cell"?)`},
		{"listen", `"[2001:db8:2::10]:3545" `, `somewhere `, `"somewhere" is not an address and port`},
		{"empty pool list", good[strings.Index(good, "  - name: main"):strings.Index(good, "teps:")], "  []\n\n", "pools is empty: want at least one pool"},
		{"all addresses excluded", "198.51.100.0/24 ", "198.51.100.0/32\n    #", "every address of 198.51.100.0/32 is excluded"},
		{"pool with host bits", "198.51.100.0/24 ", "198.51.100.1/24 ", "prefix 198.51.100.1/24 has host bits: want 198.51.100.0/24"},
		{"pool of IPv6", "198.51.100.0/24 ", `"2001:db8::/64" `, "prefix 2001:db8::/64: want an IPv4 prefix of /12 to /32"},
		{"exclude outside", "exclude: [198.51.100.0,", "exclude: [192.0.2.1,", "excluded address 192.0.2.1 is outside of 198.51.100.0/24"},
		{"tep address", `tep_address: "2001:db8:a::1"`, "tep_address: 192.0.2.1", "tep_address is not set to an IPv6 address"},
		{"no gateway", "teps: [tep1]", "teps: []", "teps is empty"},
		{"timer order", "valid: 15m ", "valid: 1m ", "validity 1m0s is outside 2m0s..24h0m0s"},
		{"bind wait", "bind_wait: 500ms", "bind_wait: 1m", "timer bind_wait 1m0s is outside 0s..5s"},
		{"policy", "budget: 50ms", "budget: 1s", "budget 1s is outside 1ms..500ms"},
		{"policy rule", "budget: 50ms", "rules: [{action: deny, pools: [x]}]", `rule 1: there is no pool "x"`},
		{"admin", `admin: "[::1]:9545"`, `admin: "[2001:db8::1]:9545"`, "want a loopback address"},
		{"store type", "type: bolt", "type: etc", `store type "etc": want bolt or etcd`},
		{"copies too often", "every: 15m", "every: 1ms", "store.copies.every 1ms: want 0s (never) or at least 1s"},
		{"no copies kept", "keep: 8", "keep: 0", "store.copies.keep 0 is outside 1..1000"},
		{"retention", "retention: 4320h", "retention: -1s", "audit.retention -1s: want 0s (for ever) or at least 1s"},
		{"log", "level: info", "level: loud", `log level "loud"`},
	} {
		t.Run(c.name, func(t *testing.T) {
			if !strings.Contains(good, c.from) {
				t.Fatalf("reference has no %q", c.from)
			}
			_, err := leasesvc.ParseConfig("leasesvc.yaml", []byte(strings.Replace(good, c.from, c.to, 1)))
			if !contains(err, c.want) {
				t.Fatalf("error %v, want %q in it", err, c.want)
			}
			if line := err.Error(); !strings.HasPrefix(line, "leasesvc.yaml:") || strings.HasPrefix(line, "leasesvc.yaml: ") {
				t.Errorf("error %q has no position", line)
			}
		})
	}
}
