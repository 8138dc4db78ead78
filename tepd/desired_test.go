package tepd

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/dstm-project/dstm/bgp"
	"github.com/dstm-project/dstm/dataplane"
	"github.com/dstm-project/dstm/internal/netcfg"
	"github.com/dstm-project/dstm/lease"
)

func mustConfig(t *testing.T, text string) *Config {
	t.Helper()
	c, err := ParseConfig("tepd.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestDesiredKernel(t *testing.T) {
	got := desiredKernel(mustConfig(t, testConfig), []netip.Prefix{poolPfx})
	want := netcfg.Desired{
		Addrs: []netcfg.Addr{
			{Link: "lo", Prefix: pfx("2001:db8:a::1/128"), NoDAD: true, Deprecated: true},
			{Link: "dstm0", Prefix: pfx("192.0.2.1/32")},
		},
		Routes: []netcfg.Route{
			{Prefix: poolPfx, Link: "dstm0", Metric: 1024},
			{Prefix: poolPfx, Blackhole: true, Metric: 4294967295},
		},
		Sysctls: map[string]string{
			"net/ipv4/ip_forward":              "1",
			"net/ipv6/conf/dstm0/forwarding":   "1",
			"net/ipv4/conf/all/send_redirects": "0", "net/ipv4/conf/dstm0/send_redirects": "0",
			"net/ipv4/conf/dstm0/ignore_routes_with_linkdown": "0",
		},
	}
	if d := cmp.Diff(want, got, cmpAddr, cmpPrefix); d != "" {
		t.Errorf("kernel state (-want +got):\n%s", d)
	}
	if err := got.Check(); err != nil {
		t.Errorf("the kernel would not take it: %v", err)
	}
}

func TestDesiredPath(t *testing.T) {
	got := desiredPath(mustConfig(t, strings.Replace(testConfig, "tunnel: {", "tunnel: {uplinks: [eth1], hairpin: false, mtu: 1400, ", 1)), []netip.Prefix{poolPfx})
	want := dataplane.GatewayConfig{
		Device: "dstm0", Uplinks: []string{"eth1"}, TEPs: []netip.Addr{tepAddr}, Pools: []netip.Prefix{poolPfx},
		HopLimit: 64, MTU: 1400, PinDir: "/sys/fs/bpf/dstm",
	}
	if d := cmp.Diff(want, got, cmpAddr, cmpPrefix); d != "" {
		t.Errorf("packet path (-want +got):\n%s", d)
	}
}

func TestServed(t *testing.T) {
	other := lease.Pool{Name: "other", Prefix: pfx("203.0.113.0/24"), TEP: netip.MustParseAddr("2001:db8:b::1")}
	ours, notes := served(mustConfig(t, testConfig), []lease.Pool{pool, other})
	if d := cmp.Diff([]lease.Pool{pool}, ours, cmpAddr, cmpPrefix); d != "" {
		t.Errorf("served pools (-want +got):\n%s", d)
	}
	want := []string{"pool other (203.0.113.0/24) ends at 2001:db8:b::1, this gateway's tunnel.address is 2001:db8:a::1: it is not served here"}
	if d := cmp.Diff(want, notes); d != "" {
		t.Errorf("notes (-want +got):\n%s", d)
	}
}

func TestDesiredRoutes(t *testing.T) {
	addr := func(s string) netip.Addr { return netip.MustParseAddr(s) }
	leased := []netip.Addr{addr("198.51.100.7"), addr("198.51.100.1"), addr("198.51.100.7")}
	outside := lease.Pool{Name: "out", Prefix: pfx("203.0.113.0/24"), TEP: tepAddr}
	wide := lease.Pool{Name: "wide", Prefix: pfx("198.51.96.0/20"), TEP: tepAddr}
	for _, c := range []struct {
		name    string
		bgp     string // changes of the announce section
		pools   []lease.Pool
		addrs   []netip.Addr
		leases  int
		routes  string
		refused string // part of the only refusal
		capped  int
	}{
		{name: "nothing yet", routes: "2001:db8:a::1/128"},
		{name: "aggregate", pools: []lease.Pool{pool}, addrs: leased, leases: 2, routes: "198.51.100.0/24 2001:db8:a::1/128"},
		{name: "no tep", bgp: "tep: false", pools: []lease.Pool{pool}, routes: "198.51.100.0/24"},
		{name: "one route a lease", bgp: "pool: lease", pools: []lease.Pool{pool}, addrs: leased, leases: 2, routes: "198.51.100.1/32 198.51.100.7/32 2001:db8:a::1/128"},
		{name: "no lease", bgp: "pool: lease", pools: []lease.Pool{pool}, routes: "2001:db8:a::1/128"},
		{name: "at the cap", bgp: "pool: lease, max_host_routes: 2", pools: []lease.Pool{pool}, addrs: leased, leases: 2, routes: "198.51.100.1/32 198.51.100.7/32 2001:db8:a::1/128"},
		{name: "over the cap", bgp: "pool: lease, max_host_routes: 1", pools: []lease.Pool{pool}, leases: 2, routes: "198.51.100.0/24 2001:db8:a::1/128", capped: 2},
		{
			name: "pool outside", pools: []lease.Pool{outside}, routes: "2001:db8:a::1/128",
			refused: "pool out (203.0.113.0/24) is outside of allow_advertise [198.51.100.0/24 2001:db8:a::1/128]: it is not announced",
		},
		{
			name: "pool larger than allowed", pools: []lease.Pool{wide}, routes: "198.51.100.0/24 2001:db8:a::1/128",
			refused: "pool wide (198.51.96.0/20) is only partly inside of allow_advertise: announced are [198.51.100.0/24]",
		},
		{
			name: "leases outside", bgp: "pool: lease", pools: []lease.Pool{wide}, leases: 2,
			addrs: []netip.Addr{addr("198.51.97.1"), addr("198.51.100.1")}, routes: "198.51.100.1/32 2001:db8:a::1/128", refused: "only partly",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := mustConfig(t, testConfig+testBGP+"  announce: {"+c.bgp+"}\n")
			got := desiredRoutes(cfg, c.pools, c.addrs, c.leases)
			var names []string
			for _, r := range got.routes {
				names = append(names, r.Prefix.String())
				if !bgp.Covered(r.Prefix, cfg.BGP.AllowAdvertise) {
					t.Errorf("%s is outside of allow_advertise", r.Prefix)
				}
			}
			if s := strings.Join(names, " "); s != c.routes || got.capped != c.capped {
				t.Errorf("routes %s, capped %d: want %s, %d", s, got.capped, c.routes, c.capped)
			}
			switch {
			case c.refused == "" && len(got.refused) > 0, c.refused != "" && len(got.refused) != 1:
				t.Errorf("refused %v, want %q", got.refused, c.refused)
			case c.refused != "" && !strings.Contains(got.refused[0].Reason, c.refused):
				t.Errorf("refused %q, want %q", got.refused[0].Reason, c.refused)
			}
		})
	}
}

