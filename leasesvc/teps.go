package leasesvc

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	leasev1 "github.com/dstm-project/dstm/api/lease/v1"
	"github.com/dstm-project/dstm/internal/failpoint"
	"github.com/dstm-project/dstm/internal/wire"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/store"
)

type tepsAPI struct {
	leasev1.UnimplementedTepsServer
	s *Server
}

const (
	chunkRecords = 1024             // records of one snapshot message
	maxBeat      = 10 * time.Second // between heartbeats
)

// session is one life of a gateway's stream.
type session struct {
	s      *Server
	st     leasev1.Teps_SyncServer
	tep    string
	number uint64
	send   sync.Mutex
}

// Sync implements the Teps service.
func (a tepsAPI) Sync(st leasev1.Teps_SyncServer) error {
	s := a.s
	first, err := st.Recv()
	if err != nil {
		return err
	}
	v, err := wire.SyncUp(first)
	if err != nil {
		return invalid(err)
	}
	hello, ok := v.(lease.Hello)
	if !ok {
		return status.Error(codes.InvalidArgument, "sync: first message: want hello")
	}
	if err := s.checkTEP(callerOf(st.Context()), hello); err != nil {
		return err
	}
	if s.recovering() {
		return s.collect(st, hello)
	}
	ss := &session{s: s, st: st, tep: hello.TEP}
	ctx, cancel := context.WithCancelCause(st.Context())
	defer cancel(nil)
	defer ss.close()
	w, err := ss.open(ctx, hello)
	if err != nil {
		return err
	}
	if slices.Contains(hello.Caps, capLists) {
		if err := ss.lists(first.GetHello().GetLists()); err != nil {
			return err
		}
	}
	s.d.Log.Info("gateway session begins", "tep", ss.tep, "session", ss.number, "have_rev", uint64(hello.HaveRev))
	go func() { cancel(ss.pump(ctx, w)) }()
	go func() { cancel(ss.receive(ctx)) }()
	<-ctx.Done()
	err = context.Cause(ctx)
	s.d.Log.Info("gateway session ends", "tep", ss.tep, "session", ss.number, "err", err)
	return err
}

func (s *Server) checkTEP(c caller, h lease.Hello) error {
	switch {
	case h.TEP != c.id.Name:
		return deny(lease.ReasonNotAllowed, "gateway calls itself %q, its certificate is of %q", h.TEP, c.id.Name)
	case !slices.Contains(s.cfg.TEPs, h.TEP):
		return deny(lease.ReasonNotAllowed, "gateway %q is not known here: teps allows %v", h.TEP, s.cfg.TEPs)
	case h.Cluster != (lease.ClusterID{}) && h.Cluster != s.cluster:
		return deny(lease.ReasonNotAllowed, "gateway %q follows cluster %x, this is cluster %x", h.TEP, h.Cluster, s.cluster)
	}
	return nil
}

// open begins the session: the gateway joins the fence set durably, then gets its first reply and a table to start from.
func (ss *session) open(ctx context.Context, h lease.Hello) (store.Watcher, error) {
	s := ss.s
	s.mu.Lock()
	now := s.now()
	m := s.fence.Hello(now.Mono, h.TEP, h.Instance, h.Question)
	ss.number, s.caps[h.TEP] = m.Session, h.Caps
	joined := s.d.Store.Commit(store.Tx{Members: []lease.Member{m}, Wall: now.Wall})
	s.pending = joined
	s.mu.Unlock()
	if err := s.durable(ctx, joined); err != nil {
		return nil, undurable(err)
	}
	resume := h.HaveRev > 0 && h.Cluster == s.cluster && h.Epoch == s.cell.Epoch()
	s.mu.Lock()
	resume = resume && !s.resync[h.TEP] && h.HaveRev >= s.loaded && h.HaveRev <= s.cell.Last()
	delete(s.resync, h.TEP)
	reply, upto, err := ss.grant(h.SentBootNS)
	var t table
	rev := h.HaveRev
	if !resume {
		t, rev = s.table(), s.cell.Last()
	}
	s.mu.Unlock()
	if err != nil {
		return nil, invalid(err)
	}
	// The table is of memory, which may be ahead of the disk: the grant's barrier comes behind all of it.
	if err := s.durable(ctx, upto); err != nil {
		return nil, undurable(err)
	}
	if err := ss.write(wire.FromSessionReply(reply)); err != nil {
		return nil, err
	}
	if !resume {
		if err := ss.snapshot(rev, t); err != nil {
			return nil, err
		}
	}
	return s.d.Store.Watch(rev), nil
}

