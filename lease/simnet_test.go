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
		s.net = append(s.net, packet{gate: g, stream: g.stream, msg: b})
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
	if p.from == nil && p.gate.cut {
		fate = 0
	}
	if fate != 1 { // 1: it comes again
		s.net = slices.Delete(s.net, i, i+1)
	}
	if fate == 0 || p.from == nil && p.stream != p.gate.stream && fate != 2 { // lost; 2: a late message of an earlier stream is seen
		return nil
	}
	switch m := p.msg.(type) {
	case lease.Hello:
		s.onHello(p.gate, m)
	case lease.Heartbeat:
		s.onBeat(p.gate, m)
	case lease.Ack:
		_ = s.fence.Ack(p.gate.name, m.Session, m.Applied) // an old session is refused
	case question:
		quiet := p.gate.rep.Asked(p.gate.boot(s.now))
		if s.bug == "quiet at any time" {
			quiet = true
		}
		s.net = append(s.net, packet{gate: p.from, msg: answer{m.sent, quiet}, from: p.gate})
	case answer:
		s.onAnswer(p.gate, p.from, m)
	default:
		p.gate.receive(s, m)
	}
	return nil
}

func (s *sim) onHello(g *gate, h lease.Hello) {
	m := s.fence.Hello(s.now, g.name, h.Instance, h.Question)
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
	s.net = append(s.net, packet{gate: g, stream: g.stream, msg: first}, packet{gate: g, stream: g.stream, msg: second})
}

func (s *sim) onBeat(g *gate, b lease.Heartbeat) {
	was := s.fenced()
	m, err := s.fence.Beat(g.name, b)
	if err != nil {
		return
	}
	if m != nil {
		s.members[m.TEP] = *m
	}
	s.witness += s.fenced() - was
	s.reply(g, b.Session, b.SentBootNS)
}

// fenced counts the gateways fenced by a witness.
func (s *sim) fenced() int {
	n := 0
	for _, st := range s.fence.Status(s.now) {
		if st.Fenced == "witness" {
			n++
		}
	}
	return n
}

func (s *sim) reply(g *gate, session, echo uint64) {
	gr, err := s.fence.Grant(s.now, g.name, session, s.cell.Last())
	if err != nil {
		return
	}
	if gr.Member != nil {
		s.members[gr.Member.TEP] = *gr.Member
	}
	if s.bug == "floor ignored" {
		gr.Floor = 0
	}
	s.net = append(s.net, packet{gate: g, stream: g.stream, msg: lease.SessionReply{
		Session: session, EchoBootNS: echo, GrantNS: uint64(gr.Session), Floor: gr.Floor, Cluster: lease.ClusterID{1}, Epoch: 1,
		NextBeatNS: uint64(simd / 4), ServiceNS: gr.ServiceNS, FailStaticNS: uint64(gr.FailStatic), Others: gr.Others,
	}})
}

// ask lets a gateway that hears nothing from the service ask the others.
func (s *sim) ask(g *gate) {
	q, out := g.rep.Ask(g.boot(s.now))
	s.goOn(g, out)
	for _, p := range q.Others {
		for _, to := range s.gates {
			if to.name == p.TEP {
				s.net = append(s.net, packet{gate: to, msg: question{q.Sent}, from: g})
			}
		}
	}
}

func (s *sim) onAnswer(g, from *gate, a answer) {
	at := g.boot(s.now)
	if s.bug == "extension after the deadline" {
		at = min(at, g.deadline)
	}
	out := g.rep.Answer(from.name, a.sent, a.quiet, at)
	if s.bug == "extension from the receipt" && out.Deadline != 0 {
		out.Deadline += at - a.sent
	}
	s.goOn(g, out)
}

func (s *sim) goOn(g *gate, out replica.Out) {
	if out.Deadline != 0 {
		s.alone++
	}
	g.emit(s, out)
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
		out, err = g.rep.Session(m, g.boot(s.now))
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
		s.net = append(s.net, packet{gate: g, stream: g.stream, msg: *out.Ack})
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
		g.stream, g.session, g.cut = 0, 0, false
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
