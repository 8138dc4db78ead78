package lease_test

import (
	"slices"
	"time"

	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/lease/replica"
)

// push sends what is committed to the gateways with a session, as the service does.
func (s *sim) push() {
	for _, g := range s.gates {
		if g.session == 0 || g.sent >= lease.Rev(len(s.history)) {
			continue
		}
		b := lease.Batch{Session: g.session, From: g.sent + 1, To: lease.Rev(len(s.history))}
		for _, r := range s.history[g.sent:] {
			if r.Kind != lease.KindNone {
				b.Records = append(b.Records, r)
			}
		}
		g.sent = b.To
		s.net = append(s.net, packet{g, g.stream, b})
	}
}

// deliver takes one message off the network, usually the oldest; it may also vanish or arrive again.
func (s *sim) deliver() error {
	if len(s.net) == 0 {
		return nil
	}
	i := 0
	if s.draw(8) == 0 {
		i = s.draw(len(s.net))
	}
	p := s.net[i]
	fate := s.draw(40)
	if fate != 1 { // 1: it comes again
		s.net = slices.Delete(s.net, i, i+1)
	}
	if fate == 0 || p.stream != p.gate.stream && fate != 2 { // lost; 2: a late message of an earlier stream is seen
		return nil
	}
	switch m := p.msg.(type) {
	case lease.Hello:
		s.onHello(p.gate, m)
	case lease.Heartbeat:
		s.reply(p.gate, m.Session, m.SentBootNS)
	case lease.Ack:
		_ = s.fence.Ack(p.gate.name, m.Session, m.Applied) // an old session is refused
	default:
		p.gate.receive(s, m)
	}
	return nil
}

func (s *sim) onHello(g *gate, h lease.Hello) {
	m := s.fence.Hello(s.now, g.name, h.Instance)
	s.members[g.name] = m
	g.session, g.sent = m.Session, h.HaveRev
	s.reply(g, m.Session, h.SentBootNS)
	if h.HaveRev != 0 {
		return
	}
	rev := s.cell.Last()
	first := lease.SnapshotChunk{Session: m.Session, Rev: rev, Records: []lease.Record{lease.PoolRecord(0, s.core.Pool(), false)}}
	second := lease.SnapshotChunk{Session: m.Session, Rev: rev, Index: 1, Last: true}
	for b := range s.core.Bindings() {
		second.Records = append(second.Records, lease.BindRecord(b.Gen.Rev(), b))
	}
	g.sent = rev
	s.net = append(s.net, packet{g, g.stream, first}, packet{g, g.stream, second})
}

func (s *sim) reply(g *gate, session, echo uint64) {
	d, floor, err := s.fence.Grant(s.now, g.name, session, s.cell.Last())
	if err != nil {
		return
	}
	if s.bug == "floor ignored" {
		floor = 0
	}
	s.net = append(s.net, packet{g, g.stream, lease.SessionReply{
		Session: session, EchoBootNS: echo, GrantNS: uint64(d), Floor: floor, Cluster: lease.ClusterID{1}, Epoch: 1,
	}})
}

// receive is the gateway daemon: apply, then acknowledge.
func (g *gate) receive(s *sim, msg any) {
	var out replica.Out
	var err error
	switch m := msg.(type) {
	case lease.SessionReply:
		if s.bug == "deadline from the receipt" {
			m.GrantNS += g.boot(s.now) - m.EchoBootNS
		}
		out, err = g.rep.Session(m)
	case lease.SnapshotChunk:
		out, err = g.rep.Snapshot(m)
	case lease.Batch:
		out, err = g.rep.Batch(m)
	}
	g.emit(s, out)
	if err != nil {
		s.fence.Close(g.name, g.session)
		g.stream, g.session = 0, 0
		return
	}
	if out.Change != nil {
		if s.bug == "acknowledged before applied" && s.draw(2) == 0 {
			g.emit(s, g.rep.Applied(out.Change.Rev))
			return
		}
		g.apply(out.Change)
		g.emit(s, g.rep.Applied(out.Change.Rev))
	}
}

func (g *gate) apply(c *replica.Change) {
	if c.Replace {
		g.table = map[lease.Resource]lease.Binding{}
	}
	for _, b := range c.Upserts {
		g.table[b.Resource] = b
	}
	for _, r := range c.Deletes {
		delete(g.table, r)
	}
}

func (g *gate) emit(s *sim, out replica.Out) {
	if out.Ack != nil {
		s.net = append(s.net, packet{g, g.stream, *out.Ack})
	}
	if out.Deadline != 0 {
		g.deadline = out.Deadline
	}
}

// settle lets a sim come to rest with everything up: streams that lost something break, and nothing is lost any more.
func (s *sim) settle() error {
	draw := s.draw
	s.draw = func(n int) int { return n - 1 }
	defer func() { s.draw = draw }()
	for _, g := range s.gates {
		s.fence.Close(g.name, g.session)
		g.stream, g.session = 0, 0
	}
	for range 60 {
		s.now += 500 * time.Millisecond
		if _, err := s.step(lease.Tick{}); err != nil {
			return err
		}
		if _, err := s.step(lease.FenceTo{Rev: s.fence.Watermark(s.now)}); err != nil {
			return err
		}
		for _, g := range s.gates {
			s.hello(g)
		}
		s.push()
		for len(s.net) > 0 {
			s.push()
			if err := s.deliver(); err != nil {
				return err
			}
			if err := s.check(); err != nil {
				return err
			}
		}
	}
	return nil
}
