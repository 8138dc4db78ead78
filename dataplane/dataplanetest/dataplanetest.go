// Package dataplanetest is the suite that every engine of the packet path passes over the real kernel: packets go in
// on a link, and the suite compares every byte that comes out and every counter that moved. An engine runs in a
// namespace of its own; at the other ends of its links there is no kernel that answers, only the suite.
package dataplanetest

import (
	"context"
	"maps"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/dstm-project/dstm/dataplane"
)

const device = "dstm0"

// Engine makes the packet paths of an engine. Both are called on a thread in the namespace that they are to work in.
type Engine struct {
	NewGateway func() (dataplane.Gateway, error)
	NewHost    func() (dataplane.Host, error)
}

// Run tests the engine in both roles, over an Ethernet uplink and over one without link header.
func Run(t *testing.T, e Engine) {
	NeedRoot(t)
	seen := map[dataplane.DropReason]bool{}
	for _, u := range []uplinkKind{ethernet, point} {
		t.Run("gateway/"+string(u), func(t *testing.T) { testGateway(t, e, u, seen) })
		t.Run("host/"+string(u), func(t *testing.T) { testHost(t, e, u, seen) })
	}
	// A subtest, so that it is left out when only some are asked for.
	t.Run("reasons", func(t *testing.T) {
		for _, r := range dataplane.Reasons() {
			// No packet makes every kernel refuse a change; everything else has to be shown.
			if !seen[r] && r != dataplane.DropInternal {
				t.Errorf("no packet of the suite was dropped as %s", r)
			}
		}
	})
}

// place is one of the ports of a bed.
type place string

const (
	uplink place = "uplink" // where tunnels go
	exit   place = "exit"   // gateway: towards IPv4
	tun    place = "device" // the engine's device: what the own kernel sends and gets there
)

// frame is a packet at a port.
type frame struct {
	at  place
	pkt []byte
}

// on is the frames of one port.
func on(p place, pkts ...[]byte) []frame {
	var fs []frame
	for _, b := range pkts {
		fs = append(fs, frame{p, b})
	}
	return fs
}

// tally says which counters one packet moves: rx and one other of one direction.
type tally struct {
	down     bool
	counted  bool
	sent     bool
	consumed bool
	dropped  dataplane.DropReason
}

// The tallies. The zero one: the packet is not the engine's, nothing moves.
var (
	upSent     = tally{counted: true, sent: true}
	upConsumed = tally{counted: true, consumed: true}
	downSent   = tally{counted: true, down: true, sent: true}
)

func upDropped(r dataplane.DropReason) tally   { return tally{counted: true, dropped: r} }
func downDropped(r dataplane.DropReason) tally { return tally{counted: true, down: true, dropped: r} }

// row is one experiment: a packet in, packets out, what was counted.
type row struct {
	name  string
	in    frame
	out   []frame
	tally tally
}

// counters returns by how much the counters move. Bytes received are of the packet as it came; bytes sent are of the
// IPv4 packet alone.
func (r row) counters() dataplane.Counters {
	var none dataplane.Direction
	c := dataplane.Counters{Up: moved(none, none), Down: moved(none, none)}
	if !r.tally.counted {
		return c
	}
	d := &c.Up
	if r.tally.down {
		d = &c.Down
	}
	d.Rx, d.RxBytes = 1, uint64(len(r.in.pkt))
	switch {
	case r.tally.sent:
		for _, f := range r.out {
			d.Tx++
			d.TxBytes += uint64(len(f.pkt))
			if f.pkt[0]>>4 == 6 {
				d.TxBytes -= 40
			}
		}
	case r.tally.consumed:
		d.Consumed = 1
	default:
		d.Drops[r.tally.dropped] = 1
	}
	return c
}

// bed is an engine with a port on each of its links.
type bed struct {
	path interface {
		Counters(context.Context) (dataplane.Counters, error)
	}
	ports map[place]*port
	seen  map[dataplane.DropReason]bool
}

