package replica

import (
	"fmt"

	"github.com/dstm-project/dstm/lease"
)

// snapshot is a whole table while it arrives. The old table stays in force until the last chunk.
type snapshot struct {
	rev   lease.Rev
	next  uint32
	seen  map[lease.Resource]lease.Binding
	order []lease.Binding
	pools []lease.Pool
}

// maxRoom is for how many bindings room is made before they come.
const maxRoom = 1 << 20

// Snapshot takes a part of a whole table. With the last part the table at its revision is authoritative, whatever
// generations it holds (F3).
func (r *Replica) Snapshot(c lease.SnapshotChunk) (Out, error) {
	if c.Session != r.session || r.session == 0 || r.refused {
		return Out{}, nil
	}
	if r.snap == nil {
		room := min(c.Bindings, maxRoom)
		r.snap = &snapshot{rev: c.Rev, seen: make(map[lease.Resource]lease.Binding, room), order: make([]lease.Binding, 0, room)}
	}
	s := r.snap
	switch {
	case c.Index != s.next || c.Rev != s.rev:
		return Out{}, r.doubt(fmt.Errorf("snapshot chunk %d at revision %d, expected chunk %d at %d", c.Index, c.Rev, s.next, s.rev))
	case c.Rev < r.have || c.Rev > lease.MaxRev:
		return Out{}, r.doubt(fmt.Errorf("snapshot at revision %d, the table is at %d", c.Rev, r.have))
	}
	s.next++
	for _, rec := range c.Records {
		if nack, ok := r.check(rec); !ok {
			r.refused, r.whole = true, true
			return Out{Ack: &lease.Ack{Session: r.session, Applied: r.applied, Nacks: []lease.Nack{nack}}}, nil
		}
		if err := s.add(rec); err != nil {
			return Out{}, r.doubt(err)
		}
	}
	if !c.Last {
		return Out{}, nil
	}
	r.install(s)
	return Out{Change: &Change{Rev: s.rev, Replace: true, Upserts: s.order, Pools: true}}, nil
}

func (s *snapshot) add(rec lease.Record) error {
	if rec.Rev > s.rev {
		return fmt.Errorf("record of revision %d in a snapshot at %d", rec.Rev, s.rev)
	}
	switch rec.Kind {
	case lease.KindBind:
		s.seen[rec.Bind.Resource] = rec.Bind
		if len(s.seen) == len(s.order) {
			return fmt.Errorf("snapshot at revision %d holds %s twice", s.rev, rec.Bind.Resource)
		}
		s.order = append(s.order, rec.Bind)
	case lease.KindPool:
		if !rec.Pool.Removed {
			s.pools = append(s.pools, rec.Pool.Pool)
		}
	case lease.KindUnbind, lease.KindNone, lease.KindUnknown: // nothing to remove from a whole table
	}
	return nil
}

func (r *Replica) install(s *snapshot) {
	r.snap, r.whole = nil, false
	if seeded("snapshot merged") {
		for res, b := range r.table {
			if _, ok := s.seen[res]; !ok {
				s.seen[res] = b
				s.order = append(s.order, b)
			}
		}
	}
	r.table, r.pools, r.digest = s.seen, map[string]lease.Pool{}, 0
	for _, b := range s.order {
		r.digest.AddBinding(b)
	}
	for _, p := range s.pools {
		r.setPool(lease.PoolChange{Pool: p})
	}
	r.have = s.rev
}

// check says whether a record can be taken at all; the Nack says why not.
func (r *Replica) check(rec lease.Record) (lease.Nack, bool) {
	var err error
	n := lease.Nack{}
	switch rec.Kind {
	case lease.KindBind:
		n.Ref = lease.Ref{Resource: rec.Bind.Resource, Gen: rec.Bind.Gen}
		err = checkBinding(rec.Bind)
	case lease.KindUnbind:
		n.Ref = rec.Unbind
		err = rec.Unbind.Valid()
	case lease.KindPool:
		err = checkPool(rec.Pool)
	default:
		if rec.Critical {
			err = fmt.Errorf("unknown critical record at revision %d", rec.Rev)
		}
	}
	if err != nil {
		n.Reason = err.Error()
	}
	return n, err == nil
}

func checkBinding(b lease.Binding) error {
	if err := b.Valid(); err != nil {
		return err
	}
	if !b.Host.Is6() || b.Host.Is4In6() {
		return fmt.Errorf("binding %s: host %s is not an IPv6 address", b.Resource, b.Host)
	}
	if !b.TEP.Is6() || b.TEP.Is4In6() {
		return fmt.Errorf("binding %s: gateway %s is not an IPv6 address", b.Resource, b.TEP)
	}
	return nil
}

func checkPool(p lease.PoolChange) error {
	switch {
	case p.Name == "":
		return fmt.Errorf("pool %s has no name", p.Prefix)
	case p.Removed:
		return nil
	case !p.Prefix.IsValid() || !p.Prefix.Addr().Is4() || p.Prefix != p.Prefix.Masked():
		return fmt.Errorf("pool %s: %s is not an IPv4 prefix without host bits", p.Name, p.Prefix)
	case !p.TEP.Is6() || p.TEP.Is4In6():
		return fmt.Errorf("pool %s: gateway %s is not an IPv6 address", p.Name, p.TEP)
	}
	return nil
}
