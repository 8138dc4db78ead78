package leasesvc

import (
	"context"
	"net/netip"
	"testing"
)

// TestSourcesOfAnEndedStream: what was read before the end of a stream and comes to its turn after it changes nothing.
func TestSourcesOfAnEndedStream(t *testing.T) {
	s := &Server{m: newMetrics(nil)}
	s.hosts.init()
	addr := netip.MustParseAddr("2001:db8:1::5")
	attend := func() *attendant {
		_, end := context.WithCancelCause(t.Context())
		at := &attendant{name: "h", end: end}
		s.hosts.byName["h"] = at
		return at
	}
	old := attend()
	s.unregister(old)
	s.changeSources(old, []netip.Addr{addr})
	if len(s.hosts.bySource) != 0 {
		t.Error("an ended stream has an address on the list")
	}
	fresh := attend()
	s.changeSources(fresh, []netip.Addr{addr})
	if s.hosts.bySource[addr] != fresh {
		t.Error("the address is not that of the stream that is there")
	}
}
