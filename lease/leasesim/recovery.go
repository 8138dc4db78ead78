package leasesim

import (
	"cmp"
	"slices"

	"github.com/dstm-project/dstm/lease"
)

// recovery is the time after a restore from a copy, as in leasesvc: nothing is leased until every gateway that may forward
// has said what it holds.
type recovery struct {
	waiting map[string]bool
	held    map[lease.Resource]lease.Binding
}

func newRecovery(s *service) *recovery {
	r := &recovery{waiting: map[string]bool{}, held: map[lease.Resource]lease.Binding{}}
	for _, t := range s.fence.Status(s.now().Mono) {
		r.waiting[t.TEP] = true
	}
	return r
}

// upload and table are what passes between service and gateway then.
type (
	upload struct{}
	table  struct{ held []lease.Binding }
)

// collect asks a gateway for its table and ends the stream.
func (s *service) collect(ss *session) {
	if !s.recover.waiting[ss.tep] {
		ss.st.close(down, "the store is not complete")
		return
	}
	ss.send(upload{})
}

// collected notes what a gateway holds. Of one resource the highest generation counts.
func (s *service) collected(tep string, t table) {
	r := s.recover
	if s.dead || r == nil || !r.waiting[tep] {
		return
	}
	s.w.tracef("%s: %s holds %d bindings", s.name(), tep, len(t.held))
	delete(r.waiting, tep)
	for _, b := range t.held {
		if have, ok := r.held[b.Resource]; !ok || have.Gen < b.Gen {
			r.held[b.Resource] = b
		}
	}
	s.recovered(s.now())
	s.kick()
}

// recovered ends the recovery when it can, and reports whether there is none.
func (s *service) recovered(now lease.Now) bool {
	r := s.recover
	if r == nil {
		return true
	}
	for _, t := range s.fence.Status(now.Mono) {
		if t.Fenced != "" {
			delete(r.waiting, t.TEP)
		}
	}
	if len(r.waiting) > 0 {
		return false
	}
	var held []lease.Binding
	for _, b := range r.held {
		held = append(held, b)
	}
	slices.SortFunc(held, func(a, b lease.Binding) int { return cmp.Compare(b.Gen, a.Gen) })
	t := tx{wall: now.Wall, recovered: true}
	for _, b := range held {
		if c := s.core(lease.Whole(b.Addr)); c != nil {
			acts := c.Step(now, lease.Adopt{Binding: b})
			s.w.truth.stepped(s, now, acts)
			t.commits = append(t.commits, acts.Commits...)
		}
	}
	for _, m := range s.fence.Status(now.Mono) {
		t.members = append(t.members, m.Member)
	}
	s.pending = s.commit(t)
	s.recover = nil
	s.w.truth.collected(r.held)
	s.w.tracef("%s: the store is complete again, %d held", s.name(), len(held))
	return true
}
