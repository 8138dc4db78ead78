package policy

import (
	"fmt"
	"net/netip"
	"testing"
	"time"
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
	if h, n := q.hosts.Len(), q.nets.Len(); h != maxBuckets || n != maxBuckets || evicted != 2*more {
		t.Errorf("%d hosts, %d /64, %d evictions: want %d each and %d", h, n, evicted, maxBuckets, 2*more)
	}
}
