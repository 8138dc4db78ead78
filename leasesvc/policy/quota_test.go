package policy

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func noEvictions(t *testing.T) func() {
	return func() { t.Error("a bucket was forgotten") }
}

func from(host, source string) Request {
	return Request{Host: host, Source: netip.MustParseAddr(source)}
}

func TestQuotas(t *testing.T) {
	const a1, a2, b1 = "2001:db8:1::1", "2001:db8:1::2", "2001:db8:2::1"
	conf := QuotasConfig{PerHost: Quota{3, time.Minute}, Per64: Quota{4, time.Minute}}
	byHost := "more than 3 new leases in 1m0s by this host"
	by64 := "more than 4 new leases in 1m0s from this /64"
	begin := at(t, "2026-03-04 12:00")
	q := newQuotas(conf, begin, noEvictions(t))
	for i, c := range []struct {
		after        time.Duration
		host, source string
		want         string // reason, "" = allowed
	}{
		{0, "a", a1, ""},
		{0, "a", a1, ""},
		{0, "a", a1, ""},
		{0, "a", a1, byHost},
		{0, "a", b1, byHost}, // wherever it comes from
		{0, "b", a2, ""},     // the refused ones took nothing from the /64
		{0, "b", a2, by64},
		{0, "b", b1, ""}, // and the one refused by the /64 nothing from the host
		{0, "b", b1, ""},
		{0, "b", b1, byHost},
		{15 * time.Second, "c", a1, ""}, // the /64 earns one every 15 s
		{15 * time.Second, "c", a1, by64},
		{19 * time.Second, "a", b1, byHost}, // a host one every 20 s
		{20 * time.Second, "a", b1, ""},
		{20 * time.Second, "a", b1, byHost},
		{24 * time.Hour, "a", a1, ""}, // a bucket holds no more than its size
		{24 * time.Hour, "a", a1, ""},
		{24 * time.Hour, "a", a1, ""},
		{24 * time.Hour, "a", a1, byHost},
	} {
		if got := q.take(begin.Add(c.after), from(c.host, c.source)); got.Reason != c.want || got.Allowed() != (c.want == "") {
			t.Errorf("step %d: %+v, want %q", i, got, c.want)
		}
	}
}

func TestOneQuota(t *testing.T) {
	now := at(t, "2026-03-04 12:00")
	q := newQuotas(QuotasConfig{}, now, noEvictions(t))
	for range 1000 {
		if got := q.take(now, from("a", "2001:db8::1")); !got.Allowed() {
			t.Fatalf("no quota: %+v", got)
		}
	}
	q = newQuotas(QuotasConfig{Per64: Quota{1, time.Second}}, now, noEvictions(t))
	if got := []bool{
		q.take(now, from("a", "2001:db8::1")).Allowed(), q.take(now, from("b", "2001:db8::2")).Allowed(),
		q.take(now, from("a", "2001:db8:0:1::1")).Allowed(),
	}; got[0] != true || got[1] != false || got[2] != true {
		t.Errorf("quota of the /64 alone: allowed %v", got)
	}
}

// TestEviction: what was forgotten begins with a fresh bucket and not with more, and what was used last is not forgotten.
func TestEviction(t *testing.T) {
	b := newBuckets[int](Quota{5, time.Minute}, 3)
	take := func(k int) (ok, spilled bool) {
		full, ok := b.next(0, k)
		return ok, ok && b.set(0, k, full)
	}
	for range 4 {
		take(1)
	}
	take(2)
	take(3)
	take(1) // the fifth: empty now, and the last one used
	if ok, _ := take(1); ok {
		t.Fatal("a sixth was granted")
	}
	if _, spilled := take(4); !spilled {
		t.Error("2 made room and was not full: not said")
	}
	if ok, _ := take(1); ok {
		t.Error("1 was forgotten, though used after 2 and 3")
	}
	n := 0
	for ok, _ := take(2); ok; ok, _ = take(2) {
		n++
	}
	if n != 5 {
		t.Errorf("the forgotten one got %d, want a fresh bucket of 5", n)
	}
	if b.full.Len() != 3 {
		t.Errorf("%d entries, want 3", b.full.Len())
	}
	if spilled := b.set(time.Hour, 9, time.Hour); spilled {
		t.Error("a full bucket made room: nothing is lost")
	}
}

// TestQuotaBound: over any time a host gets at most a bucket and what it earns meanwhile, however it spreads its tries.
func TestQuotaBound(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		conf := Quota{Binds: rapid.IntRange(1, 50).Draw(t, "binds"), Window: time.Duration(rapid.Int64Range(int64(time.Second), int64(time.Hour)).Draw(t, "window"))}
		b := newBuckets[string](conf, 2)
		var now time.Duration
		granted := 0
		for _, gap := range rapid.SliceOfN(rapid.Int64Range(0, int64(conf.Window)/2), 1, 200).Draw(t, "gaps") {
			now += time.Duration(gap)
			if full, ok := b.next(now, "a"); ok {
				b.set(now, "a", full)
				granted++
			}
			// one more for what the division rounds
			if most := conf.Binds + int(now/(conf.Window/time.Duration(conf.Binds))) + 1; granted > most {
				t.Fatalf("%d granted in %s, want at most %d", granted, now, most)
			}
		}
	})
}

// TestQuotaMemory fills both tables beyond their size.
func TestQuotaMemory(t *testing.T) {
	now := at(t, "2026-03-04 12:00")
	evicted := 0
	q := newQuotas(QuotasConfig{PerHost: Quota{1, time.Minute}, Per64: Quota{1, time.Minute}}, now, func() { evicted++ })
	a := netip.MustParseAddr("2001:db8::1").As16()
	const more = 100
	for i := range maxBuckets + more {
		a[4], a[5], a[6] = byte(i>>16), byte(i>>8), byte(i)
		if d := q.take(now, Request{Host: fmt.Sprint(i), Source: netip.AddrFrom16(a)}); !d.Allowed() {
			t.Fatalf("host %d: %+v", i, d)
		}
	}
	if h, n := q.hosts.full.Len(), q.nets.full.Len(); h != maxBuckets || n != maxBuckets || evicted != 2*more {
		t.Errorf("%d hosts, %d /64, %d evictions: want %d each and %d", h, n, evicted, maxBuckets, 2*more)
	}
}
