package main

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/dstm-project/dstm/internal/daemon"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc"
	"github.com/dstm-project/dstm/leasesvc/leaseclient"
)

// pools are those of the fake lease service: one whose service started just now, one in use, one that is dry, one that
// went over to port sets, one that was never used, one whose hosts went away.
func pools() []leaseclient.PoolInfo {
	p := func(name, prefix string) lease.Pool {
		return lease.Pool{Name: name, Prefix: netip.MustParsePrefix(prefix), TEP: netip.MustParseAddr("2001:db8:a::1")}
	}
	return []leaseclient.PoolInfo{
		{
			Pool: p("main", "198.51.100.0/24"), Size: 254, Bound: 2, Revoking: 1, HeldDown: 3, Free: 248,
			Peak: 6, PeakDay: 6, Window: 3 * time.Minute, Binds: 7, Ends: 5, Mean: 4.5, Hosts: 200,
		},
		{
			Pool: p("busy", "203.0.113.0/28"), Size: 16, Bound: 8, HeldDown: 4, Free: 4,
			Peak: 15, PeakDay: 14, Window: time.Hour, Binds: 96, Ends: 94, Mean: 8, Dry: 100 * time.Minute, Hosts: 200,
		},
		{
			Pool: p("dry", "203.0.113.16/31"), Size: 2, Bound: 2,
			Peak: 2, PeakDay: 2, Window: time.Hour, Binds: 4, Ends: 2, Mean: 1.5, Hosts: 200,
		},
		{
			Pool: p("cut", "203.0.113.128/27"), Size: 32, Bound: 5, Revoking: 1, HeldDown: 2, Free: 1, Cut: 23, SetsFree: 3, SetsUsed: 365,
			Peak: 32, PeakDay: 31, Window: time.Hour, Binds: 4000, Ends: 4000, Mean: 31, Hosts: 2000,
		},
		{Pool: p("unused", "203.0.113.32/30"), Size: 4, Free: 4, Window: time.Hour, Hosts: 200},
		{Pool: p("left", "203.0.113.64/26"), Size: 64, HeldDown: 20, Free: 44, Window: time.Hour, Binds: 300, Ends: 300, Mean: 25, Hosts: 3},
	}
}

func TestAdviseArguments(t *testing.T) {
	server := []string{"--server", "[2001:db8:2::10]:3545"}
	given := []string{"--hosts", "5", "--use", "60s/1h"}
	const usage, failed = daemon.ExitUsage, daemon.ExitFailed
	for _, tt := range []struct {
		name string
		args []string
		code int
		want string
	}{
		{"nothing", nil, usage, "pool advise needs --hosts and --use, for example --hosts 5000 --use 60s/1h, or --measured POOL"},
		{"no use", given[:2], usage, "pool advise needs --hosts and --use"},
		{"no hosts", given[2:], usage, "pool advise needs --hosts and --use"},
		{"no number", []string{"--hosts", "many"}, usage, `invalid argument "many" for "--hosts" flag`},
		{"no host", []string{"--hosts", "0", "--use", "60s/1h"}, usage, "--hosts 0: want 1 to 1000000"},
		{"too many", []string{"--hosts", "1000001", "--use", "60s/1h"}, usage, "--hosts 1000001: want 1 to 1000000"},
		{"no period", []string{"--hosts", "5", "--use", "60s"}, usage, `--use "60s": want USE/PERIOD, for example 60s/1h`},
		{"no unit", []string{"--hosts", "5", "--use", "60/3600"}, usage, `--use "60/3600": want USE/PERIOD, for example 60s/1h`},
		{"no use in it", []string{"--hosts", "5", "--use", "0s/1h"}, usage, `--use "0s/1h": want USE/PERIOD, for example 60s/1h`},
		{"longer than its period", []string{"--hosts", "5", "--use", "2h/1h"}, usage, `--use "2h/1h": a use of 2h0m0s is longer than its period of 1h0m0s`},
		{"tail", append(given, "--tail", "-1s"), usage, "--tail -1s: want 0s or more"},
		{"blocking of none", append(given, "--blocking", "0"), usage, "--blocking 0: want more than 0 and less than 1, for example 1e-4"},
		{"blocking of all", append(given, "--blocking", "1"), usage, "--blocking 1: want more than 0 and less than 1"},
		{"blocking of no number", append(given, "--blocking", "nan"), usage, "--blocking NaN: want more than 0 and less than 1"},
		{"port sets", append(given, "--port-sets", "11"), usage, "--port-sets 11: want 0 (whole addresses) to 10 bits"},
		{"argument", append(given, "main"), usage, `unknown command or argument "main"`},
		{"both", append(given, "--measured", "busy"), usage, "--measured says how hosts use addresses: leave out --use and --tail"},
		{"nameless", []string{"--measured", ""}, usage, "--measured wants the name of a pool"},
		{"nobody to ask", []string{"--measured", "busy"}, usage, "no lease service: neither"},
		{"no such pool", append(server, "--measured", "x"), usage, `--measured "x": no such pool; there are main, busy, dry, cut, unused, left`},
		{"too early", append(server, "--measured", "main"), failed, "pool main was measured for 3m0s: want 10m0s, ask again later"},
		{"no use", append(server, "--measured", "unused"), failed, "pool unused: no address was taken in the last 1h0m0s"},
		{"too full", append(server, "--measured", "dry"), failed, "pool dry is too full to tell what hosts want: 31 % of requests find no address; add addresses, then measure"},
		{"cut", append(server, "--measured", "cut"), failed, "pool cut has so few addresses that 23 are leased by port sets: add addresses, then measure"},
		{"by nobody", append(server, "--measured", "left"), failed, "pool left: 25.0 addresses were taken on average, but 3 hosts attend: who took them is not known"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := dstm(t, &fake{}, append([]string{"pool", "advise"}, tt.args...)...)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("got %v, want %s", err, tt.want)
			}
			if code := daemon.ExitCode(err); code != tt.code {
				t.Errorf("exit code %d, want %d", code, tt.code)
			}
		})
	}
}

