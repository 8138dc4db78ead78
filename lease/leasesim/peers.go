package leasesim

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/lease/replica"
)

const (
	minQuestion = 100 * time.Millisecond
	askIdle     = time.Second
)

// question returns where a gateway answers others. Here it is only a name.
func (w *world) question(g *gateway) netip.AddrPort {
	return netip.MustParseAddrPort(fmt.Sprintf("[2001:db8:3::%x]:3546", int(g.node)))
}

// goOn asks the other gateways while the service is silent, as tepd's loop of that name.
func (p *process) goOn() {
	g := p.g
	if g.w.bug == "never asks" {
		return
	}
	q, out := p.rep.Ask(g.boot())
	asked := g.boot() // with nobody to ask, the deadline moves at once
	if q.Sent != 0 {
		asked = q.Sent
	}
	g.ghost.asked(asked)
	p.extend(out, asked)
	every := askIdle
	if e := time.Duration(p.rep.QuestionEvery()); e > 0 {
		every = max(e, minQuestion)
	}
	for _, o := range q.Others {
		p.ask(o, q.Sent, every)
	}
	if q.Sent != 0 && g.w.chance(g.w.p.faults.stray) { // a gateway that is not asked answers, too
		for _, o := range g.w.gates {
			if o != g && !slices.ContainsFunc(q.Others, func(x lease.Peer) bool { return x.TEP == o.name }) {
				p.ask(lease.Peer{TEP: o.name}, q.Sent, every)
			}
		}
	}
	p.after(every, p.goOn)
}

// ask puts one question to one gateway. On an ordered network an answer that is late is none, as tepd has it; elsewhere it
// comes all the same.
func (p *process) ask(to lease.Peer, sent uint64, patience time.Duration) {
	g := p.g
	w := g.w
	peer := w.gate(to.TEP)
	limit := w.now + patience
	w.net.datagram(g.node, peer.node, func() {
		if peer.proc == nil {
			return
		}
		quiet := peer.proc.rep.Asked(peer.boot())
		if quiet {
			g.ghost.quiet(sent, peer.name)
		}
		if w.trace != nil {
			w.tracef("%s asks %s: quiet %t", g.name, peer.name, quiet)
		}
		w.net.datagram(peer.node, g.node, func() {
			if g.proc == p && (!w.p.net.ordered || w.now <= limit) {
				p.answered(to.TEP, sent, quiet)
			}
		})
	})
}

func (p *process) answered(tep string, sent uint64, quiet bool) {
	g := p.g
	out := p.rep.Answer(tep, sent, quiet, g.boot())
	p.extend(out, sent)
}

// extend moves the deadline without the service.
func (p *process) extend(out replica.Out, asked uint64) {
	if out.Deadline == 0 {
		return
	}
	g := p.g
	g.w.truth.alone(g, out.Deadline, asked)
	g.w.truth.deadline(g, out.Deadline, true)
	g.setDeadline(out.Deadline)
	g.w.counts.alone++
}
