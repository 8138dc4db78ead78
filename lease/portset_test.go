package lease_test

import (
	"net/netip"
	"testing"

	"github.com/dstm-project/dstm/lease"
)

func set(psidLen uint8, psid uint16) lease.Resource {
	return lease.Resource{Addr: netip.MustParseAddr("192.0.2.18"), PSIDLen: psidLen, PSID: psid}
}

// TestPortSetVectors: RFC 7597 appendix A, example 1 (PSID offset 6, PSID length 8, PSID 0x34 = 52), and the arithmetic of
// section 5.1 worked out by hand for the edges.
func TestPortSetVectors(t *testing.T) {
	type ports [2]uint16
	for _, tt := range []struct {
		name  string
		set   lease.Resource
		first []ports
		last  ports
		count int
	}{
		{"RFC 7597 example 1", set(8, 0x34), []ports{{1232, 1235}, {2256, 2259}, {3280, 3283}}, ports{64720, 64723}, 252},
		{"halves, lower", set(1, 0), []ports{{1024, 1535}, {2048, 2559}}, ports{64512, 65023}, 32256},
		{"halves, upper", set(1, 1), []ports{{1536, 2047}, {2560, 3071}}, ports{65024, 65535}, 32256},
		{"smallest sets", set(10, 1023), []ports{{2047, 2047}, {3071, 3071}}, ports{65535, 65535}, 63},
		{"whole", set(0, 0), []ports{{0, 65535}}, ports{0, 65535}, 65536},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var got []ports
			for first, last := range tt.set.Ports() {
				got = append(got, ports{first, last})
			}
			for i, want := range tt.first {
				if got[i] != want {
					t.Errorf("range %d is %v, want %v", i, got[i], want)
				}
			}
			if last := got[len(got)-1]; last != tt.last {
				t.Errorf("last range is %v, want %v", last, tt.last)
			}
			if n := tt.set.PortCount(); n != tt.count {
				t.Errorf("%d ports, want %d", n, tt.count)
			}
		})
	}
}

// TestPortSetsPartition: for every length, each port from 1024 on is in exactly one set and the ranges agree; no port below is
// in any.
func TestPortSetsPartition(t *testing.T) {
	for k := uint8(1); k <= lease.MaxPSIDLen; k++ {
		owner := make([]int, 1<<16)
		for psid := range 1 << k {
			r := set(k, uint16(psid))
			n := 0
			for first, last := range r.Ports() {
				for p := int(first); p <= int(last); p++ {
					owner[p]++
					n++
					if got, ok := lease.PSIDOf(uint16(p), k); !ok || int(got) != psid || !r.HasPort(uint16(p)) {
						t.Fatalf("port %d: psid %d %t, want %d", p, got, ok, psid)
					}
				}
			}
			if n != r.PortCount() {
				t.Errorf("%s has %d ports, PortCount says %d", r, n, r.PortCount())
			}
		}
		for p, n := range owner {
			if want := min(p/1024, 1); n != want {
				t.Fatalf("length %d: port %d is in %d sets, want %d", k, p, n, want)
			}
		}
	}
	if _, ok := lease.PSIDOf(1023, 4); ok || set(4, 15).HasPort(1023) {
		t.Error("port 1023 is in a set")
	}
}

// TestOverlaps compares with the ports themselves.
func TestOverlaps(t *testing.T) {
	all := []lease.Resource{set(0, 0), set(1, 0), set(1, 1), set(2, 0), set(2, 1), set(2, 3), set(4, 5), set(4, 7), set(10, 341)}
	for _, a := range all {
		for _, b := range all {
			want := false
			for p := range 1 << 16 {
				want = want || a.HasPort(uint16(p)) && b.HasPort(uint16(p))
			}
			if got := a.Overlaps(b); got != want {
				t.Errorf("%s and %s overlap: %t, want %t", a, b, got, want)
			}
		}
	}
	other := set(2, 1)
	other.Addr = netip.MustParseAddr("192.0.2.19")
	if set(2, 1).Overlaps(other) {
		t.Error("sets of two addresses overlap")
	}
}
