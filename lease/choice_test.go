package lease_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/dstm-project/dstm/lease"
)

// grant returns the lease that an event gave.
func grant(t *testing.T, a lease.Actions) lease.Grant {
	t.Helper()
	if a.Grant == nil {
		t.Fatalf("no lease: %s, wait for %d", a.Deny, a.Wait)
	}
	return *a.Grant
}

// TestMove: a host with a new tunnel source keeps its address, under a new generation, once the old one is fenced (L14).
func TestMove(t *testing.T) {
	bind := func(source netip.Addr, hurry bool) lease.Bind {
		return lease.Bind{Host: "a", Source: source, Hurry: hurry}
	}
	t.Run("same address after the fence", func(t *testing.T) {
		c, _ := core(t, config("198.51.100.0/29"), 0)
		old := grant(t, c.Step(at(0), bind(srcA, false)))
		a := c.Step(at(1), bind(srcC, false))
		if want := []lease.Ended{{Ref: old.Ref, Host: "a", Source: srcA, Reason: lease.ReasonMoved}}; a.Wait != 2 || !cmp.Equal(want, a.Ended, opaque) {
			t.Fatalf("wait for %d, ended %+v: want 2 and %+v", a.Wait, a.Ended, want)
		}
		if a := c.Step(at(1), bind(srcC, false)); a.Wait != 2 || len(a.Commits) != 0 {
			t.Errorf("asked again before the fence: %+v", a)
		}
		c.Step(at(2), lease.FenceTo{Rev: 2})
		got := grant(t, c.Step(at(2), bind(srcC, false)))
		if got.Resource != old.Resource || got.Gen <= old.Gen || got.Source != srcC || got.Renewed {
			t.Errorf("moved to %+v", got)
		}
		if d := c.Step(at(3), lease.Renew{Host: "a", Ref: got.Ref, Source: srcA}).Deny; d != lease.ReasonMoved {
			t.Errorf("renewal from elsewhere: %s", d)
		}
	})
	t.Run("another address when the fence takes too long", func(t *testing.T) {
		c, _ := core(t, config("198.51.100.0/29"), 0)
		old := grant(t, c.Step(at(0), bind(srcA, false)))
		c.Step(at(1), bind(srcC, false))
		if got := grant(t, c.Step(at(2), bind(srcC, true))); got.Resource == old.Resource {
			t.Errorf("got %s, which is not fenced", got.Ref)
		}
	})
	t.Run("a full /64 does not take the lease away", func(t *testing.T) {
		c, cell := core(t, config("198.51.100.0/29"), 1)
		grant(t, c.Step(at(0), bind(srcA, false)))
		grant(t, c.Step(at(0), lease.Bind{Host: "c", Source: srcC}))
		if a := c.Step(at(1), bind(srcC, false)); a.Deny != lease.ReasonQuota || len(a.Ended) != 0 {
			t.Errorf("into a full /64: %+v", a)
		}
		if _, ok := cell.Where("a"); !ok {
			t.Error("the lease is gone")
		}
		if a := c.Step(at(1), bind(srcB, false)); a.Wait == 0 {
			t.Errorf("inside its own /64: %+v", a)
		}
	})
	t.Run("what a host gave back it gets back", func(t *testing.T) {
		c, _ := core(t, config("198.51.100.0/29"), 0)
		g := grant(t, c.Step(at(0), bind(srcA, false)))
		c.Step(at(1), lease.Release{Host: "a", Ref: g.Ref})
		if a := c.Step(at(2), bind(srcA, false)); a.Wait != 2 {
			t.Errorf("bound again: %+v", a)
		}
		if got := grant(t, c.Step(at(2), bind(srcA, true))); got.Resource == g.Resource {
			t.Errorf("got %s, which is not fenced", got.Ref)
		}
	})
}

