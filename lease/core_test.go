package lease_test

import (
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/dstm-project/dstm/lease"
)

var (
	epoch  = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	opaque = cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{}, netip.AddrPort{})
	tepA   = netip.MustParseAddr("2001:db8:a::1")
	srcA   = netip.MustParseAddr("2001:db8:1::a")
	srcB   = netip.MustParseAddr("2001:db8:1::b")
	srcC   = netip.MustParseAddr("2001:db8:2::c")
)

func at(d time.Duration) lease.Now { return lease.Now{Mono: d, Wall: epoch.Add(d)} }

func config(prefix string) lease.Config {
	return lease.Config{
		Pool:   lease.Pool{Name: "main", Prefix: netip.MustParsePrefix(prefix), TEP: tepA},
		Timers: lease.DefaultTimers(),
	}
}

func core(t *testing.T, cfg lease.Config, per64 int) (*lease.Core, *lease.Cell) {
	t.Helper()
	cell := lease.NewCell(1, 0, per64)
	c, err := lease.NewCore(cfg, cell, at(0), nil)
	if err != nil {
		t.Fatal(err)
	}
	return c, cell
}

func ref(addr string, gen lease.Gen) lease.Ref {
	return lease.Ref{Resource: lease.Whole(netip.MustParseAddr(addr)), Gen: gen}
}

// A whole life of one address, with every record that it writes.
func TestLife(t *testing.T) {
	c, _ := core(t, config("198.51.100.7/32"), 0)
	g1 := lease.MakeGen(1, 1)
	r := ref("198.51.100.7", g1)
	bound := lease.Address{
		Resource: r.Resource, State: lease.Bound, Gen: g1, Rev: 1, Host: "a", Source: srcA, TEP: tepA, MTU: 1440,
		Trigger: lease.TriggerDNS, BoundAt: epoch, Valid: 15 * time.Minute,
	}
	revoking := bound
	revoking.State, revoking.Rev, revoking.RevokeRev = lease.Revoking, 2, 2
	revoking.UnboundAt, revoking.End, revoking.Valid = epoch.Add(time.Minute), lease.ReasonIdle, 0
	hold := revoking
	hold.State, hold.Rev, hold.FencedAt = lease.Hold, 3, epoch.Add(61*time.Second)
	free := hold
	free.State, free.Rev = lease.Free, 4
	for _, step := range []struct {
		name string
		at   time.Duration
		ev   lease.Event
		want lease.Actions
	}{
		{"bind", 0, lease.Bind{Host: "a", Source: srcA, MTU: 1440, Trigger: lease.TriggerDNS}, lease.Actions{
			Commits: []lease.Commit{{Rev: 1, Address: bound, Audit: bound.Audit(), Record: lease.BindRecord(1, bound.Binding())}},
			Grant:   &lease.Grant{Ref: r, Host: "a", Source: srcA, TEP: tepA, Valid: 15 * time.Minute, MTU: 1440, Rev: 1},
		}},
		{"the pool is dry for another", 0, lease.Bind{Host: "b", Source: srcB}, lease.Actions{Deny: lease.ReasonPoolDry}},
		{"a renewal that promises no more than the bind writes nothing", time.Minute, lease.Renew{Host: "a", Ref: r, Source: srcA}, lease.Actions{
			Grant: &lease.Grant{Ref: r, Host: "a", Source: srcA, TEP: tepA, Valid: 15 * time.Minute, MTU: 1440, Renewed: true, Rev: 1},
		}},
		{"a stranger cannot release", time.Minute, lease.Release{Host: "b", Ref: r}, lease.Actions{Deny: lease.ReasonNotAllowed}},
		{"release", time.Minute, lease.Release{Host: "a", Ref: r}, lease.Actions{
			Commits: []lease.Commit{{Rev: 2, Address: revoking, Audit: revoking.Audit(), Record: lease.UnbindRecord(2, r)}},
			Ended:   []lease.Ended{{Ref: r, Host: "a", Source: srcA, Reason: lease.ReasonIdle}},
		}},
		{"release again succeeds", time.Minute, lease.Release{Host: "a", Ref: r}, lease.Actions{}},
		{"no renewal of what ended", time.Minute, lease.Renew{Host: "a", Ref: r, Source: srcA}, lease.Actions{Deny: lease.ReasonIdle}},
		{"an unfenced address is nobody's", time.Minute, lease.Bind{Host: "a", Source: srcA, Hurry: true}, lease.Actions{Deny: lease.ReasonPoolDry}},
		{"but its last holder may wait for it", time.Minute, lease.Bind{Host: "a", Source: srcA}, lease.Actions{Wait: 2}},
		{"the install does not fence", time.Minute, lease.FenceTo{Rev: 1}, lease.Actions{}},
		{"fenced", 61 * time.Second, lease.FenceTo{Rev: 2}, lease.Actions{
			Commits: []lease.Commit{{Rev: 3, Address: hold, Audit: hold.Audit(), Record: lease.Record{Rev: 3}}},
		}},
		{"held down for another", 62 * time.Second, lease.Bind{Host: "b", Source: srcB}, lease.Actions{Deny: lease.ReasonPoolDry}},
		{"hold-down not over", 180 * time.Second, lease.Tick{}, lease.Actions{}},
		{"free", 181 * time.Second, lease.Tick{}, lease.Actions{Commits: []lease.Commit{{Rev: 4, Address: free, Record: lease.Record{Rev: 4}}}}},
	} {
		got := c.Step(at(step.at), step.ev)
		if diff := cmp.Diff(step.want, got, opaque); diff != "" {
			t.Fatalf("%s: -want +got:\n%s", step.name, diff)
		}
	}
}

