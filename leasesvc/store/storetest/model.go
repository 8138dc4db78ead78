package storetest

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"

	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/store"
)

// model makes up a random history of leases and remembers it in the plainest way: what an audit log must answer.
type model struct {
	rng    *rand.Rand
	epoch  lease.Epoch
	rev    lease.Rev
	now    time.Time
	slots  []slot
	leases []*lease.Audit // in order of their binds
	times  []time.Time    // of every event
	events []store.AuditEvent
}

// slot is one resource: at most one lease at a time.
type slot struct {
	addr lease.Address
	was  *lease.Audit
}

// resources are whole addresses, port sets, and one address that is leased both ways, as after a change of its pool.
func resources() []lease.Resource {
	a := func(n byte) netip.Addr { return netip.AddrFrom4([4]byte{198, 51, 100, n}) }
	rs := []lease.Resource{lease.Whole(a(1)), lease.Whole(a(2)), lease.Whole(a(255))}
	for psid := range uint16(4) {
		rs = append(rs, lease.Resource{Addr: a(3), PSIDLen: 2, PSID: psid})
	}
	return append(rs, lease.Whole(a(4)), lease.Resource{Addr: a(4), PSIDLen: 1, PSID: 1})
}

func newModel(seed uint64, st store.State) *model {
	m := &model{rng: rand.New(rand.NewPCG(seed, 14)), epoch: st.Epoch, rev: st.Last, now: t0}
	for _, r := range resources() {
		m.slots = append(m.slots, slot{addr: lease.Address{Resource: r}})
	}
	return m
}

// step returns the next event, a little later than the last or at the same instant.
func (m *model) step() lease.Commit {
	switch m.rng.IntN(4) {
	case 0:
		m.now = m.now.Add(time.Nanosecond)
	case 1:
		m.now = m.now.Add(time.Duration(m.rng.IntN(5000)) * time.Millisecond)
	}
	m.rev++
	s := &m.slots[m.rng.IntN(len(m.slots))]
	a := &s.addr
	a.Rev = m.rev
	switch {
	case a.State == lease.Bound && m.rng.IntN(3) == 0: // a renewal is no event of the audit log
		return lease.Commit{Rev: m.rev, Address: *a, Record: lease.Record{Rev: m.rev}}
	case a.State == lease.Bound:
		a.State, a.RevokeRev, a.UnboundAt, a.End = lease.Revoking, m.rev, m.now, lease.Reason(7+m.rng.IntN(4))
	case a.State == lease.Revoking:
		a.State, a.FencedAt = lease.Hold, m.now
	default:
		*a = lease.Address{
			Resource: a.Resource, State: lease.Bound, Gen: lease.MakeGen(m.epoch, m.rev), Rev: m.rev,
			Host: fmt.Sprint("host", m.rng.IntN(5)), Source: host, TEP: tep, Trigger: lease.Trigger(m.rng.IntN(5)), BoundAt: m.now,
		}
		s.was = &lease.Audit{}
		m.leases = append(m.leases, s.was)
	}
	*s.was = a.Audit()
	m.times = append(m.times, m.now)
	m.events = append(m.events, m.event(*a))
	return lease.Commit{Rev: m.rev, Address: *a, Audit: a.Audit(), Record: lease.Record{Rev: m.rev}}
}

func (m *model) event(a lease.Address) store.AuditEvent {
	ev := store.AuditEvent{Rev: m.rev, At: m.now, Ref: a.Ref()}
	switch a.State {
	case lease.Bound:
		ev.Kind, ev.Host, ev.Source, ev.TEP, ev.Trigger = store.AuditBound, a.Host, a.Source, a.TEP, a.Trigger
	case lease.Revoking:
		ev.Kind, ev.End = store.AuditUnbound, a.End
	default:
		ev.Kind = store.AuditFenced
	}
	return ev
}

// txs returns n events in transactions of a few.
func (m *model) txs(n int) []store.Tx {
	var out []store.Tx
	for n > 0 {
		var tx store.Tx
		for range min(n, 1+m.rng.IntN(5)) {
			tx.Commits = append(tx.Commits, m.step())
			n--
		}
		tx.Wall = m.now
		out = append(out, tx)
	}
	return out
}

// forget is Prune, run to its end.
func (m *model) forget(before time.Time) {
	old := map[lease.Ref]bool{}
	m.leases = slices.DeleteFunc(m.leases, func(a *lease.Audit) bool {
		if !a.Fenced.IsZero() && a.Fenced.Before(before) {
			old[a.Ref] = true
		}
		return old[a.Ref]
	})
	m.events = slices.DeleteFunc(m.events, func(ev store.AuditEvent) bool { return old[ev.Ref] })
}

// who is the truth about an address, newest first.
func (m *model) who(addr netip.Addr, at time.Time) []lease.Audit {
	var out []lease.Audit
	for _, a := range m.leases {
		if a.Addr == addr && (at.IsZero() || !at.Before(a.Bound) && (a.Fenced.IsZero() || at.Before(a.Fenced))) {
			out = append(out, *a)
		}
	}
	slices.SortFunc(out, func(a, b lease.Audit) int { return cmp.Compare(b.Gen, a.Gen) })
	return out
}

// compare asks the store who had every address, in its whole history and at n instants: of events, one nanosecond beside
// them, or any.
func (m *model) compare(t *testing.T, s store.Store, n int) {
	t.Helper()
	ask := []time.Time{{}, t0.Add(-time.Hour), m.now.Add(time.Hour)}
	for range n {
		at := m.times[m.rng.IntN(len(m.times))]
		ask = append(ask, at, at.Add(1), at.Add(-1), t0.Add(time.Duration(m.rng.Int64N(int64(m.now.Sub(t0))))))
	}
	var addrs []netip.Addr
	for _, r := range m.slots {
		addrs = append(addrs, r.addr.Addr)
	}
	addrs = slices.Compact(addrs) // resources are in order of addresses
	for _, at := range ask {
		for _, addr := range addrs {
			var got []lease.Audit
			err := s.History(t.Context(), addr, at, func(a lease.Audit) bool { got = append(got, a); return true })
			if err != nil {
				t.Fatal(err)
			}
			if d := gocmp.Diff(m.who(addr, at), got, same); d != "" {
				t.Fatalf("%s at %s: -want +got\n%s", addr, at, d)
			}
			only(t, got, at)
		}
	}
}

// only sees to it that at one instant two answers are of different port sets (I14).
func only(t *testing.T, got []lease.Audit, at time.Time) {
	t.Helper()
	seen := map[lease.Resource]bool{}
	for _, a := range got {
		if !at.IsZero() && seen[a.Resource] {
			t.Fatalf("two holders of %s at %s", a.Resource, at)
		}
		seen[a.Resource] = true
	}
}