// TestMoveIdentity: where identities are addresses, a host that proves to have had another one takes its address along, and
// whoever comes to the old identity later gets another.
func TestMoveIdentity(t *testing.T) {
	c, cell := core(t, config("198.51.100.0/29"), 0)
	old := grant(t, c.Step(at(0), lease.Bind{Host: "addr:a", Source: srcA}))
	if a := c.Step(at(1), lease.Bind{Host: "addr:b", Source: srcB, From: old.Ref}); a.Wait != 2 || len(a.Ended) != 1 {
		t.Fatalf("%+v: want the old lease ended and a wait for its fence", a)
	}
	other := grant(t, c.Step(at(1), lease.Bind{Host: "addr:a", Source: srcA}))
	c.Step(at(2), lease.FenceTo{Rev: 2})
	got := grant(t, c.Step(at(2), lease.Bind{Host: "addr:b", Source: srcB, From: old.Ref}))
	if got.Resource != old.Resource || got.Gen <= old.Gen || other.Resource == old.Resource {
		t.Errorf("had %s, moved to %s; the next at the old place got %s", old.Ref, got.Ref, other.Ref)
	}
	if r, _ := cell.Where("addr:a"); r != other.Resource {
		t.Errorf("the next at the old place has %s, want what it got: %s", r, other.Resource)
	}
}

// TestFixed: an address of one identity is nobody else's.
func TestFixed(t *testing.T) {
	cfg := config("198.51.100.0/30")
	cfg.Fixed = map[string]netip.Addr{"vip": netip.MustParseAddr("198.51.100.0")}
	c, _ := core(t, cfg, 0)
	own := lease.Whole(cfg.Fixed["vip"])
	for i := range 3 {
		if g := grant(t, c.Step(at(0), lease.Bind{Host: fmt.Sprint(i), Source: srcA, Want: own})); g.Resource == own {
			t.Errorf("host %d got the address of vip", i)
		}
	}
	if d := c.Step(at(0), lease.Bind{Host: "3", Source: srcA}).Deny; d != lease.ReasonPoolDry {
		t.Errorf("with nothing but the fixed address left: %s", d)
	}
	g := grant(t, c.Step(at(0), lease.Bind{Host: "vip", Source: srcB}))
	if g.Resource != own {
		t.Errorf("vip got %s", g.Ref)
	}
	c.Step(at(1), lease.Release{Host: "vip", Ref: g.Ref})
	c.Step(at(2), lease.FenceTo{Rev: lease.MaxRev})
	c.Step(at(time.Hour), lease.Tick{})
	if d := c.Step(at(time.Hour), lease.Bind{Host: "4", Source: srcA, Want: own}); d.Grant != nil && d.Grant.Resource == own {
		t.Error("the address of vip went to another host after a release")
	}
	if g := grant(t, c.Step(at(time.Hour), lease.Bind{Host: "vip", Source: srcB})); g.Resource != own {
		t.Errorf("vip got %s the second time", g.Ref)
	}
}

// TestPressure: validities shrink as a pool fills up, and grow again.
func TestPressure(t *testing.T) {
	c, _ := core(t, config("198.51.100.0/24"), 0)
	var refs []lease.Ref
	for i := range 256 {
		g := grant(t, c.Step(at(0), lease.Bind{Host: fmt.Sprint(i), Source: srcA}))
		want, p := 15*time.Minute, lease.PressureNone
		switch {
		case i >= 243: // no more than 13 of 256 are left
			want, p = 2*time.Minute, lease.PressureFull
		case i >= 217: // 39
			want, p = 15*time.Minute/2, lease.PressureHigh
		}
		if g.Valid != want {
			t.Fatalf("lease %d (pressure %d) is valid for %s, want %s", i, p, g.Valid, want)
		}
		refs = append(refs, g.Ref)
	}
	if p := c.Pressure(); p != lease.PressureDry {
		t.Errorf("pressure %d with nothing left, want dry", p)
	}
	g := grant(t, c.Step(at(time.Minute), lease.Renew{Host: "0", Ref: refs[0], Source: srcA}))
	if g.Valid != 14*time.Minute {
		t.Errorf("a renewal under pressure is valid for %s: want what was promised before, 14m", g.Valid)
	}
	for i, r := range refs[1:] {
		c.Step(at(2*time.Minute), lease.Release{Host: fmt.Sprint(i + 1), Ref: r})
	}
	c.Step(at(2*time.Minute), lease.FenceTo{Rev: lease.MaxRev})
	c.Step(at(time.Hour), lease.Tick{})
	if p := c.Pressure(); p != lease.PressureNone {
		t.Errorf("pressure %d in an empty pool", p)
	}
	small, _ := core(t, config("198.51.100.7/32"), 0)
	if g := grant(t, small.Step(at(0), lease.Bind{Host: "a", Source: srcA})); g.Valid != 15*time.Minute {
		t.Errorf("a pool of one gives %s", g.Valid)
	}
}

