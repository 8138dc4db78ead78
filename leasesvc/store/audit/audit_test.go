package audit

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	storev1 "github.com/dstm-project/dstm/api/store/v1"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/store"
)

var t0 = time.Unix(1_800_000_000, 0)

type pair struct{ k, v []byte }

// memory is a log in two sorted lists.
type memory struct {
	head       storev1.AuditHead
	log, index []pair
}

func find(ps []pair, k []byte) (int, bool) {
	return slices.BinarySearchFunc(ps, k, func(p pair, k []byte) int { return bytes.Compare(p.k, k) })
}

func put(ps []pair, k, v []byte) []pair {
	i, found := find(ps, k)
	if found {
		ps[i].v = v
		return ps
	}
	return slices.Insert(ps, i, pair{k, v})
}

func (m *memory) Record(from lease.Rev) (lease.Rev, []byte, error) {
	i, _ := find(m.log, Key(from))
	if i == len(m.log) {
		return 0, nil, nil
	}
	rev, err := KeyRev(m.log[i].k)
	return rev, m.log[i].v, err
}

func (m *memory) First(key []byte) (k, v []byte, err error) {
	if i, _ := find(m.index, key); i < len(m.index) {
		return m.index[i].k, m.index[i].v, nil
	}
	return nil, nil, nil
}

func (m *memory) Last(key []byte) (k, v []byte, err error) {
	i, found := find(m.index, key)
	if !found {
		i--
	}
	if i < 0 {
		return nil, nil, nil
	}
	return m.index[i].k, m.index[i].v, nil
}

func (m *memory) append(t testing.TB, a lease.Address) {
	t.Helper()
	e, err := Append(&m.head, lease.Commit{Rev: a.Rev, Address: a, Audit: a.Audit()})
	if err != nil {
		t.Fatal(err)
	}
	m.log, m.index = put(m.log, e.Key, e.Value), put(m.index, e.IndexKey, e.IndexValue)
}

func (m *memory) prune(t testing.TB, before time.Time, limit int) (more bool) {
	t.Helper()
	out, err := Prune(m, &m.head, before, limit)
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range out.Log {
		i, found := find(m.log, k)
		if !found {
			t.Fatalf("record %x is taken out twice", k)
		}
		m.log = slices.Delete(m.log, i, i+1)
	}
	for _, k := range out.Index {
		i, found := find(m.index, k)
		if !found {
			t.Fatalf("index %x is taken out twice", k)
		}
		m.index = slices.Delete(m.index, i, i+1)
	}
	return out.More
}

// verify checks log and index.
func (m *memory) verify() error {
	v := NewVerifier(&m.head)
	for _, p := range m.log {
		if _, err := v.Add(p.k, p.v); err != nil {
			return err
		}
	}
	if err := v.End(); err != nil {
		return err
	}
	for _, p := range m.index {
		l, err := DecodeLease(p.k, p.v)
		if err != nil {
			return err
		}
		if err := CheckLease(m, &m.head, l); err != nil {
			return err
		}
	}
	return nil
}

func bound(rev lease.Rev, n byte) lease.Address {
	return lease.Address{
		Resource: lease.Whole(netip.AddrFrom4([4]byte{198, 51, 100, n})), State: lease.Bound, Gen: lease.MakeGen(1, rev), Rev: rev,
		Host: "host-0123456789abcdef012", Source: netip.MustParseAddr("2001:db8:1:2:3:4:5:6"), TEP: netip.MustParseAddr("2001:db8:a::1"),
		Trigger: lease.TriggerDNS, BoundAt: t0.Add(time.Duration(rev) * time.Second),
	}
}

func ended(a lease.Address, rev lease.Rev) lease.Address {
	a.State, a.Rev, a.RevokeRev, a.UnboundAt, a.End = lease.Revoking, rev, rev, t0.Add(time.Duration(rev)*time.Second), lease.ReasonIdle
	return a
}

func fenced(a lease.Address, rev lease.Rev) lease.Address {
	a.State, a.Rev, a.FencedAt = lease.Hold, rev, t0.Add(time.Duration(rev)*time.Second)
	return a
}

// sample is a log of n leases of 8 addresses, the last of which live; address 9 has one that began before all others.
func sample(t testing.TB, n int) *memory {
	m := &memory{}
	rev := lease.Rev(1)
	m.append(t, bound(rev, 9))
	var live []lease.Address
	for i := range n {
		rev++
		a := bound(rev, byte(i%8))
		m.append(t, a)
		if live = append(live, a); len(live) == 8 {
			old := ended(live[0], rev+1)
			m.append(t, old)
			m.append(t, fenced(old, rev+5)) // other events of the store lie between
			live, rev = live[1:], rev+5
		}
	}
	return m
}

