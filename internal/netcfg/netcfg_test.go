package netcfg

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// inNetns puts the test's thread into a network namespace of its own, which dies with the thread.
func inNetns(t *testing.T) {
	t.Helper()
	if os.Getenv("DSTM_TEST_ROOT") != "1" {
		t.Skip("needs root: sudo DSTM_TEST_ROOT=1 go test ./internal/netcfg/")
	}
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatalf("own network namespace: %v", err)
	}
}

// open returns a Config in a namespace with v0 and v1, a veth pair that is up.
func open(t *testing.T) (*Config, string) {
	t.Helper()
	inNetns(t)
	state := filepath.Join(t.TempDir(), "net.json")
	c := reopen(t, state)
	if err := c.h.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "v0"}, PeerName: "v1"}); err != nil {
		t.Fatal(err)
	}
	for _, l := range []string{"lo", "v0", "v1"} {
		if err := c.SetUp(l, true); err != nil {
			t.Fatal(err)
		}
	}
	return c, state
}

func reopen(t *testing.T, state string) *Config {
	t.Helper()
	c, err := Open(state, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func pfx(s string) netip.Prefix { return netip.MustParsePrefix(s) }
func addr(s string) netip.Addr  { return netip.MustParseAddr(s) }

func expect(t *testing.T, c *Config, want ...string) {
	t.Helper()
	got, err := c.Dump()
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(strings.Join(want, "\n"), got); d != "" {
		t.Errorf("kernel state (-want +got):\n%s", d)
	}
}

func set(t *testing.T, c *Config, d Desired) {
	t.Helper()
	if err := c.Set(d); err != nil {
		t.Fatal(err)
	}
}

// steps are desired values applied one after the other to one kernel, each with all that must be there then.
func TestSet(t *testing.T) {
	c, state := open(t)
	placeholder := Addr{Link: "v0", Prefix: pfx("192.0.0.2/29")}
	lease := Addr{Link: "v0", Prefix: pfx("198.51.100.7/32")}
	anycast := Addr{Link: "lo", Prefix: pfx("2001:db8:a::1/128"), NoDAD: true, Deprecated: true}
	def := Route{Prefix: pfx("0.0.0.0/0"), Link: "v0", Metric: 4096}
	leased := def
	leased.Src = lease.Prefix.Addr()
	const fwd = "net/ipv6/conf/v0/forwarding"
	steps := []struct {
		name string
		d    Desired
		want []string
	}{
		{"placeholder", Desired{Addrs: []Addr{placeholder}, Routes: []Route{def}}, []string{
			"addr 192.0.0.2/29 dev v0", "route 0.0.0.0/0 dev v0 metric 4096",
		}},
		{"lease", Desired{Addrs: []Addr{placeholder, lease}, Routes: []Route{leased}}, []string{
			"addr 192.0.0.2/29 dev v0", "addr 198.51.100.7/32 dev v0", "route 0.0.0.0/0 dev v0 metric 4096 src 198.51.100.7",
		}},
		{"lease gone", Desired{Addrs: []Addr{placeholder}, Routes: []Route{def}}, []string{
			"addr 192.0.0.2/29 dev v0", "route 0.0.0.0/0 dev v0 metric 4096",
		}},
		{"gateway", Desired{
			Addrs: []Addr{anycast},
			Routes: []Route{
				{Prefix: pfx("198.51.100.0/24"), Link: "v0", Metric: 1024},
				{Prefix: pfx("198.51.100.0/24"), Blackhole: true, Metric: 4294967295},
				{Prefix: pfx("198.51.100.9/32"), Link: "v0", MTU: 1300, MTULock: true},
				{Prefix: pfx("2001:db8:b::/48"), Link: "v0"},
				{Prefix: pfx("2001:db8:c::/48"), Blackhole: true, Metric: 9},
				{Prefix: pfx("203.0.113.0/24"), Link: "v0", Table: 1234},
			},
			Sysctls: map[string]string{fwd: "1"},
		}, []string{
			"addr 2001:db8:a::1/128 dev lo nodad deprecated",
			"blackhole 198.51.100.0/24 metric 4294967295",
			"blackhole 2001:db8:c::/48 metric 9",
			"route 198.51.100.0/24 dev v0 metric 1024",
			"route 198.51.100.9/32 dev v0 metric 0 mtu lock 1300",
			"route 2001:db8:b::/48 dev v0 metric 1024",
			"route 203.0.113.0/24 dev v0 metric 0 table 1234",
			"sysctl " + fwd + " = 1",
		}},
		{"nothing", Desired{}, []string{""}},
	}
	for _, s := range steps {
		set(t, c, s.d)
		t.Log(s.name)
		expect(t, c, s.want...)
		before, _ := os.Stat(state)
		set(t, c, s.d)
		expect(t, c, s.want...)
		if after, _ := os.Stat(state); before.ModTime() != after.ModTime() {
			t.Errorf("%s: the same value again rewrote the state file", s.name)
		}
	}
	if v, err := readSysctl(fwd); err != nil || v != "0" {
		t.Errorf("sysctl %s after its end: %q %v, want the old value 0", fwd, v, err)
	}
}

// A process that dies leaves its state file; the next one takes everything back, and only that.
func TestCleanupAfterCrashLeavesStrangers(t *testing.T) {
	c, state := open(t)
	v0, err := c.h.LinkByName("v0")
	if err != nil {
		t.Fatal(err)
	}
	stranger := &netlink.Addr{IPNet: toNet(pfx("192.0.2.9/24"))}
	if err := c.h.AddrAdd(v0, stranger); err != nil {
		t.Fatal(err)
	}
	other := netlink.Route{Dst: toNet(pfx("203.0.113.0/24")), LinkIndex: v0.Attrs().Index, Protocol: unix.RTPROT_STATIC, Scope: netlink.SCOPE_LINK}
	foreign213 := netlink.Route{Dst: toNet(pfx("203.0.113.128/25")), LinkIndex: v0.Attrs().Index, Protocol: Protocol, Scope: netlink.SCOPE_LINK}
	for _, r := range []netlink.Route{other, foreign213} {
		if err := c.h.RouteAdd(&r); err != nil {
			t.Fatal(err)
		}
	}
	set(t, c, Desired{
		Addrs:   []Addr{{Link: "v0", Prefix: pfx("192.0.2.9/24")}, {Link: "v0", Prefix: pfx("192.0.0.2/29")}},
		Routes:  []Route{{Prefix: pfx("0.0.0.0/0"), Link: "v0", Metric: 7}},
		Sysctls: map[string]string{"net/ipv4/conf/v0/rp_filter": "2"},
	})
	c = reopen(t, state) // the first one is forgotten without a word
	if err := c.Cleanup(); err != nil {
		t.Fatal(err)
	}
	expect(t, c, "route 203.0.113.128/25 dev v0 metric 0") // protocol 213, but not in our state file
	if _, err := os.Stat(state); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("state file after Cleanup: %v, want it gone", err)
	}
	k, err := c.read()
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := k.addrs[addrKey{"v0", pfx("192.0.2.9/24")}]; !ok {
		t.Error("Cleanup removed an address that was there before us")
	}
	if _, ok := k.routes[routeKey{Prefix: pfx("203.0.113.0/24")}]; !ok {
		t.Error("Cleanup removed a stranger's route")
	}
	if err := c.Cleanup(); err != nil {
		t.Errorf("second Cleanup: %v", err)
	}
}

func TestSetRefusesStrangersRoute(t *testing.T) {
	c, _ := open(t)
	v0, _ := c.h.LinkByName("v0")
	r := netlink.Route{Dst: toNet(pfx("0.0.0.0/0")), LinkIndex: v0.Attrs().Index, Protocol: unix.RTPROT_STATIC, Scope: netlink.SCOPE_LINK, Priority: 4096}
	if err := c.h.RouteAdd(&r); err != nil {
		t.Fatal(err)
	}
	err := c.Set(Desired{Routes: []Route{{Prefix: pfx("0.0.0.0/0"), Link: "v1", Metric: 4096}}})
	if err == nil || !strings.Contains(err.Error(), "of protocol 4 there, which is not ours") {
		t.Errorf("error %v, want one that names the stranger", err)
	}
	got, err := c.ReadIPv4()
	if err != nil {
		t.Fatal(err)
	}
	want := IPv4{
		Addrs:      []Addr{{Link: "lo", Prefix: pfx("127.0.0.1/8")}},
		Default:    Route{Prefix: pfx("0.0.0.0/0"), Link: "v0", Metric: 4096},
		HasDefault: true,
	}
	if d := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b }), cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); d != "" {
		t.Errorf("IPv4 of the host (-want +got):\n%s", d)
	}
	if err := c.Cleanup(); err != nil {
		t.Fatal(err)
	}
	if v, err := c.ReadIPv4(); err != nil || !v.HasDefault {
		t.Error("Cleanup removed the stranger's default route")
	}
}