// TestPortSets: when addresses run short, hosts that accept one get a port set; an address whose sets are all free is whole
// again; no two leases ever overlap (I1).
func TestPortSets(t *testing.T) {
	cfg := config("198.51.100.0/28")
	cfg.PSIDLen = 2
	c, cell := core(t, cfg, 0)
	held := map[string]lease.Ref{}
	bind := func(host string, portSet bool) lease.Actions {
		a := c.Step(at(0), lease.Bind{Host: host, Source: srcA, PortSet: portSet})
		if a.Grant != nil {
			held[host] = a.Grant.Ref
		}
		for h, x := range held {
			for g, y := range held {
				if h != g && x.Overlaps(y.Resource) {
					t.Fatalf("I1: %s has %s and %s has %s", h, x, g, y)
				}
			}
		}
		return a
	}
	for i := range 16 {
		if g := grant(t, bind(fmt.Sprint("whole", i), true)); (g.PSIDLen != 0) != (i == 15) {
			t.Fatalf("host %d of 16 got %s", i, g.Ref)
		}
	}
	// The last address was cut for the host that accepts a set: three sets are left, and no address.
	if st := c.Stats(); st.Cut != 1 || st.SetsUsed != 1 || st.SetsFree != 3 || st.Free != 0 || st.Size != 16 {
		t.Fatalf("stats %+v: want one address cut and three of its sets free", st)
	}
	if d := bind("proud", false).Deny; d != lease.ReasonPoolDry {
		t.Errorf("a host that wants a whole address: %s", d)
	}
	for i := range 3 {
		if g := grant(t, bind(fmt.Sprint("set", i), true)); g.PSIDLen != 2 {
			t.Errorf("got %s, want a port set", g.Ref)
		}
	}
	if d := bind("late", true).Deny; d != lease.ReasonPoolDry || c.Pressure() != lease.PressureDry {
		t.Errorf("with nothing left: %s, pressure %d", d, c.Pressure())
	}
	bindings := 0
	for range c.Bindings() {
		bindings++
	}
	if bindings != 19 {
		t.Errorf("%d bindings, want 19", bindings)
	}

	// A restart finds the same leases.
	var records []lease.Address
	for in := range c.All(0) {
		records = append(records, in.Address)
	}
	again, err := lease.NewCore(cfg, lease.NewCell(1, cell.Last(), 0), at(0), records)
	if err != nil {
		t.Fatal(err)
	}
	if again.Stats() != c.Stats() {
		t.Errorf("after a restart %+v, before %+v", again.Stats(), c.Stats())
	}
	c = again

	// The four sets leave one after the other; with the last the address is whole again.
	now := time.Minute
	for h, r := range held {
		if r.PSIDLen == 0 {
			continue
		}
		if c.Stats().Cut != 1 {
			t.Errorf("whole again with %s still leased", r)
		}
		c.Step(at(now), lease.Release{Host: h, Ref: r})
		c.Step(at(now), lease.FenceTo{Rev: lease.MaxRev})
		now += cfg.Timers.HoldDown
		c.Step(at(now), lease.Tick{})
	}
	if st := c.Stats(); st.Cut != 0 || st.Free != 1 || st.Bound != 15 {
		t.Errorf("after the last port set %+v, want one whole address free", st)
	}
	c.Step(at(time.Hour), lease.Tick{}) // the others were silent
	c.Step(at(time.Hour), lease.FenceTo{Rev: lease.MaxRev})
	c.Step(at(2*time.Hour), lease.Tick{})
	if st := c.Stats(); st != (lease.Stats{Size: 16, Free: 16}) {
		t.Errorf("at the end %+v, want 16 free addresses", st)
	}
}