func TestChoice(t *testing.T) {
	granted := func(t *testing.T, a lease.Actions) string {
		t.Helper()
		if a.Grant == nil {
			t.Fatalf("refused: %s", a.Deny)
		}
		return a.Grant.Ref.Resource.String()
	}
	t.Run("excluded, requested, longest free", func(t *testing.T) {
		cfg := config("198.51.100.0/29")
		cfg.Exclude = []netip.Addr{netip.MustParseAddr("198.51.100.0"), netip.MustParseAddr("198.51.100.7")}
		c, _ := core(t, cfg, 0)
		if got := granted(t, c.Step(at(0), lease.Bind{Host: "a", Source: srcA, Want: lease.Whole(netip.MustParseAddr("198.51.100.5"))})); got != "198.51.100.5" {
			t.Errorf("requested .5, got %s", got)
		}
		if got := granted(t, c.Step(at(0), lease.Bind{Host: "b", Source: srcB, Want: lease.Whole(netip.MustParseAddr("198.51.100.7"))})); got != "198.51.100.1" {
			t.Errorf("excluded .7 requested, expected .1, got %s", got)
		}
		if st := c.Stats(); st.Size != 6 || st.Bound != 2 || st.Free != 4 {
			t.Errorf("stats %+v", st)
		}
	})
	t.Run("previous, without hold-down for the same host", func(t *testing.T) {
		c, _ := core(t, config("198.51.100.0/29"), 0)
		a := c.Step(at(0), lease.Bind{Host: "a", Source: srcA, Want: lease.Whole(netip.MustParseAddr("198.51.100.3"))})
		c.Step(at(1), lease.Release{Host: "a", Ref: a.Grant.Ref})
		c.Step(at(2), lease.FenceTo{Rev: lease.MaxRev})
		b := c.Step(at(3), lease.Bind{Host: "a", Source: srcA})
		if got := granted(t, b); got != "198.51.100.3" || b.Grant.Gen <= a.Grant.Gen {
			t.Errorf("got %s, after %s", b.Grant.Ref, a.Grant.Ref)
		}
	})
	t.Run("reservations are soft", func(t *testing.T) {
		c, _ := core(t, config("198.51.100.0/31"), 0)
		c.Step(at(0), lease.Reserve{Host: "x"})
		c.Step(at(0), lease.Reserve{Host: "y"})
		c.Step(at(0), lease.Reserve{Host: "z"})
		if st := c.Stats(); st.Reserved != 2 {
			t.Errorf("stats %+v", st)
		}
		if got := granted(t, c.Step(at(1), lease.Bind{Host: "y", Source: srcB})); got != "198.51.100.1" {
			t.Errorf("y had reserved .1, got %s", got)
		}
		if got := granted(t, c.Step(at(1), lease.Bind{Host: "a", Source: srcA})); got != "198.51.100.0" {
			t.Errorf("a got %s", got)
		}
	})
	t.Run("a reservation ends", func(t *testing.T) {
		c, _ := core(t, config("198.51.100.0/31"), 0)
		c.Step(at(0), lease.Reserve{Host: "x"})
		if a := c.Step(at(10*time.Second), lease.Tick{}); len(a.Commits) != 0 || c.Stats().Free != 2 {
			t.Errorf("%+v, %+v", a, c.Stats())
		}
	})
	t.Run("quota of a /64", func(t *testing.T) {
		c, cell := core(t, config("198.51.100.0/29"), 1)
		granted(t, c.Step(at(0), lease.Bind{Host: "a", Source: srcA}))
		if a := c.Step(at(0), lease.Bind{Host: "b", Source: srcB}); a.Deny != lease.ReasonQuota {
			t.Errorf("second of the /64: %+v", a)
		}
		granted(t, c.Step(at(0), lease.Bind{Host: "c", Source: srcC}))
		if r, ok := cell.Where("c"); !ok || r.String() != "198.51.100.1" {
			t.Errorf("c is at %s", r)
		}
	})
}

