package leasesim

import (
	"slices"
	"time"

	"github.com/dstm-project/dstm/lease"
)

const (
	chunkRecords = 6                // records of one snapshot message: few, so that there are several
	maxBeat      = 10 * time.Second // between heartbeats
)

// session is one life of a gateway's stream at the service, as leasesvc has it.
type session struct {
	s       *service
	st      *stream
	tep     string
	number  uint64
	cursor  lease.Rev // everything up to it was sent
	watches bool
	over    bool
	busy    bool  // a message is being worked on
	inbox   []any // those that wait for that
}

// hello takes a new stream of a gateway.
func (s *service) hello(st *stream, h lease.Hello) {
	if s.dead {
		return
	}
	ss := &session{s: s, st: st, tep: h.TEP}
	st.onEnd[down] = func(string) { ss.close() }
	if h.Cluster != (lease.ClusterID{}) && h.Cluster != s.w.disk.cluster {
		st.close(down, "another cluster")
		return
	}
	if s.recover != nil {
		s.collect(ss)
		return
	}
	s.sessions = append(s.sessions, ss)
	now := s.now()
	m := s.fence.Hello(now.Mono, h.TEP, h.Instance, h.Question)
	ss.number, s.caps[h.TEP] = m.Session, slices.Contains(h.Caps, capPortSets)
	ss.busy = true
	s.pending = s.commit(tx{members: []lease.Member{m}, wall: now.Wall})
	s.pending.wait(s, func(err error) {
		if err == nil && !ss.over {
			ss.open(h)
		}
	})
}

// open makes the first reply and the table that the gateway starts from.
func (ss *session) open(h lease.Hello) {
	s := ss.s
	resume := h.HaveRev > 0 && h.Cluster == s.w.disk.cluster && h.Epoch == s.epoch
	resume = resume && !s.resync[h.TEP] && h.HaveRev >= s.loaded && h.HaveRev <= s.cell.Last()
	delete(s.resync, h.TEP)
	reply, upto, err := ss.grant(h.SentBootNS)
	if err != nil {
		ss.end("grant: " + err.Error())
		return
	}
	ss.cursor = h.HaveRev
	var table []lease.Record
	if !resume {
		table, ss.cursor = s.table(), s.cell.Last()
	}
	if s.w.bug == "table before it is durable" {
		upto = &pending{done: true}
	}
	upto.wait(s, func(err error) {
		if err != nil || ss.over {
			return
		}
		s.w.tracef("%s: session %d of %s, resume %t from %d", s.name(), ss.number, ss.tep, resume, ss.cursor)
		ss.reply(reply)
		if !resume {
			ss.snapshot(ss.cursor, table)
		}
		ss.watches = true
		ss.pump()
		ss.done()
	})
}

// grant extends the deadline of the gateway. The reply may leave once what is returned beside it is durable.
func (ss *session) grant(sentBootNS uint64) (lease.SessionReply, *pending, error) {
	s := ss.s
	now := s.now().Mono
	g, err := s.fence.Grant(now, ss.tep, ss.number, s.cell.Last())
	if err != nil {
		return lease.SessionReply{}, nil, err
	}
	var t tx
	if g.Member != nil {
		t.members = []lease.Member{*g.Member}
	}
	return lease.SessionReply{
		Session: ss.number, EchoBootNS: sentBootNS, GrantNS: uint64(g.Session), Floor: g.Floor, Cluster: s.w.disk.cluster,
		Epoch: s.epoch, NextBeatNS: uint64(min(g.Session/4, maxBeat)), Lagging: s.lagging(now, ss.tep),
		ServiceNS: g.ServiceNS, FailStaticNS: uint64(g.FailStatic), Others: g.Others,
	}, s.commit(t), nil
}

func (s *service) lagging(now time.Duration, tep string) bool {
	return slices.Contains(s.fence.Lagging(now), tep) && len(s.fence.Serving(now)) > 0
}

func (ss *session) reply(r lease.SessionReply) {
	g := ss.s.w.gate(ss.tep)
	ss.s.w.truth.answered(g, ss.st, r)
	ss.send(r)
}

// send gives a message to the stream, in the direction of the gateway.
func (ss *session) send(m any) {
	if !ss.st.ended[down] {
		w := ss.s.w
		ss.st.send(down, func() { w.gate(ss.tep).receive(ss.st, m) })
	}
}

// table returns every pool and binding.
func (s *service) table() []lease.Record {
	var out []lease.Record
	for _, c := range s.cores {
		out = append(out, lease.PoolRecord(0, c.Pool(), false))
	}
	for _, c := range s.cores {
		for b := range c.Bindings() {
			out = append(out, lease.BindRecord(b.Gen.Rev(), b))
		}
	}
	return out
}

