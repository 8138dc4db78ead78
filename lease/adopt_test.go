package lease_test

import (
	"maps"
	"net/netip"
	"testing"
	"time"

	"github.com/dstm-project/dstm/lease"
)

// TestAdopt: a store restored from a copy learns from gateways what was leased since, before it leases anything.
func TestAdopt(t *testing.T) {
	rec := func(last byte, s lease.State, rev lease.Rev, host string, source netip.Addr) lease.Address {
		return lease.Address{
			Resource: lease.Whole(netip.AddrFrom4([4]byte{198, 51, 100, last})), State: s, Gen: lease.MakeGen(1, rev), Rev: rev,
			Host: host, Source: source, TEP: tepA, Valid: time.Minute,
		}
	}
	held := func(last byte, rev lease.Rev, source netip.Addr) lease.Adopt {
		return lease.Adopt{Binding: lease.Binding{
			Resource: lease.Whole(netip.AddrFrom4([4]byte{198, 51, 100, last})), Host: source, TEP: tepA, Gen: lease.MakeGen(1, rev), MTU: 1440,
		}}
	}
	c, err := lease.NewCore(config("198.51.100.0/28"), lease.NewCell(2, 10, 0), at(0), []lease.Address{
		rec(1, lease.Bound, 1, "same", srcA), rec(2, lease.Bound, 2, "older", srcB), rec(3, lease.Free, 3, "gone", srcC),
		rec(4, lease.Revoking, 4, "ending", srcC), rec(5, lease.Bound, 9, "newer", srcC),
	})
	if err != nil {
		t.Fatal(err)
	}
	d, e, f := netip.MustParseAddr("2001:db8:1::d"), netip.MustParseAddr("2001:db8:1::e"), netip.MustParseAddr("2001:db8:1::f")
	var last lease.Rev
	for _, ev := range []lease.Adopt{held(1, 20, srcA), held(2, 21, d), held(3, 22, e), held(4, 23, f), held(5, 8, d), held(6, 24, srcB)} {
		for _, cm := range c.Step(at(0), ev).Commits {
			if cm.Rev <= last {
				t.Errorf("revision %d after %d", cm.Rev, last)
			}
			last = cm.Rev
		}
	}
	want := map[string]string{"1": "same", "2": "unknown@2001:db8:1::d", "3": "unknown@2001:db8:1::e", "4": "unknown@2001:db8:1::f", "5": "newer", "6": "unknown@2001:db8:1::b"}
	n := 0
	for in := range c.All(0) {
		n++
		b := in.Addr.As4()
		if key := string('0' + rune(b[3])); in.State != lease.Bound || in.Host != want[key] {
			t.Errorf("%s is %s of %s, want BOUND of %s", in.Addr, in.State, in.Host, want[key])
		}
		if b[3] != 5 && in.Gen.Epoch() != 2 {
			t.Errorf("%s has generation %s: want one of the new epoch", in.Addr, in.Gen)
		}
	}
	if n != 6 {
		t.Errorf("%d addresses, want 6", n)
	}

	// Whoever comes from the source takes its lease, at once, and gives up what the copy knew of it.
	a := c.Step(at(time.Second), lease.Bind{Host: "older", Source: d})
	if g := grant(t, a); g.Addr.String() != "198.51.100.2" || g.Host != "older" {
		t.Errorf("the host at %s got %+v", d, g)
	}
	a = c.Step(at(time.Second), lease.Bind{Host: "new", Source: srcB})
	if g := grant(t, a); g.Addr.String() != "198.51.100.6" {
		t.Errorf("the host at %s got %+v", srcB, g)
	}
	for _, cm := range a.Commits[:len(a.Commits)-1] {
		if cm.Audit.Host != "unknown@2001:db8:1::b" || cm.Audit.Unbound.IsZero() {
			t.Errorf("audit of the holder without a name: %+v", cm.Audit)
		}
	}
	// The others are leases as any: they end.
	if a := c.Step(at(time.Hour), lease.Tick{}); len(a.Ended) != 6 {
		t.Errorf("%d leases ended, want all 6", len(a.Ended))
	}
}

