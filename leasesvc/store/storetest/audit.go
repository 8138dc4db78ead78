package storetest

import (
	"errors"
	"fmt"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/store"
)

// testHistory: the three events of a lease make one record; stopping is no error.
func testHistory(t *testing.T, open Opener) {
	s := open(t, 0)
	defer s.Close()
	load(t, s)
	older, other := commit(1, 7), commit(2, 8)
	gone, fenced := revoke(older, 3, t0.Add(time.Minute)), fence(older, 3, 4, t0.Add(2*time.Minute))
	newer := commit(5, 7)
	newer.Address.BoundAt = t0.Add(3 * time.Minute)
	newer.Audit = newer.Address.Audit()
	for _, c := range []lease.Commit{older, other, gone, fenced, newer} {
		mustCommit(t, s, store.Tx{Commits: []lease.Commit{c}})
	}
	var got []lease.Audit
	collect := func(a lease.Audit) bool { got = append(got, a); return true }
	if err := s.History(t.Context(), older.Address.Addr, time.Time{}, collect); err != nil {
		t.Fatal(err)
	}
	if d := gocmp.Diff([]lease.Audit{newer.Audit, fenced.Audit}, got, same); d != "" {
		t.Error(d)
	}
	got = nil
	once := func(a lease.Audit) bool { collect(a); return false }
	if err := s.History(t.Context(), older.Address.Addr, time.Time{}, once); err != nil || len(got) != 1 {
		t.Errorf("%d records, %v: want one and no error when yield says stop", len(got), err)
	}
	if err := s.History(t.Context(), host, time.Time{}, collect); err == nil {
		t.Error("history of an IPv6 address: no error")
	}
}

// revoke returns the end of the lease that c bound.
func revoke(c lease.Commit, rev lease.Rev, at time.Time) lease.Commit {
	a := c.Address
	a.State, a.Rev, a.RevokeRev, a.UnboundAt, a.End, a.Valid = lease.Revoking, rev, rev, at, lease.ReasonExpired, 0
	return lease.Commit{Rev: rev, Address: a, Audit: a.Audit(), Record: lease.UnbindRecord(rev, a.Ref())}
}

// fence returns the fence of the lease that c bound and that was revoked at a revision.
func fence(c lease.Commit, revoked, rev lease.Rev, at time.Time) lease.Commit {
	a := revoke(c, revoked, at.Add(-time.Minute)).Address
	a.State, a.Rev, a.FencedAt = lease.Hold, rev, at
	return lease.Commit{Rev: rev, Address: a, Audit: a.Audit(), Record: lease.Record{Rev: rev}}
}

