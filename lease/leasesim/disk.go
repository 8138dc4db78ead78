package leasesim

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/dstm-project/dstm/lease"
)

// tx is one transaction, as store.Tx.
type tx struct {
	commits   []lease.Commit
	pools     []lease.Record
	members   []lease.Member
	removed   []string
	wall      time.Time
	recovered bool
}

// disk is the durable part of a lease service: the transactions that were written, in order. Nothing else outlives a
// service.
type disk struct {
	w        *world
	cluster  lease.ClusterID
	epoch    lease.Epoch
	restored bool // the log is a copy of an older one, and no transaction with recovered followed
	log      []tx
	history  []lease.Record // history[i] has revision i+1
	owner    *service
}

func (d *disk) last() lease.Rev { return lease.Rev(len(d.history)) }

// append writes one transaction.
func (d *disk) append(t tx) {
	for _, c := range t.commits {
		d.revision(c.Rev, c.Record)
	}
	for _, r := range t.pools {
		d.revision(r.Rev, r)
	}
	d.log = append(d.log, t)
	if t.recovered {
		d.restored = false
	}
	d.w.truth.written(t)
}

func (d *disk) revision(rev lease.Rev, r lease.Record) {
	if rev != d.last()+1 {
		d.w.fail("I3", "revision %d is written after %d", rev, d.last())
	}
	d.history = append(d.history, r)
}

// state is what a log amounts to.
type state struct {
	last      lease.Rev
	wall      time.Time
	members   []lease.Member // by name
	pools     []lease.Pool   // by name
	addresses []lease.Address
}

// load reads the log from its beginning.
func (d *disk) load() state {
	st := state{last: d.last()}
	members, pools := map[string]lease.Member{}, map[string]lease.Pool{}
	at := map[lease.Resource]int{}
	for _, t := range d.log {
		for _, c := range t.commits {
			i, ok := at[c.Address.Resource]
			if !ok {
				i = len(st.addresses)
				at[c.Address.Resource] = i
				st.addresses = append(st.addresses, lease.Address{})
			}
			st.addresses[i] = c.Address
		}
		for _, r := range t.pools {
			if delete(pools, r.Pool.Name); !r.Pool.Removed {
				pools[r.Pool.Name] = r.Pool.Pool
			}
		}
		for _, m := range t.members {
			members[m.TEP] = m
		}
		for _, id := range t.removed {
			delete(members, id)
		}
		if t.wall.After(st.wall) {
			st.wall = t.wall
		}
	}
	for _, m := range members {
		st.members = append(st.members, m)
	}
	slices.SortFunc(st.members, func(a, b lease.Member) int { return strings.Compare(a.TEP, b.TEP) })
	for _, p := range pools {
		st.pools = append(st.pools, p)
	}
	slices.SortFunc(st.pools, func(a, b lease.Pool) int { return strings.Compare(a.Name, b.Name) })
	return st
}

// copy is what a backup holds.
func (d *disk) copy() *disk {
	c := *d
	c.log, c.history, c.owner = slices.Clone(d.log), slices.Clone(d.history), nil
	return &c
}

// pending is a transaction on its way to the disk.
type pending struct {
	tx   tx
	done bool
	err  error
	then []func(error)
}

// wait calls then when the transaction is durable, or failed.
func (p *pending) wait(s *service, then func(error)) {
	if p.done {
		s.soon(func() { then(p.err) })
		return
	}
	p.then = append(p.then, then)
}

// complete wakes all who wait, each in an event of its own.
func (p *pending) complete(s *service, err error) {
	p.done, p.err = true, err
	for _, f := range p.then {
		s.soon(func() { f(err) })
	}
	p.then = nil
}

// commit queues a transaction. The writer takes whatever waits at once: group commit.
func (s *service) commit(t tx) *pending {
	p := &pending{tx: t}
	s.queue = append(s.queue, p)
	if s.writing == nil {
		s.write()
	}
	return p
}

// write takes what waits. It is durable when the event at its end comes.
func (s *service) write() {
	s.writing, s.queue = s.queue, nil
	d := s.w.between(50*time.Microsecond, 2*time.Millisecond)
	if s.w.now < s.w.stalled {
		d += s.w.stalled - s.w.now
	}
	s.after(d, func() {
		group := s.writing
		s.writing = nil
		if s.w.disk.owner != s {
			for _, p := range group {
				p.complete(s, errNotOwner)
			}
			s.w.tracef("%s lost the store", s.name())
			s.soon(func() { s.stop() })
			return
		}
		for _, p := range group {
			s.w.disk.append(p.tx)
			p.complete(s, nil)
		}
		s.pumpAll()
		if len(s.queue) > 0 {
			s.write()
		}
	})
}

// errNotOwner means that another service owns the store.
var errNotOwner = fmt.Errorf("another service owns the store")

// tear leaves a beginning of what was on its way to the disk when a service died: some transactions, and of the last one
// the first commits, as store.Tx allows.
func (s *service) tear() {
	if s.w.disk.owner != s {
		return
	}
	n := s.w.rng.IntN(len(s.writing) + 1)
	for _, p := range s.writing[:n] {
		s.w.disk.append(p.tx)
	}
	if n < len(s.writing) {
		if t := s.writing[n].tx; len(t.commits) > 1 {
			s.w.disk.append(tx{commits: t.commits[:s.w.rng.IntN(len(t.commits))], wall: t.wall})
		}
	}
	s.writing, s.queue = nil, nil
}