func TestRenewalWrites(t *testing.T) {
	c, _ := core(t, config("198.51.100.7/32"), 0)
	r := c.Step(at(0), lease.Bind{Host: "a", Source: srcA, MTU: 1440}).Grant.Ref
	commits := func(d time.Duration, mtu uint16, valid time.Duration) []lease.Commit {
		return c.Step(at(d), lease.Renew{Host: "a", Ref: r, Source: srcA, MTU: mtu, Valid: valid}).Commits
	}
	for d := time.Minute; d < 16*time.Minute; d += time.Minute {
		if got := commits(d, 1440, 0); len(got) != 0 {
			t.Errorf("the stored validity covers the promise, yet: %+v", got)
		}
	}
	got := commits(16*time.Minute, 1440, 16*time.Minute)
	if len(got) != 1 || got[0].Address.Valid != 16*time.Minute || got[0].Record.Kind != lease.KindNone {
		t.Errorf("a longer promise than any before: %+v", got)
	}
	got = commits(17*time.Minute, 1400, 0)
	if len(got) != 1 || got[0].Record.Kind != lease.KindBind || got[0].Record.Bind.Gen != r.Gen || got[0].Record.Bind.MTU != 1400 {
		t.Errorf("another MTU travels with the same generation: %+v", got)
	}
	if a := c.Step(at(33*time.Minute), lease.Tick{}); len(a.Ended) != 1 || a.Ended[0].Reason != lease.ReasonExpired {
		t.Errorf("expiry: %+v", a)
	}
}

func TestRestart(t *testing.T) {
	cfg := config("198.51.100.0/29")
	addr := func(last byte, s lease.State, rev, revoke lease.Rev, host string, valid time.Duration) lease.Address {
		return lease.Address{
			Resource: lease.Whole(netip.AddrFrom4([4]byte{198, 51, 100, last})), State: s, Gen: lease.MakeGen(1, rev), Rev: rev,
			RevokeRev: revoke, Host: host, Source: srcA, TEP: tepA, Valid: valid,
		}
	}
	records := []lease.Address{
		addr(1, lease.Bound, 1, 0, "a", time.Minute), addr(2, lease.Bound, 2, 0, "b", time.Hour),
		addr(3, lease.Revoking, 9, 9, "c", 0), addr(4, lease.Revoking, 8, 8, "d", 0), addr(5, lease.Hold, 7, 6, "e", 0),
		addr(6, lease.Bound, 10, 0, "a", time.Hour), addr(7, lease.Free, 5, 4, "g", 0),
	}
	c, err := lease.NewCore(cfg, lease.NewCell(1, 10, 0), at(0), records)
	if err != nil {
		t.Fatal(err)
	}
	if want := (lease.Stats{Size: 8, Free: 2, Bound: 2, Revoking: 2, Hold: 1, Conflict: 1}); c.Stats() != want {
		t.Errorf("stats %+v, want %+v", c.Stats(), want)
	}
	if a := c.Step(at(0), lease.FenceTo{Rev: 8}); len(a.Commits) != 1 || a.Commits[0].Address.Host != "d" {
		t.Errorf("fenced to 8: %+v", a)
	}
	if a := c.Step(at(10*time.Minute-1), lease.Tick{}); len(a.Ended) != 0 {
		t.Errorf("something expired within the grace: %+v", a.Ended)
	}
	if a := c.Step(at(10*time.Minute), lease.Tick{}); len(a.Ended) != 1 || a.Ended[0].Host != "a" {
		t.Errorf("after the grace: %+v", a.Ended)
	}
	if a := c.Step(at(11*time.Minute), lease.Revoke{Ref: ref("198.51.100.6", 0)}); a.Deny != lease.ReasonNone || c.Stats().Conflict != 0 {
		t.Errorf("revoke of a conflict: %+v", a)
	}
}

func TestNewCoreErrors(t *testing.T) {
	bad := lease.DefaultTimers()
	bad.Valid = time.Second
	for _, tt := range []struct {
		name    string
		cfg     lease.Config
		records []lease.Address
		want    string
	}{
		{"host bits", config("198.51.100.1/24"), nil, "pool main: prefix 198.51.100.1/24 is not an IPv4 prefix of /12 to /32 without host bits"},
		{"too large", config("10.0.0.0/8"), nil, "pool main: prefix 10.0.0.0/8 is not an IPv4 prefix of /12 to /32 without host bits"},
		{"timers", lease.Config{Pool: config("198.51.100.0/24").Pool, Timers: bad}, nil, "pool main: validity 1s is outside 2m0s..24h0m0s"},
		{
			"stranger", config("198.51.100.0/24"),
			[]lease.Address{{Resource: lease.Whole(netip.MustParseAddr("192.0.2.1"))}},
			"pool main: stored address 192.0.2.1 is outside of 198.51.100.0/24",
		},
		{
			"future", config("198.51.100.0/24"),
			[]lease.Address{{Resource: lease.Whole(netip.MustParseAddr("198.51.100.1")), Rev: 5}},
			"pool main: address 198.51.100.1 was written at revision 5, the store ends at 0",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := lease.NewCore(tt.cfg, lease.NewCell(1, 0, 0), at(0), tt.records)
			if err == nil || err.Error() != tt.want {
				t.Errorf("got %v, want %s", err, tt.want)
			}
		})
	}
}
