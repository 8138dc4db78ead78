package leasesim

import (
	"encoding/binary"
	"math/bits"
	"net/netip"
	"testing"
	"time"

	"github.com/dstm-project/dstm/internal/engset"
	"github.com/dstm-project/dstm/lease"
)

// calm is a world of production times in which nothing goes wrong by itself.
func calm(p *profile) {
	*p = profile{
		gateways: 3, hosts: 50, pools: []netip.Prefix{netip.MustParsePrefix("198.51.100.0/25")},
		timers: lease.DefaultTimers(), session: 30 * time.Second, static: 4 * time.Hour,
		bindWait: 500 * time.Millisecond, ratePPM: 500, ring: 1 << 16, steady: true,
		net:  netProfile{ordered: true, delay: 200 * time.Microsecond, jitter: 2 * time.Millisecond, keepalive: 13 * time.Second},
		host: hostProfile{think: 2 * time.Minute, use: 3 * time.Minute},
	}
}

// pass lets time pass in steps, and calls look after each.
func (w *world) pass(t *testing.T, d, step time.Duration, look func()) {
	t.Helper()
	for end := w.now + d; w.now < end; {
		w.kernel.run(min(end, w.now+step), w.truth.look)
		if w.failed != nil {
			t.Fatal(w.failed)
		}
		look()
	}
}

// TestAllCutOff: no gateway hears of the lease service for an hour, because it is dead or because the network is. Nothing
// stops forwarding, and no gateway takes itself for the only one that is cut off (I10).
func TestAllCutOff(t *testing.T) {
	for _, tt := range []struct {
		name string
		cut  func(w *world)
	}{
		{"network", func(w *world) { w.partAll(time.Hour) }},
		{"service", func(w *world) {
			at := w.owner.node
			w.owner.crash(true)
			w.after(time.Hour, func() { w.startAgain(at) })
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(options{seed: 1, adapt: calm})
			w.pass(t, 10*time.Minute, time.Minute, func() {})
			tables := make([]lease.Digest, len(w.gates))
			for i, g := range w.gates {
				tables[i] = g.path.digest
				if g.path.n < 10 {
					t.Fatalf("%s forwards for %d hosts only", g.name, g.path.n)
				}
			}
			tt.cut(w)
			w.pass(t, time.Hour, time.Second, func() {
				for i, g := range w.gates {
					if !g.forwards() || g.path.digest != tables[i] {
						t.Fatalf("%s after %s: forwards %t, table as before %t", g.name, w.now-10*time.Minute, g.forwards(), g.path.digest == tables[i])
					}
					if g.proc.rep.Alone() && w.now > 11*time.Minute {
						t.Fatalf("%s takes itself for the only one that is cut off", g.name)
					}
				}
			})
			if least := 3 * int(time.Hour/(4*time.Second)) / 2; w.counts.alone < least {
				t.Errorf("deadlines moved %d times without the service, want at least %d", w.counts.alone, least)
			}
			w.pass(t, time.Minute, time.Minute, func() {})
			if why := w.unequal(); why != "" {
				t.Errorf("a minute later %s", why)
			}
		})
	}
}

