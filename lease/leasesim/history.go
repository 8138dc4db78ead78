package leasesim

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/dstm-project/dstm/lease"
)

// book is the history of a run as the clients saw it, for porcupine: who called what, and what came back. Of a call
// without an answer nobody knows whether it was done; those that were are taken from the disk, with the instant at which
// they were durable as their latest end. What the service does by itself (a lease expires, an operator takes it) is a call
// of its own.
type book struct {
	w     *world
	calls []call
	ends  []call            // what the service did, and calls that were done without an answer
	binds map[lease.Gen]int // generation → the call that it was made for
}

// kind is what a call asks for, or what happens.
type kind uint8

const (
	callBind kind = iota
	callRenew
	callRelease
	callEnd // by the service: expired, revoked, moved away
)

func (k kind) String() string { return [...]string{"bind", "renew", "release", "end"}[k] }

// call is one entry of the history.
type call struct {
	kind     kind
	host     int
	begun    int64
	ended    int64 // 0 = no answer
	ref      lease.Ref
	until    time.Duration // promised, by the client's own count
	refused  bool          // renew: the lease was said not to be live
	expired  bool          // end: because its time was over, at until
	answered bool
}

func newBook(w *world) *book { return &book{w: w, binds: map[lease.Gen]int{}} }

func (b *book) begin(k kind, h *host, ref lease.Ref) int {
	b.calls = append(b.calls, call{kind: k, host: h.n, begun: b.w.stamp(), ref: ref})
	return len(b.calls) - 1
}

// bound notes which Bind a lease was made for. A Bind and what repeats it are one call.
func (b *book) bound(ref lease.Ref, n int) { b.binds[ref.Gen] = n }

// released notes that a release was answered.
func (b *book) released(n int) { b.calls[n].ended, b.calls[n].answered = b.w.stamp(), true }

// denied notes that a renewal was refused.
func (b *book) denied(n int, why lease.Reason) {
	// Other reasons say nothing about whether the lease is live.
	if why == lease.ReasonStaleGeneration || why == lease.ReasonExpired || why == lease.ReasonIdle || why == lease.ReasonAdmin {
		c := &b.calls[n]
		c.ended, c.answered, c.refused = b.w.stamp(), true, true
	}
}

// answered notes a grant.
func (b *book) answered(n int, ref lease.Ref, renewed bool, until time.Duration) {
	c := &b.calls[n]
	c.ref, c.ended, c.answered, c.until = ref, b.w.stamp(), true, until
	if renewed {
		c.kind = callRenew
	}
}

// written follows what becomes durable.
func (b *book) written(old lease.Address, c lease.Commit) {
	a := c.Address
	switch {
	case a.State == lease.Bound && (old.State != lease.Bound || old.Gen != a.Gen):
		n, ok := b.binds[a.Gen]
		if !ok {
			return
		}
		o := b.calls[n]
		o.kind, o.ref, o.ended, o.until = callBind, a.Ref(), b.w.stamp(), 0
		b.ends = append(b.ends, o)
	case old.State == lease.Bound && a.State == lease.Revoking:
		at := b.w.stamp()
		b.ends = append(b.ends, call{
			kind: callEnd, begun: at, ended: at, ref: a.Ref(), expired: a.End == lease.ReasonExpired, until: b.w.now,
		})
	}
}

// spec is the sequential meaning of one address. Position 0 of holders is the whole address, the others are its port sets.
type spec struct {
	holders [1 + 1<<maxSpecBits]holder
}

const maxSpecBits = 2

type holder struct {
	host   int // 1 + number; 0 = nobody
	gen    lease.Gen
	until  time.Duration
	newest lease.Gen
}

func position(r lease.Resource) int {
	if r.PSIDLen == 0 {
		return 0
	}
	return 1 + int(r.PSID)
}

// step says whether a call may have come to its end in this state, and the state after it.
func (s spec) step(c call) (bool, spec) {
	p := position(c.ref.Resource)
	h := &s.holders[p]
	mine := h.host != 0 && h.gen == c.ref.Gen
	switch c.kind {
	case callBind:
		for i, o := range s.holders {
			if o.host != 0 && (i == p || i == 0 || p == 0) {
				return false, s
			}
		}
		if c.ref.Gen <= h.newest {
			return false, s
		}
		*h = holder{host: c.host + 1, gen: c.ref.Gen, until: c.until, newest: c.ref.Gen}
	case callRenew:
		if c.refused {
			return !mine, s
		}
		if !mine || h.host != c.host+1 {
			return false, s
		}
		h.until = max(h.until, c.until)
	case callRelease:
		if mine {
			*h = holder{newest: h.newest}
		}
	case callEnd:
		if c.expired && mine && c.until < h.until {
			return false, s
		}
		if mine {
			*h = holder{newest: h.newest}
		}
	}
	return true, s
}

var model = porcupine.Model{
	Init: func() any { return spec{} },
	Step: func(state, input, _ any) (bool, any) {
		ok, s := state.(spec).step(input.(call))
		return ok, s
	},
	DescribeOperation: func(input, _ any) string { return input.(call).String() },
}

func (c call) String() string {
	return fmt.Sprintf("%s %s by host%d, refused %t, expired %t, until %s", c.kind, c.ref, c.host, c.refused, c.expired, c.until)
}

// check looks at the history of every address.
func (b *book) check() {
	ops := map[netip.Addr][]porcupine.Operation{}
	add := func(c call) {
		ops[c.ref.Addr] = append(ops[c.ref.Addr], porcupine.Operation{ClientId: c.host, Input: c, Call: c.begun, Return: c.ended})
	}
	told := map[lease.Gen]bool{}
	for _, c := range b.calls {
		if !c.answered {
			continue
		}
		if c.kind == callBind {
			told[c.ref.Gen] = true
		}
		add(c)
	}
	for _, c := range b.ends {
		if c.kind != callBind || !told[c.ref.Gen] {
			add(c)
		}
	}
	var addrs []netip.Addr
	for a := range ops {
		addrs = append(addrs, a)
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	for _, a := range addrs {
		if res := porcupine.CheckOperationsTimeout(model, ops[a], porcupineTime); res != porcupine.Ok {
			b.w.fail("history", "the history of %s (%d calls) is not that of an address: %s", a, len(ops[a]), res)
			b.explain(ops[a])
			return
		}
	}
}

// porcupineTime is the time for one address; a history that is in order takes milliseconds.
const porcupineTime = 30 * time.Second

// explain puts a history into the trace.
func (b *book) explain(ops []porcupine.Operation) {
	slices.SortFunc(ops, func(a, c porcupine.Operation) int { return int(a.Call - c.Call) })
	for _, o := range ops {
		b.w.tracef("    [%d, %d] %s", o.Call, o.Return, o.Input.(call))
	}
}
