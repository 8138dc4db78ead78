package hostd

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/dstm-project/dstm/internal/netcfg"
)

func TestTunnelSource(t *testing.T) {
	a := netip.MustParseAddr
	stable := netcfg.GlobalAddr{Link: "eth0", Addr: a("2001:db8:1::5")}
	other := netcfg.GlobalAddr{Link: "eth0", Addr: a("2001:db8:9::5")}
	far := netcfg.GlobalAddr{Link: "eth1", Addr: a("2001:db8:7::5")}
	temp := netcfg.GlobalAddr{Link: "eth0", Addr: a("2001:db8:1::9"), Temporary: true}
	old := netcfg.GlobalAddr{Link: "eth0", Addr: a("2001:db8:1::5"), Deprecated: true}
	dad := netcfg.GlobalAddr{Link: "eth0", Addr: a("2001:db8:1::5"), Tentative: true}
	hop := func(src string) netcfg.Hop { return netcfg.Hop{Link: "eth0", Source: a(src)} }
	for _, c := range []struct {
		name    string
		addrs   []netcfg.GlobalAddr
		hop     netcfg.Hop
		current netip.Addr
		want    netip.Addr
	}{
		{"the kernel's choice", []netcfg.GlobalAddr{other, stable}, hop("2001:db8:1::5"), netip.Addr{}, stable.Addr},
		{"the kernel prefers a temporary one: its stable neighbour", []netcfg.GlobalAddr{other, temp, stable}, hop("2001:db8:1::9"), netip.Addr{}, stable.Addr},
		{"the current one stays", []netcfg.GlobalAddr{other, stable}, hop("2001:db8:1::5"), other.Addr, other.Addr},
		{"the current one is deprecated: move", []netcfg.GlobalAddr{old, other}, hop("2001:db8:9::5"), old.Addr, other.Addr},
		{"not yet usable", []netcfg.GlobalAddr{dad}, hop("2001:db8:1::5"), netip.Addr{}, netip.Addr{}},
		{"of another interface only if the kernel takes it", []netcfg.GlobalAddr{far}, hop("2001:db8:1::5"), netip.Addr{}, netip.Addr{}},
		{"address on another interface that the kernel takes", []netcfg.GlobalAddr{far}, hop("2001:db8:7::5"), netip.Addr{}, far.Addr},
		{"nothing", nil, netcfg.Hop{}, netip.Addr{}, netip.Addr{}},
	} {
		if got := tunnelSource(c.addrs, c.hop, c.current); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}

func TestSources(t *testing.T) {
	a := netip.MustParseAddr
	in := []netcfg.GlobalAddr{
		{Link: "dstm0", Addr: a("2001:db8:f::1")},
		{Link: "eth0", Addr: a("2001:db8:1::1"), Deprecated: true},
		{Link: "eth0", Addr: a("2001:db8:1::2"), Tentative: true},
		{Link: "eth0", Addr: a("2001:db8:1::9"), Temporary: true},
		{Link: "eth0", Addr: a("2001:db8:1::5")},
	}
	want := []netip.Addr{a("2001:db8:1::5"), a("2001:db8:1::9"), a("2001:db8:1::1")}
	if d := cmp.Diff(want, sources(in, "dstm0"), addrCmp); d != "" {
		t.Errorf("sources (-want +got):\n%s", d)
	}
	for i := range 20 {
		in = append(in, netcfg.GlobalAddr{Link: "eth0", Addr: a(fmt.Sprintf("2001:db8:2::%x", i+1))})
	}
	got := sources(in, "dstm0")
	if len(got) != MaxSources || got[0] != a("2001:db8:1::5") {
		t.Errorf("%d sources %v, want %d, preferred ones first", len(got), got, MaxSources)
	}
}

func TestTunnelMTU(t *testing.T) {
	for _, c := range []struct {
		mtu  int
		want uint16
	}{{1500, 1460}, {1280, 1240}, {576, 1240}, {9000, 8960}, {1 << 20, 65535}} {
		if got := tunnelMTU(netcfg.Hop{MTU: c.mtu}); got != c.want {
			t.Errorf("mtu %d: tunnel mtu %d, want %d", c.mtu, got, c.want)
		}
	}
}