func TestCommunities(t *testing.T) {
	cfg := mustConfig(t, testConfig+testBGP+"  announce: {community: [\"64512:1\"]}\n")
	want := []bgp.Route{
		{Prefix: poolPfx, Communities: []string{"64512:1"}},
		{Prefix: pfx("2001:db8:a::1/128"), Communities: []string{"64512:1"}},
	}
	a := desiredRoutes(cfg, []lease.Pool{pool}, nil, 0)
	if d := cmp.Diff(want, a.routes, cmpAddr, cmpPrefix); d != "" {
		t.Errorf("routes (-want +got):\n%s", d)
	}
}

// FuzzRoutesStayInside: whatever pools the service names, nothing outside of allow_advertise is announced (I11).
func FuzzRoutesStayInside(f *testing.F) {
	f.Add([]byte{198, 51, 100, 0}, uint8(24), []byte{198, 51, 100, 9})
	f.Add([]byte{198, 51, 0, 0}, uint8(16), []byte{198, 51, 101, 9})
	cfg, err := ParseConfig("tepd.yaml", []byte(testConfig+testBGP+"  announce: {pool: lease}\n"))
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, prefix []byte, bits uint8, leased []byte) {
		if len(prefix) != 4 || len(leased) != 4 || bits > 32 {
			t.Skip()
		}
		p := netip.PrefixFrom(netip.AddrFrom4([4]byte(prefix)), int(bits)).Masked()
		for _, mode := range []PoolMode{PoolAggregate, PoolLease} {
			c := *cfg
			c.BGP.Announce.Pool = mode
			a := desiredRoutes(&c, []lease.Pool{{Name: "p", Prefix: p, TEP: tepAddr}}, []netip.Addr{netip.AddrFrom4([4]byte(leased))}, 1)
			for _, r := range a.routes {
				if !bgp.Covered(r.Prefix, c.BGP.AllowAdvertise) {
					t.Errorf("%s announced for pool %s", r.Prefix, p)
				}
			}
		}
	})
}