func (b *bed) counters(t *testing.T) dataplane.Counters {
	t.Helper()
	c, err := b.path.Counters(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// run does the rows one after another.
func (b *bed) run(t *testing.T, rows []row) {
	t.Helper()
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			before := b.counters(t)
			b.ports[r.in.at].send(t, r.in.pkt)
			b.expect(t, r.out)
			b.expectMoved(t, before, r.counters())
			b.expectQuiet(t)
		})
	}
}

// expect compares the packets that come out, in order for each port.
func (b *bed) expect(t *testing.T, want []frame) {
	t.Helper()
	for _, f := range want {
		got := b.ports[f.at].receive(t, 2*time.Second)
		if got == nil {
			t.Errorf("%s: nothing came, want\n%s", f.at, describe(f.pkt))
		} else if !slices.Equal(unlabelled(got), unlabelled(f.pkt)) {
			t.Errorf("%s:\n%s, want\n%s", f.at, describe(got), describe(f.pkt))
		}
	}
}

// expectQuiet fails on every packet that nobody expected.
func (b *bed) expectQuiet(t *testing.T) {
	t.Helper()
	for _, p := range slices.Sorted(maps.Keys(b.ports)) {
		for got := b.ports[p].receive(t, 5*time.Millisecond); got != nil; got = b.ports[p].receive(t, 0) {
			t.Errorf("%s: want nothing more, got\n%s", p, describe(got))
		}
	}
}

// expectMoved compares by how much the counters have moved. The path counts before a packet leaves, but what it drops
// or consumes is seen in the counters alone.
func (b *bed) expectMoved(t *testing.T, before, want dataplane.Counters) {
	t.Helper()
	var got dataplane.Counters
	for end := time.Now().Add(time.Second); ; time.Sleep(time.Millisecond) {
		after := b.counters(t)
		got = dataplane.Counters{Up: moved(before.Up, after.Up), Down: moved(before.Down, after.Down)}
		if reflect.DeepEqual(got, want) || time.Now().After(end) {
			break
		}
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("counters moved by\n%+v, want\n%+v", got, want)
	}
	for _, d := range []dataplane.Direction{got.Up, got.Down} {
		for r := range d.Drops {
			b.seen[r] = true
		}
	}
}

func moved(from, to dataplane.Direction) dataplane.Direction {
	d := dataplane.Direction{
		Rx: to.Rx - from.Rx, RxBytes: to.RxBytes - from.RxBytes,
		Tx: to.Tx - from.Tx, TxBytes: to.TxBytes - from.TxBytes,
		Consumed: to.Consumed - from.Consumed, Drops: map[dataplane.DropReason]uint64{},
	}
	for r, n := range to.Drops {
		if n != from.Drops[r] {
			d.Drops[r] = n - from.Drops[r]
		}
	}
	return d
}

// expectExact checks the law of the counters over all that has happened.
func (b *bed) expectExact(t *testing.T) {
	t.Helper()
	c := b.counters(t)
	for name, d := range map[string]dataplane.Direction{"up": c.Up, "down": c.Down} {
		sum := d.Tx + d.Consumed
		for _, n := range d.Drops {
			sum += n
		}
		if d.Rx == 0 || d.Rx != sum {
			t.Errorf("%s: rx %d, want it above 0 and equal to tx + consumed + drops = %d: %+v", name, d.Rx, sum, d)
		}
	}
}

// settle waits until the kernel has said what it says about a new device by itself, so that no row counts it.
func (b *bed) settle(t *testing.T) {
	t.Helper()
	const quiet = 1500 * time.Millisecond // unsolicited MLD reports come within a second (RFC 3810 section 9.11)
	last, since := b.counters(t), time.Now()
	for end := time.Now().Add(10 * time.Second); time.Since(since) < quiet; time.Sleep(50 * time.Millisecond) {
		if now := b.counters(t); !reflect.DeepEqual(now, last) {
			last, since = now, time.Now()
		}
		if time.Now().After(end) {
			t.Fatalf("the device does not get quiet: %+v", last)
		}
	}
}