// TestAdoptPortSets: the copy may know an address cut into port sets that gateways hold whole since, and the other way
// round. What gateways forward for is leased to nobody else.
func TestAdoptPortSets(t *testing.T) {
	a := netip.MustParseAddr("198.51.100.0")
	set := func(psid uint16) lease.Resource { return lease.Resource{Addr: a, PSIDLen: 2, PSID: psid} }
	rec := func(r lease.Resource, s lease.State, rev lease.Rev, host string, source netip.Addr) lease.Address {
		return lease.Address{Resource: r, State: s, Gen: lease.MakeGen(1, rev), Rev: rev, Host: host, Source: source, TEP: tepA, Valid: time.Minute}
	}
	held := func(r lease.Resource, rev lease.Rev, source netip.Addr) lease.Adopt {
		return lease.Adopt{Binding: lease.Binding{Resource: r, Host: source, TEP: tepA, Gen: lease.MakeGen(1, rev)}}
	}
	for _, tt := range []struct {
		name   string
		copied []lease.Address
		adopts []lease.Adopt // newest first
		want   map[lease.Resource]netip.Addr
	}{
		{
			"whole since",
			[]lease.Address{rec(set(1), lease.Bound, 5, "x", srcA), rec(set(2), lease.Hold, 6, "y", srcB)},
			[]lease.Adopt{held(lease.Whole(a), 20, srcC)},
			map[lease.Resource]netip.Addr{lease.Whole(a): srcC},
		},
		{
			"cut since",
			[]lease.Address{rec(lease.Whole(a), lease.Bound, 5, "x", srcA)},
			[]lease.Adopt{held(set(3), 21, srcC), held(set(0), 20, srcB)},
			map[lease.Resource]netip.Addr{set(3): srcC, set(0): srcB},
		},
		{
			"cut since, never leased before", nil,
			[]lease.Adopt{held(set(3), 21, srcC)},
			map[lease.Resource]netip.Addr{set(3): srcC},
		},
		{
			"cut, and whole before that", nil,
			[]lease.Adopt{held(set(3), 21, srcC), held(lease.Whole(a), 20, srcB)},
			map[lease.Resource]netip.Addr{set(3): srcC},
		},
		{
			"whole, and cut before that", nil,
			[]lease.Adopt{held(lease.Whole(a), 21, srcC), held(set(3), 20, srcB)},
			map[lease.Resource]netip.Addr{lease.Whole(a): srcC},
		},
		{
			"cut already when it was copied",
			[]lease.Address{rec(set(1), lease.Bound, 5, "x", srcA)},
			[]lease.Adopt{held(lease.Whole(a), 4, srcC)},
			map[lease.Resource]netip.Addr{set(1): srcA},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg := config("198.51.100.0/32")
			cfg.PSIDLen = 2
			c, err := lease.NewCore(cfg, lease.NewCell(2, 10, 0), at(0), tt.copied)
			if err != nil {
				t.Fatal(err)
			}
			last := lease.Rev(10)
			for _, ev := range tt.adopts {
				for _, cm := range c.Step(at(0), ev).Commits {
					if cm.Rev != last+1 {
						t.Errorf("revision %d after %d", cm.Rev, last)
					}
					last = cm.Rev
				}
			}
			got := map[lease.Resource]netip.Addr{}
			for b := range c.Bindings() {
				got[b.Resource] = b.Host
			}
			if !maps.Equal(got, tt.want) {
				t.Errorf("leased are %v, want %v", got, tt.want)
			}
			// Others get the rest of the address, if anything, and it all comes back.
			for i := range 5 {
				c.Step(at(0), lease.Bind{Host: string(rune('A' + i)), Source: netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 15: byte(0x40 + i)}), PortSet: true})
			}
			seen := []lease.Resource{}
			for b := range c.Bindings() {
				for _, r := range seen {
					if r.Overlaps(b.Resource) {
						t.Errorf("%s and %s are leased at once", r, b.Resource)
					}
				}
				seen = append(seen, b.Resource)
			}
			c.Step(at(time.Hour), lease.Tick{})
			c.Step(at(time.Hour), lease.FenceTo{Rev: lease.MaxRev})
			c.Step(at(2*time.Hour), lease.Tick{})
			if st := c.Stats(); st != (lease.Stats{Size: 1, Free: 1}) {
				t.Errorf("after all leases: %+v", st)
			}
		})
	}
}