// TestOneCutOff: one gateway alone loses the service. It stops within d of its last answered heartbeat, knows soon that it
// is alone, is fenced by a witness within 2·d, and comes back. The others go on (I10).
func TestOneCutOff(t *testing.T) {
	w := newWorld(options{seed: 1, adapt: func(p *profile) { calm(p); p.steady = false }})
	w.pass(t, 10*time.Minute, time.Minute, func() {})
	d, cut, lone := w.p.session, w.now, w.gates[0]
	last := lone.ghost.answered
	w.part(lone.node, nodeService, true, true, 9*time.Minute)
	fenced := time.Duration(0)
	w.pass(t, 9*time.Minute, 100*time.Millisecond, func() {
		if lone.path.deadline > last+uint64(d) {
			t.Fatalf("the gateway goes on until %s after its last answered heartbeat", time.Duration(lone.path.deadline-last))
		}
		if w.now-cut > d && lone.forwards() {
			t.Fatalf("the gateway forwards %s after it was cut off", w.now-cut)
		}
		if !lone.proc.rep.Alone() && w.now-cut > 2*d/4+time.Second {
			t.Fatalf("the gateway does not know that it is alone, %s after it was cut off", w.now-cut)
		}
		for _, g := range w.gates[1:] {
			if !g.forwards() || g.proc.rep.Alone() {
				t.Fatalf("%s has stopped or takes itself for alone", g.name)
			}
		}
		for _, st := range w.owner.fence.Status(w.now - w.owner.begun) {
			if st.TEP == lone.name && st.Fenced == "witness" && fenced == 0 {
				fenced = w.now - cut
			}
		}
	})
	if fenced == 0 || fenced > 2*d {
		t.Errorf("fenced by a witness after %s, want within %s", fenced, 2*d)
	}
	t.Logf("fenced by a witness after %s", fenced)
	w.pass(t, time.Minute, time.Minute, func() {})
	if why := w.unequal(); why != "" || lone.proc.rep.Alone() {
		t.Errorf("a minute after the end %s, alone %t", why, lone.proc.rep.Alone())
	}
}

// prefixes returns blocks that hold exactly n addresses.
func prefixes(n int) []netip.Prefix {
	var out []netip.Prefix
	next := uint32(198<<24 | 18<<16)
	for n > 0 {
		size := 1 << (bits.Len(uint(n)) - 1)
		var b [4]byte
		binary.BigEndian.PutUint32(b[:], next)
		out = append(out, netip.PrefixFrom(netip.AddrFrom4(b), 32-bits.TrailingZeros(uint(size))))
		next += uint32(size)
		n -= size
	}
	return out
}

// crowded is a city of hosts that use IPv4 now and then, 28 leases a second, over a pool as dstm pool advise would have it.
func crowded(p *profile) {
	const hosts, rate = 100_000, 28
	calm(p)
	p.gateways, p.hosts, p.steady = 2, hosts, false
	cycle := hosts * time.Second / rate
	p.host.use = 3 * time.Minute // a minute, and idle
	p.host.think = cycle - p.host.use
	load := engset.Load{Sources: hosts, Busy: float64(p.host.use+p.timers.HoldDown) / float64(cycle)}
	size, _ := load.Servers(1e-6)
	p.pools = prefixes(size)
}

// TestOneOff: one of two gateways is powered off for good while 28 leases are released in a second. Addresses come back in
// time: after 2·d and a hold-down nobody is refused. Without a witness they do not.
func TestOneOff(t *testing.T) {
	for _, tt := range []struct {
		name, bug string
		more      time.Duration
		refused   bool
	}{{"as it is", "", 10 * time.Minute, false}, {"without a witness", "no witness", 15 * time.Second, true}} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(options{seed: 1, adapt: crowded, bug: tt.bug})
			dry := func() int { return w.counts.refused[lease.ReasonPoolDry] }
			w.pass(t, 15*time.Minute, time.Minute, func() {})
			if n := dry(); n > 0 {
				t.Fatalf("%d refused before anything happened", n)
			}
			size := len(w.truth.slots)
			binds := w.counts.binds
			w.gates[1].gone = true
			w.gates[1].powerOff()
			w.pass(t, 2*w.p.session+w.p.timers.HoldDown, time.Second, func() {})
			early, then := dry(), w.counts.binds
			w.pass(t, tt.more, time.Second, func() {})
			late := dry() - early
			t.Logf("%d addresses, %d binds before; refused %d of %d binds until 2·d and the hold-down, %d of %d after",
				size, binds, early, then-binds, late, w.counts.binds-then)
			if late > 0 != tt.refused {
				t.Errorf("%d binds were refused later than 2·d and the hold-down", late)
			}
		})
	}
}
