package tc

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/dstm-project/dstm/dataplane/dataplanetest"
	"github.com/dstm-project/dstm/lease"
)

// newTable returns the map as the programs have it, without programs.
func newTable(t testing.TB) table {
	t.Helper()
	dataplanetest.NeedRoot(t)
	spec, err := loadGateway()
	if err != nil {
		t.Fatal(err)
	}
	m, err := ebpf.NewMap(spec.Maps["bindings"])
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return table{m}
}

// bound returns bindings of n addresses from 198.18.0.0 on, of that generation.
func bound(n int, gen lease.Gen) []lease.Binding {
	bs := make([]lease.Binding, n)
	tep := netip.MustParseAddr("2001:db8:a::1")
	for i := range bs {
		var a [4]byte
		binary.BigEndian.PutUint32(a[:], 198<<24|18<<16+uint32(i))
		h := [16]byte{0x20, 0x01, 0x0d, 0xb8, 1}
		copy(h[12:], a[:])
		bs[i] = lease.Binding{Resource: lease.Whole(netip.AddrFrom4(a)), Host: netip.AddrFrom16(h), TEP: tep, Gen: gen, MTU: 1460}
	}
	return bs
}

// TestTableReplace: whatever was there before, the map holds exactly the bindings that it is to hold, and knows of those
// that stay when they were last seen.
func TestTableReplace(t *testing.T) {
	tab := newTable(t)
	all, rng := bound(3*batch, 1), rand.New(rand.NewPCG(1, 2))
	for round := range 8 {
		bs := slices.DeleteFunc(slices.Clone(all), func(lease.Binding) bool { return rng.IntN(3) == 0 })
		for i := range bs {
			bs[i].Gen = lease.Gen(1 + rng.IntN(2))
		}
		if round == 6 {
			bs = nil
		}
		before := map[bindingKey]bindingRecord{}
		err := tab.each(func(k bindingKey, r *bindingRecord) { before[k] = *r })
		if err != nil {
			t.Fatal(err)
		}
		if err := tab.replace(bs); err != nil {
			t.Fatal(err)
		}
		want := map[bindingKey]bindingRecord{}
		for _, b := range bs {
			r := recordOf(b)
			r.LastSeen = before[keyOf(b.Resource)].LastSeen
			want[keyOf(b.Resource)] = r
		}
		n := 0
		err = tab.each(func(k bindingKey, r *bindingRecord) {
			if n++; want[k] != *r {
				t.Errorf("round %d: %v is %+v, want %+v", round, k, *r, want[k])
			}
			if r.LastSeen == 0 { // a program saw a packet
				r.LastSeen = uint64(round + 1)
				if err := tab.Put(k, r); err != nil {
					t.Error(err)
				}
			}
		})
		if err != nil || n != len(bs) {
			t.Fatalf("round %d: %d bindings, %v, want %d", round, n, err, len(bs))
		}
	}
}

// BenchmarkTableReplace measures a whole table for an empty map, and for a map that holds it.
func BenchmarkTableReplace(b *testing.B) {
	for _, n := range []int{10_000, 100_000, 1_000_000} {
		bs := bound(n, 1)
		b.Run(fmt.Sprintf("bindings=%d/new", n), func(b *testing.B) {
			for b.Loop() {
				b.StopTimer()
				tab := newTable(b)
				b.StartTimer()
				if err := tab.replace(bs); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				tab.Close()
				b.StartTimer()
			}
		})
		b.Run(fmt.Sprintf("bindings=%d/same", n), func(b *testing.B) {
			tab := newTable(b)
			if err := tab.replace(bs); err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				if err := tab.replace(bs); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