// history commits n events of a model.
func history(t *testing.T, s store.Store, m *model, n int) {
	t.Helper()
	var last *store.Pending
	for _, tx := range m.txs(n) {
		last = s.Commit(tx)
	}
	if err := last.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// testWho is I14 over random histories and reopenings.
func testWho(seed uint64) func(*testing.T, Opener) {
	return func(t *testing.T, open Opener) {
		s := open(t, 0)
		m := newModel(seed, load(t, s).State)
		for range 5 {
			history(t, s, m, 80)
			m.compare(t, s, 4)
			closeStore(t, s)
			s = open(t, 0)
			m.compare(t, s, 4)
		}
		closeStore(t, s)
	}
}

var sameEvents = gocmp.Options{same, cmpopts.EquateEmpty(), cmpopts.IgnoreFields(store.AuditEvent{}, "Chain")}

// every reads the whole log, limit records at a time, and checks that a reader who begins anywhere sees the same chain.
func every(t *testing.T, s store.Store, limit int) []store.AuditEvent {
	t.Helper()
	var out []store.AuditEvent
	for after := lease.Rev(0); ; {
		evs, err := s.Events(t.Context(), after, limit)
		if err != nil {
			t.Fatal(err)
		}
		if len(evs) == 0 {
			return out
		}
		if len(evs) > limit {
			t.Fatalf("%d events: want at most %d", len(evs), limit)
		}
		out = append(out, evs...)
		after = evs[len(evs)-1].Rev
	}
}

// testEvents: the log holds every event, in order; its chain is the same wherever one begins to read, after reopening too.
func testEvents(t *testing.T, open Opener) {
	s := open(t, 0)
	m := newModel(1, load(t, s).State)
	if evs, err := s.Events(t.Context(), 0, 10); err != nil || len(evs) != 0 {
		t.Errorf("new store: %d events, %v", len(evs), err)
	}
	history(t, s, m, 400)
	whole := every(t, s, 1000)
	if d := gocmp.Diff(m.events, whole, sameEvents); d != "" {
		t.Fatal(d)
	}
	chains := map[store.Chain]bool{}
	for _, ev := range whole {
		chains[ev.Chain] = true
	}
	if len(chains) != len(whole) || chains[store.Chain{}] {
		t.Errorf("%d values of the chain for %d events", len(chains), len(whole))
	}
	closeStore(t, s)
	s = open(t, 0)
	defer s.Close()
	for _, limit := range []int{1, 7, 64} {
		if d := gocmp.Diff(whole, every(t, s, limit), same); d != "" {
			t.Errorf("%d at a time: %s", limit, d)
		}
	}
	if evs, err := s.Events(t.Context(), m.rev, 10); err != nil || len(evs) != 0 {
		t.Errorf("after the newest: %d events, %v", len(evs), err)
	}
}

// testPrune: what was fenced before the instant goes, in bounded steps; what lives, and what was fenced later, stays whole.
func testPrune(t *testing.T, open Opener) {
	s := open(t, 0)
	m := newModel(2, load(t, s).State)
	var before time.Time
	for range 6 {
		history(t, s, m, 400)
		chains := map[lease.Rev]store.Chain{}
		for _, ev := range every(t, s, 1000) {
			chains[ev.Rev] = ev.Chain
		}
		if b := t0.Add(m.now.Sub(t0) * time.Duration(1+m.rng.IntN(20)) / 20); b.After(before) {
			before = b
		}
		prune(t, s, before)
		m.forget(before)
		closeStore(t, s)
		s = open(t, 0)
		left := every(t, s, 50)
		if d := gocmp.Diff(m.events, left, sameEvents); d != "" {
			t.Fatal(d)
		}
		for _, ev := range left {
			if ev.Chain != chains[ev.Rev] && ev.Chain != (store.Chain{}) {
				t.Fatalf("chain at %d is another than before the pruning", ev.Rev)
			}
			if ev.At.After(before) && ev.Chain == (store.Chain{}) {
				t.Fatalf("record %d has no chain: want one, it is newer than what was pruned", ev.Rev)
			}
		}
		m.compare(t, s, 4)
	}
	prune(t, s, m.now.Add(time.Hour))
	m.forget(m.now.Add(time.Hour))
	m.compare(t, s, 4)
	closeStore(t, s)
}

func prune(t *testing.T, s store.Store, before time.Time) {
	t.Helper()
	for range 1000 {
		more, err := s.Prune(t.Context(), before)
		if err != nil {
			t.Fatal(err)
		}
		if !more {
			return
		}
	}
	t.Fatal("1000 steps of pruning, and still more to do")
}

// RunCrash runs the part of the suite that needs to see what a crash leaves. newStore returns an Opener over a fresh place,
// and a function that returns an Opener over what is durable there at this instant.
func RunCrash(t *testing.T, newStore func(t *testing.T) (Opener, func(t *testing.T) Opener)) {
	for seed := range uint64(3) {
		t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) {
			open, image := newStore(t)
			testCrash(t, seed, open, image)
		})
	}
}

// testCrash: whatever was acknowledged is there after a crash at any acknowledgement, and the audit log says the truth.
func testCrash(t *testing.T, seed uint64, open Opener, image func(t *testing.T) Opener) {
	s := open(t, 0)
	defer s.Close()
	m := newModel(seed, load(t, s).State)
	history(t, s, m, 50)
	for _, tx := range m.txs(120) {
		mustCommit(t, s, tx)
		if m.rng.IntN(20) == 0 {
			before := t0.Add(m.now.Sub(t0) / 4)
			prune(t, s, before)
			m.forget(before)
		}
		last := tx.Commits[len(tx.Commits)-1]
		c := image(t)(t, 0)
		l := load(t, c)
		if l.Last != last.Rev {
			t.Fatalf("revision %d after a crash, %d was acknowledged", l.Last, last.Rev)
		}
		for _, a := range l.Addresses {
			if a.Resource == last.Address.Resource && !gocmp.Equal(a, last.Address, same) {
				t.Fatal(gocmp.Diff(last.Address, a, same))
			}
		}
		closeStore(t, c)
	}
	c := image(t)(t, 0)
	defer c.Close()
	m.compare(t, c, 20)
	if err := s.Commit(store.Tx{Commits: []lease.Commit{commit(m.rev+2, 1)}}).Wait(t.Context()); !errors.Is(err, store.ErrOrder) {
		t.Errorf("the store that goes on: %v, want ErrOrder", err)
	}
}