func (ss *session) snapshot(rev lease.Rev, table []lease.Record) {
	for index := uint32(0); ; index++ {
		n := min(len(table), chunkRecords)
		last := n == len(table)
		ss.s.fence.Publish(ss.s.now().Mono, rev)
		ss.send(lease.SnapshotChunk{Session: ss.number, Rev: rev, Index: index, Last: last, Records: table[:n]})
		if table = table[n:]; last {
			return
		}
	}
}

// pumpAll sends what has become durable.
func (s *service) pumpAll() {
	for _, ss := range s.sessions {
		if ss.watches && !ss.over {
			s.soon(ss.pump)
		}
	}
}

// pump sends the records after the cursor.
func (ss *session) pump() {
	s := ss.s
	last := s.w.disk.last()
	if ss.over || !ss.watches || ss.cursor >= last || s.w.disk.owner != s {
		return
	}
	if last > s.w.p.ring {
		s.ringBase = max(s.ringBase, last-s.w.p.ring)
	}
	if ss.cursor < s.ringBase {
		s.resync[ss.tep] = true
		ss.end("the gateway fell behind what is kept")
		return
	}
	b := lease.Batch{Session: ss.number, From: ss.cursor + 1, To: last}
	for _, r := range s.w.disk.history[ss.cursor:last] {
		if r.Kind != lease.KindNone {
			b.Records = append(b.Records, r)
		}
	}
	ss.cursor = last
	s.fence.Publish(s.now().Mono, b.To)
	ss.send(b)
}

// receive takes a message of the gateway. They are worked on one after the other.
func (ss *session) receive(m any) {
	if ss.over || ss.s.dead {
		return
	}
	if ss.busy {
		ss.inbox = append(ss.inbox, m)
		return
	}
	switch m := m.(type) {
	case lease.Heartbeat:
		ss.beat(m)
	case lease.Ack:
		ss.ack(m)
	}
}

// done lets the next message in.
func (ss *session) done() {
	ss.busy = false
	for len(ss.inbox) > 0 && !ss.busy && !ss.over {
		m := ss.inbox[0]
		ss.inbox = ss.inbox[1:]
		ss.receive(m)
	}
}

func (ss *session) beat(b lease.Heartbeat) {
	s := ss.s
	if b.Session != ss.number {
		ss.end("heartbeat of another session")
		return
	}
	if !ss.compare(b) {
		s.resync[ss.tep] = true
		ss.end("the table differs")
		return
	}
	if s.w.bug == "no witness" {
		b.ContinuousNS = 0
	}
	witness, err := s.fence.Beat(ss.tep, b)
	if err != nil {
		ss.end("beat: " + err.Error())
		return
	}
	if witness != nil {
		s.commit(tx{members: []lease.Member{*witness}})
	}
	s.w.truth.fenced(s)
	reply, durable, err := ss.grant(b.SentBootNS)
	if err != nil {
		ss.end("grant: " + err.Error())
		return
	}
	s.kick()
	ss.busy = true
	durable.wait(s, func(err error) {
		if err != nil || ss.over {
			return
		}
		ss.reply(reply)
		ss.done()
	})
}

// compare looks at the gateway's digest when it holds everything there is.
func (ss *session) compare(b lease.Heartbeat) bool {
	s := ss.s
	if b.Digest == 0 || b.Applied != s.cell.Last() {
		return true
	}
	return b.Digest == s.digest()
}

func (s *service) digest() lease.Digest {
	var d lease.Digest
	for _, c := range s.cores {
		d.AddPool(c.Pool())
		d += c.Digest()
	}
	return d
}

// ack moves the fence.
func (ss *session) ack(a lease.Ack) {
	s := ss.s
	if a.Session != ss.number {
		ss.end("acknowledgement of another session")
		return
	}
	err := s.fence.Ack(ss.tep, ss.number, a.Applied)
	s.resync[ss.tep] = s.resync[ss.tep] || len(a.Nacks) > 0
	moved := s.fenceMoved()
	if err != nil {
		ss.end(err.Error())
		return
	}
	if moved {
		s.moved()
		s.kick()
	}
	if len(a.Nacks) > 0 {
		ss.end("refused records")
	}
}

// fenceMoved reports whether an acknowledgement was the last that somebody waits for.
func (s *service) fenceMoved() bool {
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

// end closes the stream from this side.
func (ss *session) end(why string) {
	if !ss.over {
		ss.s.w.tracef("%s: session %d of %s ends: %s", ss.s.name(), ss.number, ss.tep, why)
		ss.st.close(down, why)
		ss.close()
	}
}

// close is the end of a session, whoever closed its stream.
func (ss *session) close() {
	if ss.over || ss.s.dead {
		return
	}
	ss.over = true
	s := ss.s
	s.sessions = slices.DeleteFunc(s.sessions, func(o *session) bool { return o == ss })
	s.fence.Close(ss.tep, ss.number)
	s.moved()
	s.kick()
}