func TestVerify(t *testing.T) {
	for name, m := range map[string]*memory{"whole": sample(t, 200), "pruned": pruned(t, 200), "empty": {}} {
		if err := m.verify(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// pruned is a sample of which half is gone, except for the lease that lives since the beginning.
func pruned(t testing.TB, n int) *memory {
	m := sample(t, n)
	for m.prune(t, t0.Add(time.Duration(m.head.LastRev/2)*time.Second), 10) {
	}
	if rev, _, err := m.Record(2); err != nil || rev < lease.Rev(n) || len(m.log) >= 3*n-20 {
		t.Fatalf("%d records left, the second at %d: %v", len(m.log), rev, err)
	}
	return m
}

// TestDamage: any change of a log is found.
func TestDamage(t *testing.T) {
	flip := func(p *pair, i int) {
		p.v = bytes.Clone(p.v)
		p.v[i%len(p.v)] ^= 1
	}
	for _, c := range []struct {
		name string
		do   func(m *memory, i int)
	}{
		{"record changed", func(m *memory, i int) { flip(&m.log[i], i) }},
		{"record lost", func(m *memory, i int) { m.log = slices.Delete(m.log, i, i+1) }},
		{"records exchanged", func(m *memory, i int) {
			j := (i + 1) % len(m.log)
			m.log[i].v, m.log[j].v = m.log[j].v, m.log[i].v
		}},
		{"record moved", func(m *memory, i int) { m.log[i].k = Key(lease.Rev(m.head.LastRev) + 1) }},
		{"end lost", func(m *memory, i int) { m.log = m.log[:i] }},
		{"end added", func(m *memory, i int) { m.log = append(m.log, pair{Key(lease.Rev(m.head.LastRev) + 1), m.log[i].v}) }},
		{"end added with head", func(m *memory, i int) {
			m.head.LastRev++
			m.log = append(m.log, pair{Key(lease.Rev(m.head.LastRev)), m.log[i].v})
		}},
		{"base changed", func(m *memory, _ int) { m.head.Base = bytes.Repeat([]byte{1}, 16) }},
		{"head changed", func(m *memory, i int) { m.head.Chain[i%16] ^= 1 }},
		{"index changed", func(m *memory, i int) {
			p := &m.index[i%len(m.index)]
			l, err := DecodeLease(p.k, p.v)
			if err != nil {
				panic(err)
			}
			l.Unbound = l.Bound + 1000
			p.v = l.value()
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			for name, make := range map[string]func(testing.TB, int) *memory{"whole": sample, "pruned": pruned} {
				for i := range len(make(t, 40).log) {
					m := make(t, 40)
					c.do(m, i)
					if err := m.verify(); err == nil {
						t.Errorf("%s: nothing found with record %d", name, i)
					}
				}
			}
		})
	}
}

// TestPlace: the error says where, within 64 revisions of records.
func TestPlace(t *testing.T) {
	m := sample(t, 200)
	i, _ := find(m.log, Key(200))
	ev, err := Decode(m.log[i].k, m.log[i].v)
	if err != nil {
		t.Fatal(err)
	}
	ev.At = ev.At.Add(time.Hour)
	if m.log[i].v, err = proto.Marshal(encode(ev)); err != nil {
		t.Fatal(err)
	}
	err = m.verify()
	if !errors.Is(err, ErrChain) || !strings.Contains(fmt.Sprint(err), "after 194 and before 256") {
		t.Errorf("got %v, want the place between 194 and 256", err)
	}
}

// TestAppendRefusals: what no core makes is not written.
func TestAppendRefusals(t *testing.T) {
	for name, a := range map[string]lease.Address{
		"generation of another revision": func() lease.Address { a := bound(7, 1); a.Gen = lease.MakeGen(1, 6); return a }(),
		"generation of the future":       func() lease.Address { a := ended(bound(8, 1), 7); return a }(),
		"behind the head":                ended(bound(3, 1), 5),
	} {
		m := &memory{head: storev1.AuditHead{LastRev: 5}}
		if _, err := Append(&m.head, lease.Commit{Rev: a.Rev, Address: a, Audit: a.Audit()}); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	m := &memory{}
	if e, err := Append(&m.head, lease.Commit{Rev: 1, Address: bound(1, 1)}); err != nil || e.Key != nil || m.head.LastRev != 0 {
		t.Errorf("a commit without audit record: %v, %v, head at %d", e, err, m.head.LastRev)
	}
}

// TestSize: N9 asks for at most 300 bytes a lease, the index included. bbolt adds 16 bytes to each of the four pairs; how
// full its pages are is measured in package boltstore.
func TestSize(t *testing.T) {
	m := &memory{head: storev1.AuditHead{LastRev: 1 << 40}}
	a := bound(1<<40+64, 7) // each is the first of its stretch, which is the dear case
	a.Gen = lease.MakeGen(9, a.Rev)
	m.append(t, a)
	a = ended(a, a.Rev+1<<27) // at 1,000 leases a second, 9 hours later
	m.append(t, a)
	m.append(t, fenced(a, a.Rev+1<<20))
	n := 0
	for _, p := range append(m.log, m.index...) {
		n += len(p.k) + len(p.v) + 16
	}
	if len(a.Host) != 24 || n > 300 {
		t.Errorf("a lease takes %d bytes, with a host id of %d: want at most 300, with 24", n, len(a.Host))
	}
}

func FuzzDecode(f *testing.F) {
	m := sample(f, 10)
	for i := range min(len(m.log), len(m.index)) {
		f.Add(m.log[i].k, m.log[i].v, m.index[i].k, m.index[i].v)
	}
	f.Fuzz(func(t *testing.T, k, v, ik, iv []byte) {
		if ev, err := Decode(k, v); err == nil {
			if err := ev.Valid(); err != nil || ev.Kind < store.AuditBound || ev.Kind > store.AuditFenced || ev.Gen.Rev() > ev.Rev {
				t.Errorf("%+v: %v", ev, err)
			}
			b, err := proto.Marshal(encode(ev))
			if again, err2 := Decode(k, b); err != nil || err2 != nil || again != ev {
				t.Errorf("%+v is %+v after a round trip: %v, %v", ev, again, err, err2)
			}
		}
		if l, err := DecodeLease(ik, iv); err == nil && !bytes.Equal(l.key(), ik) {
			t.Errorf("index key %x is read as %+v", ik, l)
		}
	})
}