// One value that fails does not keep the others from being applied, and is tried again.
func TestSetGoesOnAfterFailure(t *testing.T) {
	c, _ := open(t)
	d := Desired{Addrs: []Addr{{Link: "nolink", Prefix: pfx("192.0.2.1/32")}, {Link: "v0", Prefix: pfx("192.0.2.2/32")}}}
	if err := c.Set(d); err == nil || !strings.Contains(err.Error(), "add addr 192.0.2.1/32 dev nolink") {
		t.Errorf("error %v, want the address that failed", err)
	}
	expect(t, c, "addr 192.0.2.2/32 dev v0")
}

func TestLookupAndGlobals(t *testing.T) {
	c, _ := open(t)
	set(t, c, Desired{
		Addrs: []Addr{
			{Link: "v0", Prefix: pfx("2001:db8:1::5/64"), NoDAD: true},
			{Link: "v0", Prefix: pfx("2001:db8:1::6/64"), NoDAD: true, Deprecated: true},
		},
		Routes: []Route{
			{Prefix: pfx("2001:db8:a::/48"), Link: "v0", Gateway: addr("2001:db8:1::1")},
			{Prefix: pfx("2001:db8:b::/48"), Link: "v0", MTU: 1400},
		},
	})
	for _, x := range []struct {
		dst  string
		want Hop
	}{
		{"2001:db8:a::1", Hop{Link: "v0", Gateway: addr("2001:db8:1::1"), Source: addr("2001:db8:1::5"), MTU: 1500}},
		{"2001:db8:b::1", Hop{Link: "v0", Source: addr("2001:db8:1::5"), MTU: 1400}},
	} {
		got, err := c.Lookup(addr(x.dst))
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(x.want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); d != "" {
			t.Errorf("way to %s (-want +got):\n%s", x.dst, d)
		}
	}
	if _, err := c.Lookup(addr("203.0.113.1")); !errors.Is(err, unix.ENETUNREACH) {
		t.Errorf("way without a route: %v, want ENETUNREACH", err)
	}
	got, err := c.GlobalIPv6()
	if err != nil {
		t.Fatal(err)
	}
	want := []GlobalAddr{{Link: "v0", Addr: addr("2001:db8:1::5")}, {Link: "v0", Addr: addr("2001:db8:1::6"), Deprecated: true}}
	if d := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); d != "" {
		t.Errorf("global addresses (-want +got):\n%s", d)
	}
}