// grant extends the deadline of the gateway. The reply may leave once what is returned beside it is durable: it stands
// behind everything that the reply rests on, and shows that this service still owns the store, or a successor that counts
// from its own start would not know of the grant. The caller holds mu.
func (ss *session) grant(sentBootNS uint64) (lease.SessionReply, *store.Pending, error) {
	s := ss.s
	now := s.now().Mono
	g, err := s.fence.Grant(now, ss.tep, ss.number, s.cell.Last())
	if err != nil {
		return lease.SessionReply{}, nil, err
	}
	var tx store.Tx
	if g.Member != nil {
		tx.Members = []lease.Member{*g.Member}
	}
	durable := s.d.Store.Commit(tx)
	return lease.SessionReply{
		Session: ss.number, EchoBootNS: sentBootNS, GrantNS: uint64(g.Session), Floor: g.Floor, Cluster: s.cluster, Epoch: s.cell.Epoch(),
		NextBeatNS: uint64(min(g.Session/4, maxBeat)), Lagging: s.lagging(now, ss.tep),
		ServiceNS: g.ServiceNS, FailStaticNS: uint64(g.FailStatic), Others: g.Others,
	}, durable, nil
}

// lagging reports whether a gateway should attract no traffic because it is late, while another one is not. The caller
// holds mu.
func (s *Server) lagging(now time.Duration, tep string) bool {
	return slices.Contains(s.fence.Lagging(now), tep) && len(s.fence.Serving(now)) > 0
}

// table is every pool and binding of a revision.
type table struct {
	pools    []lease.Record
	bindings []lease.Binding
}

// table copies the table as it is now. The caller holds mu.
func (s *Server) table() table {
	var t table
	bound := 0
	for _, c := range s.cores {
		st := c.Stats()
		bound += st.Bound + st.SetsUsed
	}
	t.bindings = make([]lease.Binding, 0, bound)
	for _, c := range s.cores {
		t.pools = append(t.pools, lease.PoolRecord(0, c.Pool(), false))
		t.bindings = slices.AppendSeq(t.bindings, c.Bindings())
	}
	return t
}

func (ss *session) snapshot(rev lease.Rev, t table) error {
	records, all := t.pools, uint32(len(t.bindings))
	for index := uint32(0); ; index++ {
		n := min(len(t.bindings), chunkRecords)
		for _, b := range t.bindings[:n] {
			records = append(records, lease.BindRecord(b.Gen.Rev(), b))
		}
		t.bindings = t.bindings[n:]
		c := lease.SnapshotChunk{Session: ss.number, Rev: rev, Index: index, Last: len(t.bindings) == 0, Records: records, Bindings: all}
		ss.publish(rev)
		if err := failpoint.Hit("tep-before-chunk"); err != nil {
			return err
		}
		if err := ss.write(wire.FromSnapshotChunk(c)); err != nil {
			return err
		}
		if c.Last {
			return nil
		}
		records = records[:0]
	}
}

// publish lets the gateway acknowledge revisions up to rev, before they are sent.
func (ss *session) publish(rev lease.Rev) {
	ss.s.mu.Lock()
	defer ss.s.mu.Unlock()
	ss.s.fence.Publish(ss.s.now().Mono, rev)
}

func (ss *session) write(m *leasev1.SyncDown) error {
	ss.send.Lock()
	defer ss.send.Unlock()
	return ss.st.Send(m)
}

// pump sends what becomes durable.
func (ss *session) pump(ctx context.Context, w store.Watcher) error {
	for {
		b, err := w.Next(ctx)
		if errors.Is(err, store.ErrCompacted) {
			ss.doubt()
			return status.Error(codes.OutOfRange, "sync: the gateway fell behind what is kept: it gets a whole table next")
		}
		if err != nil {
			return err
		}
		ss.publish(b.To)
		if err := failpoint.Hit("tep-before-batch"); err != nil {
			return err
		}
		if err := ss.write(wire.FromBatch(lease.Batch{Session: ss.number, From: b.From, To: b.To, Records: b.Records})); err != nil {
			return err
		}
	}
}

