package leasesim

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"time"

	"github.com/dstm-project/dstm/lease"
)

const (
	callTime = time.Second // of one attempt
	attempts = 4
)

// host is a machine that wants IPv4 now and then: what hostd does, as far as the lease service sees it. One call is under
// way at a time.
type host struct {
	w         *world
	n         int
	node      node
	ppm       int64
	byAddress bool
	portSet   bool
	on        bool
	retired   bool // wants nothing any more
	lives     int
	moves     int // changes of the tunnel source
	lease     *held
	call      int // number of the call that counts
	ids       uint64
	want      lease.Resource
	wanting   int // number of the wish that counts
}

// held is a lease that a host has.
type held struct {
	ref    lease.Ref
	host   string // the identity that it was granted to
	source netip.Addr
	until  time.Duration // true time at which the host stops by its own clock
	valid  time.Duration
}

func (h *host) name() string { return fmt.Sprint("host", h.n) }

// source is the tunnel source now. Hosts share /64s.
func (h *host) source() netip.Addr {
	b := netip.MustParseAddr("2001:db8:1::").As16()
	b[7] = byte(h.n % 8)
	binary.BigEndian.PutUint32(b[12:], uint32(h.n)<<8|uint32(h.moves&0xff)+1)
	return netip.AddrFrom16(b)
}

func (h *host) identity() string {
	if h.byAddress {
		return "addr:" + h.source().String()
	}
	return h.name()
}

// secret proves a lease where hosts are known by their address.
func (h *host) secret(l *held) proof {
	if !h.byAddress {
		return proof{}
	}
	return proof{host: l.host, ref: l.ref}
}

// after plans something that this life of the host does.
func (h *host) after(d time.Duration, do func()) {
	life := h.lives
	h.w.after(d, func() {
		if h.on && h.lives == life {
			do()
		}
	})
}

// start begins a life: nothing is remembered.
func (h *host) start() {
	h.on, h.lease = true, nil
	h.lives++
	h.call++
	h.idle()
}

// die ends it without a word; another one begins after a while.
func (h *host) die() {
	h.w.tracef("%s dies", h.name())
	h.on = false
	h.w.after(h.w.exp(h.w.p.host.think), func() {
		if !h.on && !h.retired {
			h.start()
		}
	})
}

// idle waits for the next wish.
func (h *host) idle() {
	if h.retired {
		return
	}
	h.wanting++
	n := h.wanting
	h.after(h.w.exp(h.w.p.host.think), func() {
		if n != h.wanting || h.lease != nil {
			return
		}
		if h.w.chance(h.w.p.host.hint) {
			h.w.resolve(h)
			h.idle() // the offer may not come
			return
		}
		h.bind()
	})
}

// offered takes an offer of the service.
func (h *host) offered() {
	if h.on && h.lease == nil && !h.retired {
		h.bind()
	}
}

// bind asks for a lease, or for the one that it has at another tunnel source.
func (h *host) bind() {
	h.wanting++
	h.ids++
	var id lease.RequestID
	binary.BigEndian.PutUint64(id[:], uint64(h.n)<<32|h.ids)
	binary.BigEndian.PutUint64(id[8:], uint64(h.lives))
	c := bindCall{id: id, ev: lease.Bind{
		Host: h.identity(), Source: h.source(), Valid: h.wish(), PortSet: h.portSet, Want: h.want, MTU: 1400 + uint16(h.w.rng.IntN(2)),
		Hurry: h.w.chance(0.1),
	}}
	if h.lease != nil && h.byAddress && h.lease.host != h.identity() {
		c.held = h.secret(h.lease)
	}
	t := h.w.truth
	if s, ok := t.sources[c.ev.Host]; ok && s != c.ev.Source {
		t.moves[c.ev.Host] = true
	}
	t.sources[c.ev.Host] = c.ev.Source
	h.call++
	c.op = h.w.book.begin(callBind, h, lease.Ref{})
	h.tryBind(h.call, c, attempts)
}

// wish is the validity that a host asks for; 0 = whatever is usual.
func (h *host) wish() time.Duration {
	if h.w.chance(h.w.p.host.wish) {
		return h.w.between(time.Second, 80*time.Second)
	}
	return 0
}

func (h *host) tryBind(call int, c bindCall, left int) {
	sent := h.w.now
	h.w.counts.binds++
	h.rpc(call, c, func(r any) {
		switch r := r.(type) {
		case nil:
			if left > 1 {
				h.tryBind(call, c, left-1)
				return
			}
			h.unbound(6 * time.Second)
		case granted:
			h.w.book.answered(c.op, r.ref, r.renewed, sent+r.valid)
			h.take(r, c.ev, sent)
		case refused:
			h.w.counts.refused[r.why]++
			h.unbound(6 * time.Second)
		}
	})
}