// advice is what pool advise answers as JSON: at least one.
func advice(t *testing.T, args ...string) []adviceView {
	t.Helper()
	out, err := dstm(t, &fake{}, append([]string{"pool", "advise", "--json"}, args...)...)
	var got struct {
		Advice []adviceView `json:"advice"`
	}
	if err == nil {
		err = json.Unmarshal([]byte(out), &got)
	}
	if err != nil || len(got.Advice) == 0 {
		t.Fatalf("%v: %q, %v", args, out, err)
	}
	return got.Advice
}

// TestCapacityFigures: docs/capacity.md says what the tool says.
func TestCapacityFigures(t *testing.T) {
	b, err := os.ReadFile("../../docs/capacity.md")
	if err != nil {
		t.Fatal(err)
	}
	thousands := func(n int) string {
		if n < 1000 {
			return fmt.Sprint(n)
		}
		return fmt.Sprintf("%d,%03d", n/1000, n%1000)
	}
	for _, tail := range []string{"30s", "50s", "120s", "240s", "900s"} {
		got := advice(t, "--hosts", "100000", "--use", "60s/1h", "--tail", tail, "--port-sets", "4")
		want := fmt.Sprintf("| %s | %s |", thousands(got[0].Addresses), thousands(got[1].Addresses))
		row := regexp.MustCompile(`(?m)^\|.*\| ` + strings.TrimSuffix(tail, "s") + ` s[ |].*$`).FindString(string(b))
		if !strings.Contains(row, want) {
			t.Errorf("tail %s: %q is not in the row %q", tail, want, row)
		}
	}
}

// TestAdvise: what is left out has the defaults of the reference configuration; nobody is asked.
func TestAdvise(t *testing.T) {
	var svc leasesvc.Config
	svc.Defaults()
	if got, want := advice(t, "--hosts", "5000", "--use", "60s/1h")[0].TailMS, (svc.Timers.Idle + svc.Timers.HoldDown).Milliseconds(); got != want {
		t.Errorf("tail %d ms, idle and hold-down of the lease service are %d ms", got, want)
	}
	for _, tt := range []struct {
		name      string
		args      []string
		addresses int
		blocking  float64 // at most
	}{
		{"a use that never ends", []string{"--hosts", "300", "--use", "58m/1h"}, 300, 0},
		{"one host", []string{"--hosts", "1", "--use", "1s/24h"}, 1, 0},
		{"a tenth may be refused", []string{"--hosts", "10", "--use", "6m/1h", "--tail", "0s", "--blocking", "0.1"}, 3, 0.05},
		{"the largest", []string{"--hosts", "1000000", "--use", "60s/1h", "--tail", "50s"}, 30_988, 1e-4},
	} {
		if v := advice(t, tt.args...)[0]; v.Addresses != tt.addresses || v.Blocking > tt.blocking {
			t.Errorf("%s: %d addresses, blocking %g; want %d and at most %g", tt.name, v.Addresses, v.Blocking, tt.addresses, tt.blocking)
		}
	}
}