// TestPortSetRecords: what a store may hold of port sets.
func TestPortSetRecords(t *testing.T) {
	cfg := config("198.51.100.0/28")
	cfg.PSIDLen = 4
	rec := func(last byte, psidLen uint8, psid uint16, s lease.State, rev lease.Rev) lease.Address {
		return lease.Address{
			Resource: lease.Resource{Addr: netip.AddrFrom4([4]byte{198, 51, 100, last}), PSIDLen: psidLen, PSID: psid},
			State:    s, Gen: lease.MakeGen(1, rev), Rev: rev, Host: fmt.Sprint("h", rev), Source: srcA, TEP: tepA,
		}
	}
	load := func(records ...lease.Address) (*lease.Core, error) {
		return lease.NewCore(cfg, lease.NewCell(1, 100, 0), at(0), records)
	}
	if _, err := load(rec(1, 6, 3, lease.Bound, 1)); err == nil || err.Error() != "pool main: port set 198.51.100.1#3/6 is BOUND in the store, the pool has port sets of length 4: keep the length until it is free" {
		t.Errorf("another length: %v", err)
	}
	c, err := load(rec(1, 6, 3, lease.Free, 1), rec(2, 4, 7, lease.Bound, 2), rec(2, 0, 0, lease.Free, 3))
	if err != nil {
		t.Fatal(err)
	}
	if st := c.Stats(); st.Cut != 1 || st.SetsUsed != 1 || st.SetsFree != 15 || st.Free != 15 {
		t.Errorf("stats %+v", st)
	}
	c, err = load(rec(2, 4, 7, lease.Bound, 2), rec(2, 0, 0, lease.Bound, 3))
	if err != nil {
		t.Fatal(err)
	}
	if st := c.Stats(); st.Conflict != 1 || st.Bound != 0 || st.SetsUsed != 1 {
		t.Errorf("an address leased whole and by port set: %+v, want nobody to have it", st)
	}
	for range c.Bindings() {
		t.Error("a contradiction is served")
	}
}

// TestCoreDigest: the digest follows every event that changes the table.
func TestCoreDigest(t *testing.T) {
	cfg := config("198.51.100.0/29")
	cfg.PSIDLen = 2
	c, cell := core(t, cfg, 0)
	rnd := rand.New(rand.NewPCG(1, 2))
	hosts := []string{"a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l"}
	seen := map[lease.Digest]bool{}
	var now time.Duration
	for range 5000 {
		now += time.Duration(rnd.Int64N(int64(time.Minute)))
		host := hosts[rnd.IntN(len(hosts))]
		source := srcA.As16()
		source[15] = byte(rnd.IntN(2))
		switch rnd.IntN(4) {
		case 0, 1:
			ev := lease.Bind{Host: host, Source: netip.AddrFrom16(source), MTU: uint16(1400 + rnd.IntN(3)), PortSet: rnd.IntN(2) == 0, Hurry: true}
			if r, ok := cell.Where(hosts[rnd.IntN(len(hosts))]); ok && rnd.IntN(4) == 0 {
				in, _ := c.Lookup(now, r)
				ev.From = in.Ref()
			}
			c.Step(at(now), ev)
		case 2:
			if in, ok := c.ByHost(now, host); ok {
				c.Step(at(now), lease.Release{Host: host, Ref: in.Ref()})
			}
		case 3:
			c.Step(at(now), lease.FenceTo{Rev: lease.MaxRev})
			c.Step(at(now), lease.Tick{})
		}
		var want lease.Digest
		for b := range c.Bindings() {
			want.AddBinding(b)
		}
		if got := c.Digest(); got != want {
			t.Fatalf("digest %x, want %x", got, want)
		}
		seen[want] = true
	}
	if len(seen) < 1000 {
		t.Errorf("only %d tables seen", len(seen))
	}
}