// rpc makes one attempt of a call. The answer is nil when there is none in time.
func (h *host) rpc(call int, c any, then func(any)) {
	life, over := h.lives, false
	done := func(r any) {
		if !over && h.on && h.lives == life && h.call == call {
			over = true
			if h.w.trace != nil {
				h.w.tracef("%s: %T answered with %T%+v", h.name(), c, r, r)
			}
			then(r)
		}
	}
	s := h.w.reach(h.node)
	h.w.net.datagram(h.node, s, func() {
		if sv := h.w.serviceAt(s); sv != nil {
			sv.call(c, func(r any) { h.w.net.datagram(s, h.node, func() { done(r) }) })
		}
	})
	h.after(callTime, func() { done(nil) })
}

// unbound is a Bind that came to nothing. A move that failed leaves the lease as it was; it is tried again.
func (h *host) unbound(pause time.Duration) {
	call := h.call
	h.after(h.w.exp(pause), func() {
		switch {
		case h.call != call || h.retired:
		case h.lease != nil && h.lease.until <= h.w.now:
			h.drop()
		case h.lease == nil || h.lease.source != h.source():
			h.bind()
		}
	})
	if h.lease == nil {
		h.idle()
	}
}

// take puts a lease into force.
func (h *host) take(r granted, ev lease.Bind, sent time.Duration) {
	valid := r.valid - r.valid/1_000_000*time.Duration(h.w.p.ratePPM)
	until := sent + time.Duration(float64(valid)/(1+float64(h.ppm)/1e6))
	if until <= h.w.now {
		h.unbound(time.Second)
		return
	}
	begins := h.lease == nil
	h.lease = &held{ref: r.ref, host: ev.Host, source: ev.Source, until: until, valid: r.valid}
	h.want = r.ref.Resource
	l := h.lease
	h.after(until-h.w.now, func() {
		if h.lease == l {
			h.drop()
		}
	})
	h.after(sent+r.valid/2-h.w.now, func() { h.renew(l) })
	if begins {
		h.use()
	}
	if l.source != h.source() {
		h.bind()
	}
}

// use is what happens while a host has a lease.
func (h *host) use() {
	p := &h.w.p.host
	wish := h.wanting
	still := func() bool { return h.lease != nil && h.wanting == wish }
	d := h.w.exp(p.use)
	if h.w.chance(p.move) {
		h.after(h.w.between(0, d), func() {
			if h.lease != nil {
				h.moves++
				h.bind()
			}
		})
	}
	ends := h.w.chance(p.die)
	h.after(d, func() {
		switch {
		case ends:
			h.die()
		case still() || h.lease != nil:
			h.giveBack()
		}
	})
}

// renew asks for more time.
func (h *host) renew(l *held) {
	if h.lease != l || l.source != h.source() {
		return
	}
	h.call++
	call, sent := h.call, h.w.now
	c := renewCall{ev: lease.Renew{Host: l.host, Ref: l.ref, Source: l.source, Valid: h.wish(), MTU: 1400 + uint16(h.w.rng.IntN(2))}, secret: h.secret(l)}
	op := h.w.book.begin(callRenew, h, l.ref)
	h.rpc(call, c, func(r any) {
		switch r := r.(type) {
		case granted:
			h.w.book.answered(op, r.ref, true, sent+r.valid)
			h.take(r, lease.Bind{Host: l.host, Source: l.source}, sent)
		case refused:
			h.w.book.denied(op, r.why)
			if r.why == lease.ReasonDegradedStore {
				h.after((l.until-h.w.now)/4, func() { h.renew(l) })
				return
			}
			h.drop()
		case nil:
			h.after((l.until-h.w.now)/4, func() { h.renew(l) })
		}
	})
}

// giveBack releases the lease.
func (h *host) giveBack() {
	l := h.lease
	h.lease = nil
	h.w.truth.gone[l.ref.Gen] = true
	h.call++
	h.tryRelease(h.call, l, 2, h.w.book.begin(callRelease, h, l.ref))
}

func (h *host) tryRelease(call int, l *held, left, op int) {
	h.rpc(call, releaseCall{ev: lease.Release{Host: l.host, Ref: l.ref}, secret: h.secret(l)}, func(r any) {
		if r == nil && left > 1 {
			h.tryRelease(call, l, left-1, op)
			return
		}
		if _, ok := r.(released); ok {
			h.w.book.released(op)
		}
		h.idle()
	})
}

// revoked takes the word of the service that a lease is over.
func (h *host) revoked(r lease.Ref) {
	if h.on && h.lease != nil && h.lease.ref == r {
		h.drop()
	}
}

// drop ends a lease on this side.
func (h *host) drop() {
	h.lease = nil
	h.call++
	h.idle()
}
