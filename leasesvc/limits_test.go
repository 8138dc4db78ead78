package leasesvc

import (
	"net"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// TestPriorities: when calls pile up, hints are refused first, then binds, and renewals last.
func TestPriorities(t *testing.T) {
	l := newLimits(LimitsConfig{Calls: 100}, nil, newMetrics(nil))
	count := func(c class) int {
		n := 0
		for {
			if _, err := l.begin(c); err != nil {
				if status.Code(err) != codes.ResourceExhausted || len(status.Convert(err).Details()) != 1 {
					t.Fatalf("%v: want RESOURCE_EXHAUSTED with a delay", err)
				}
				return n
			}
			n++
		}
	}
	hints, binds, renewals := count(classHint), count(classBind), count(classRenew)
	if hints != 50 || binds != 30 || renewals != 20 {
		t.Errorf("%d hints, then %d binds, then %d renewals: want 50, 30, 20", hints, binds, renewals)
	}
	for range 100 {
		l.calls.Add(-1)
	}
	end, err := l.begin(classHint)
	if err != nil {
		t.Fatal(err)
	}
	if end(); l.calls.Load() != 0 {
		t.Errorf("%d calls under way after the end", l.calls.Load())
	}
}

// TestHostRate: one host at full speed is held to its rate; another is not touched.
func TestHostRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLimits(LimitsConfig{Calls: 100, PerHost: 20}, nil, newMetrics(nil))
		passed := 0
		for range 10_000 {
			if l.host("loud") == nil {
				passed++
			}
			time.Sleep(time.Millisecond)
		}
		if want := 40 + 10*20; passed < want-1 || passed > want+1 {
			t.Errorf("%d calls in 10 s, want a burst of 40 and 20 a second", passed)
		}
		if err := l.host("quiet"); err != nil {
			t.Errorf("another host: %v", err)
		}
	})
}

func TestHandshakes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLimits(LimitsConfig{Calls: 100, Handshakes: 100, Per64: 10}, nil, newMetrics(nil))
		at := func(s string) net.Addr { return net.TCPAddrFromAddrPort(netip.MustParseAddrPort(s)) }
		flood := 0
		for range 1000 {
			if l.admits(at("[2001:db8:1::bad]:1")) {
				flood++
			}
		}
		if flood != 20 {
			t.Errorf("a /64 got %d connections at once, want 20", flood)
		}
		if !l.admits(at("[2001:db8:2::1]:1")) || !l.admits(at("192.0.2.1:1")) {
			t.Error("others are refused")
		}
		all := 0
		for i := range 1000 {
			if l.admits(at(netip.AddrPortFrom(netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, byte(i >> 8), byte(i)}), 1).String())) {
				all++
			}
		}
		if all != 200-20-2 {
			t.Errorf("%d more from anywhere, want the rest of a burst of 200", all)
		}
		time.Sleep(time.Second)
		if !l.admits(at("[2001:db8:1::bad]:1")) {
			t.Error("refused for ever")
		}
	})
}

// TestLanes: however many hosts come, gateways and resolvers, which call from elsewhere, do not wait; and the other way round.
func TestLanes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hosts := []netip.Prefix{netip.MustParsePrefix("2001:db8:1::/48")}
		l := newLimits(LimitsConfig{Calls: 100, Handshakes: 100}, hosts, newMetrics(nil))
		at := func(s string) net.Addr { return net.TCPAddrFromAddrPort(netip.MustParseAddrPort(s)) }
		many := func(from string) (n int) {
			for range 1000 {
				if l.admits(at(from)) {
					n++
				}
			}
			return n
		}
		if n := many("[2001:db8:1::1]:1"); n != 200 {
			t.Errorf("%d connections of hosts at once, want 200", n)
		}
		if n := many("[2001:db8:2::1]:1"); n != 200 {
			t.Errorf("%d connections from elsewhere, want 200 whatever hosts do", n)
		}
		time.Sleep(time.Second)
		if n := many("[2001:db8:2::1]:1"); n != 100 {
			t.Errorf("%d more after a second, want 100", n)
		}
		if n := many("[2001:db8:1:ffff::1]:1"); n != 100 {
			t.Errorf("%d more of hosts, want 100 whatever others do", n)
		}
	})
}
