package leasesvc

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	leasev1 "github.com/dstm-project/dstm/api/lease/v1"
	"github.com/dstm-project/dstm/internal/wire"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/store"
)

// recovery is the time after a restore from a copy. Leases may be in force that the store does not know, so nothing is
// leased, renewed or taken back until every gateway that may forward has said what its packet path holds, or is fenced.
// Gateways get no session meanwhile: they forward under their deadlines as if the service were away (F9).
type recovery struct {
	waiting map[string]bool // gateways that have not said what they hold
	held    map[lease.Resource]lease.Binding
}

// restored returns the members of a fence set whose store is a copy: any gateway of the configuration may have joined since,
// and those that the copy knows may have been told other things.
func (c *Config) restored(members []lease.Member) []lease.Member {
	for _, id := range c.TEPs {
		if !slices.ContainsFunc(members, func(m lease.Member) bool { return m.TEP == id }) {
			members = append(members, lease.Member{TEP: id})
		}
	}
	for i := range members {
		members[i] = members[i].Restored(c.Timers.FailStatic)
	}
	return members
}

// newRecovery waits for every gateway of the fence set.
func (s *Server) newRecovery() *recovery {
	r := &recovery{waiting: map[string]bool{}, held: map[lease.Resource]lease.Binding{}}
	for _, t := range s.fence.Status(s.now().Mono) {
		r.waiting[t.TEP] = true
	}
	s.d.Log.Warn("the store was restored from a copy: nothing is leased before the gateways have said what they hold", "teps", r.names())
	return r
}

func (r *recovery) names() []string {
	var out []string
	for id := range r.waiting {
		out = append(out, id)
	}
	slices.Sort(out)
	return out
}

func (r *recovery) sentence() string {
	return "the store was restored from a copy: waiting for what these gateways hold, or until they are fenced: " + strings.Join(r.names(), ", ")
}

func (s *Server) recovering() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.recover != nil
}

// complete is the answer to hosts during a recovery; nil when there is none.
func (s *Server) complete() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.refuseRecovering()
}

// refuseRecovering is complete for a caller that holds mu.
func (s *Server) refuseRecovering() error {
	if s.recover == nil {
		return nil
	}
	return deny(lease.ReasonDegradedStore, "%s", s.recover.sentence())
}

// collect asks a gateway for its table and ends the stream: there is no session before all have answered.
func (s *Server) collect(st leasev1.Teps_SyncServer, h lease.Hello) error {
	s.mu.Lock()
	ask := s.recover != nil && s.recover.waiting[h.TEP]
	s.mu.Unlock()
	if ask {
		if err := st.Send(wire.FromUpload()); err != nil {
			return err
		}
		table, err := receiveTable(st)
		if err != nil {
			return err
		}
		s.collected(h.TEP, table)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.refuseRecovering(); err != nil {
		return err
	}
	return deny(lease.ReasonDegradedStore, "the store is complete again: say hello once more")
}

func receiveTable(st leasev1.Teps_SyncServer) ([]lease.Binding, error) {
	var out []lease.Binding
	for {
		m, err := st.Recv()
		if errors.Is(err, io.EOF) {
			return nil, invalid(errors.New("sync: the stream ended in the middle of the table"))
		}
		if err != nil {
			return nil, err
		}
		v, err := wire.SyncUp(m)
		if err != nil {
			return nil, invalid(err)
		}
		c, ok := v.(lease.TableChunk)
		if !ok {
			return nil, invalid(fmt.Errorf("sync: %T instead of a part of the table", v))
		}
		if out = append(out, c.Held...); c.Last {
			return out, nil
		}
	}
}

// collected notes what a gateway holds. Of one resource the highest generation counts.
func (s *Server) collected(tep string, table []lease.Binding) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.recover
	if r == nil || !r.waiting[tep] {
		return
	}
	delete(r.waiting, tep)
	for _, b := range table {
		if have, ok := r.held[b.Resource]; !ok || have.Gen < b.Gen {
			r.held[b.Resource] = b
		}
	}
	s.d.Log.Info("gateway said what it holds", "tep", tep, "bindings", len(table), "waiting", r.names())
	s.recovered(s.now())
	s.kick()
}

// recovered ends the recovery when it can, and reports whether there is none. The caller holds mu.
func (s *Server) recovered(now lease.Now) bool {
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
	var tx store.Tx
	for _, b := range newestFirst(r.held) {
		c := s.core(lease.Whole(b.Addr)) // a port set may be of an address that is whole in the copy
		if c == nil {
			s.d.Log.Warn("a gateway holds an address of no pool", "addr", b.Resource.String())
			continue
		}
		tx.Commits = append(tx.Commits, c.Step(now, lease.Adopt{Binding: b}).Commits...)
	}
	for _, t := range s.fence.Status(now.Mono) {
		tx.Members = append(tx.Members, t.Member)
	}
	tx.Wall, tx.Recovered = now.Wall, true
	s.pending = s.d.Store.Commit(tx)
	s.recover = nil
	s.d.Log.Info("the store is complete again", "held", len(r.held), "events", len(tx.Commits))
	return true
}

// newestFirst is the order of Adopt: where port sets of an address and the whole of it are held, the newer is in force.
func newestFirst(held map[lease.Resource]lease.Binding) []lease.Binding {
	out := make([]lease.Binding, 0, len(held))
	for _, b := range held {
		out = append(out, b)
	}
	slices.SortFunc(out, func(a, b lease.Binding) int { return cmp.Compare(b.Gen, a.Gen) })
	return out
}

// untilFenced is the time until the next gateway is fenced by time. The caller holds mu.
func (s *Server) untilFenced(now lease.Now) time.Duration {
	at, ok := s.fence.Next(now.Mono)
	if !ok {
		return time.Millisecond
	}
	return max(at-now.Mono, time.Millisecond)
}