// doubt makes the next session bring a whole table.
func (ss *session) doubt() {
	ss.s.mu.Lock()
	defer ss.s.mu.Unlock()
	ss.s.resync[ss.tep] = true
}

func (ss *session) receive(ctx context.Context) error {
	for {
		m, err := ss.st.Recv()
		if err != nil {
			return err
		}
		v, err := wire.SyncUp(m)
		if err != nil {
			return invalid(err)
		}
		switch v := v.(type) {
		case lease.Heartbeat:
			err = ss.beat(ctx, v)
		case lease.Ack:
			err = ss.ack(v)
		default:
			err = fmt.Errorf("sync: %T in the middle of a session", v)
		}
		if err != nil {
			return status.Error(codes.FailedPrecondition, err.Error())
		}
	}
}

func (ss *session) beat(ctx context.Context, b lease.Heartbeat) error {
	s := ss.s
	if b.Session != ss.number {
		return fmt.Errorf("heartbeat of session %d in session %d", b.Session, ss.number)
	}
	s.mu.Lock()
	if err := ss.compare(b); err != nil {
		s.mu.Unlock()
		return err
	}
	witness, err := s.fence.Beat(ss.tep, b)
	if err != nil {
		s.mu.Unlock()
		return err
	}
	if witness != nil {
		s.d.Store.Commit(store.Tx{Members: []lease.Member{*witness}}) // the grant's barrier comes behind it
	}
	reply, durable, err := ss.grant(b.SentBootNS)
	s.mu.Unlock()
	if err != nil {
		return err
	}
	s.kick() // a witness may have fenced another one
	if err := s.durable(ctx, durable); err != nil {
		return undurable(err)
	}
	return ss.write(wire.FromSessionReply(reply))
}

// compare checks the gateway's digest when it holds everything there is. The caller holds mu.
func (ss *session) compare(b lease.Heartbeat) error {
	s := ss.s
	if b.Digest == 0 || b.Applied != s.cell.Last() {
		return nil
	}
	var want lease.Digest
	for _, c := range s.cores {
		want.AddPool(c.Pool())
		want += c.Digest()
	}
	if b.Digest == want {
		return nil
	}
	s.m.digests.Inc()
	s.resync[ss.tep] = true
	return fmt.Errorf("table of gateway %s differs at revision %d: it gets a whole one next", ss.tep, b.Applied)
}

// ack moves the fence.
func (ss *session) ack(a lease.Ack) error {
	s := ss.s
	if err := failpoint.Hit("tep-ack"); err != nil {
		return err
	}
	for _, n := range a.Nacks {
		s.d.Log.Warn("gateway refused a record", "tep", ss.tep, "addr", n.Resource.String(), "gen", n.Gen.String(), "reason", n.Reason)
	}
	s.mu.Lock()
	if a.Session != ss.number {
		s.mu.Unlock()
		return fmt.Errorf("acknowledgement of session %d in session %d", a.Session, ss.number)
	}
	err := s.fence.Ack(ss.tep, ss.number, a.Applied)
	s.resync[ss.tep] = s.resync[ss.tep] || len(a.Nacks) > 0
	moved := s.fenceMoved()
	s.mu.Unlock()
	if err != nil {
		return err
	}
	if moved {
		s.acked.Broadcast()
		s.kick()
	}
	if len(a.Nacks) > 0 {
		return fmt.Errorf("gateway %s refused %d records", ss.tep, len(a.Nacks))
	}
	return nil
}

// fenceMoved reports whether an acknowledgement was the last that somebody waits for: with two gateways every other one
// is not. The caller holds mu.
func (s *Server) fenceMoved() bool {
	now := s.now().Mono
	installed := lease.MaxRev
	for _, t := range s.fence.Serving(now) {
		installed = min(installed, s.fence.Acked(t))
	}
	mark := s.fence.Watermark(now)
	moved := installed != s.atServing || mark != s.atAll
	s.atServing, s.atAll = installed, mark
	return moved
}

func (ss *session) close() {
	ss.s.mu.Lock()
	defer ss.s.mu.Unlock()
	delete(ss.s.sessions, ss)
	ss.s.fence.Close(ss.tep, ss.number)
	ss.s.acked.Broadcast()
	ss.s.kick()
}