func TestWatch(t *testing.T) {
	c, _ := open(t)
	ctx, cancel := context.WithCancel(t.Context())
	ch, err := c.Watch(ctx)
	if err != nil {
		t.Fatal(err)
	}
	set(t, c, Desired{Addrs: []Addr{{Link: "v0", Prefix: pfx("192.0.2.1/32")}}})
	<-ch
	cancel()
	for range ch { // closed at the end
	}
}

func TestLinks(t *testing.T) {
	c, _ := open(t)
	if err := c.SetDevice("v0", 1400); err != nil {
		t.Fatal(err)
	}
	l, ok, err := c.Link("v0")
	if want := (Link{Index: l.Index, Name: "v0", Kind: "veth", MTU: 1400, Up: true}); err != nil || !ok || l != want {
		t.Errorf("link %+v %v %v, want %+v", l, ok, err, want)
	}
	for range 2 {
		if err := c.RemoveLink("v0"); err != nil {
			t.Fatal(err)
		}
	}
	if _, ok, err := c.Link("v0"); ok || err != nil {
		t.Errorf("removed link: %v %v", ok, err)
	}
}

func TestDesiredCheck(t *testing.T) {
	for _, x := range []struct {
		d    Desired
		want string
	}{
		{Desired{}, ""},
		{Desired{Addrs: []Addr{{Prefix: pfx("192.0.2.1/32")}}}, "want an interface and an address"},
		{Desired{Routes: []Route{{Prefix: pfx("192.0.2.1/24"), Link: "v0"}}}, "want a masked prefix"},
		{Desired{Routes: []Route{{Prefix: pfx("192.0.2.0/24")}}}, "want an interface or blackhole"},
		{Desired{Routes: []Route{{Prefix: pfx("192.0.2.0/24"), Link: "v0", Blackhole: true}}}, "want an interface or blackhole"},
		{Desired{Routes: []Route{{Prefix: pfx("192.0.2.0/24"), Link: "v0"}, {Prefix: pfx("192.0.2.0/24"), Blackhole: true}}}, "given twice"},
		{Desired{Sysctls: map[string]string{"net/../../x": "1"}}, "want a name below net/"},
		{Desired{Sysctls: map[string]string{"kernel/panic": "1"}}, "want a name below net/"},
	} {
		got := ""
		if err := x.d.Check(); err != nil {
			got = err.Error()
		}
		if !strings.Contains(got, x.want) || (x.want == "") != (got == "") {
			t.Errorf("%+v: %q, want %q", x.d, got, x.want)
		}
	}
}
