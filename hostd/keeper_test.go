package hostd

import (
	"errors"
	"net/netip"
	"reflect"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/leaseclient"
)

var (
	addrCmp = cmp.Comparer(func(a, b netip.Addr) bool { return a == b })
	pfxCmp  = cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })
	errsCmp = cmp.Comparer(func(a, b error) bool { return a == b || a != nil && b != nil && a.Error() == b.Error() })
	all     = cmp.Exporter(func(reflect.Type) bool { return true })
)

const (
	sec     = time.Second
	valid   = 100 * sec // T1 50 s, T2 80 s, deadline 99.95 s
	idle    = 40 * sec  // looked at every 10 s
	testMTU = 1460
)

var (
	src1 = netip.MustParseAddr("2001:db8:1::5")
	src2 = netip.MustParseAddr("2001:db8:2::5")
	tep  = netip.MustParseAddr("2001:db8:a::1")
	ip7  = lease.Whole(netip.MustParseAddr("198.51.100.7"))
)

func newKeeper() *keeper {
	return &keeper{
		timers: timers{t1: .5, t2: .8, idle: idle, keepSockets: true, holdTime: 3 * sec, backoffMin: sec, backoffMax: 8 * sec},
		jitter: func(d time.Duration) time.Duration { return d },
	}
}

func granted(sent time.Duration, gen lease.Gen, host netip.Addr) held {
	return held{Binding: lease.Binding{Resource: ip7, Host: host, TEP: tep, Gen: gen, MTU: testMTU}, sent: sent, valid: valid}
}

func refusal(r lease.Reason) error { return &leaseclient.Error{Reason: r} }

// row is one event at its time, with everything that must follow.
type row struct {
	at    time.Duration
	ev    any
	state State
	want  []any
}

func bindCall(id uint64, t lease.Trigger, hint uint64) actCall {
	return actCall{id, request{trigger: t, hint: hint, source: src1, mtu: testMTU}}
}

func renewCall(id uint64, gen lease.Gen) actCall {
	return actCall{id, request{source: src1, mtu: testMTU, ref: lease.Ref{Resource: ip7, Gen: gen}}}
}

// heldFrom is the way to a lease that was asked for at 0.
func heldFrom() []row {
	return []row{
		{0, evPath{src1, testMTU}, StateIdle, nil},
		{0, evTrigger{lease.TriggerPacket, 0}, StateBinding, []any{bindCall(1, lease.TriggerPacket, 0)}},
		{sec, evAnswer{1, granted(0, 1, src1), nil}, StateHeld, []any{actInstall{granted(0, 1, src1)}}},
	}
}

func TestKeeper(t *testing.T) {
	ref1 := lease.Ref{Resource: ip7, Gen: 1}
	gone := []any{actRemove{ref1}, actRelease{ref1, lease.ReasonIdle}}
	noUse := func(last time.Duration) evUse { return evUse{packet: last, socketsKnown: true} }
	open := evUse{sockets: true, socketsKnown: true}
	unreachable := errors.New("connection refused")
	for _, c := range []struct {
		name string
		rows []row
	}{
		{"offer binds with its hint", []row{
			{0, evPath{src1, testMTU}, StateIdle, nil},
			{0, evTrigger{lease.TriggerDNS, 9}, StateBinding, []any{bindCall(1, lease.TriggerDNS, 9)}},
		}},
		{"no way out: a trigger is dropped", []row{
			{0, evTrigger{lease.TriggerPacket, 0}, StateIdle, []any{actDrop{}}},
		}},
		{"one call for many triggers", append(heldFrom()[:2],
			row{0, evTrigger{lease.TriggerPacket, 0}, StateBinding, nil},
			row{0, evTrigger{lease.TriggerDNS, 9}, StateBinding, nil},
		)},
		{"offer with a lease is answered, not bound", append(heldFrom(),
			row{2 * sec, evTrigger{lease.TriggerDNS, 9}, StateHeld, []any{actAnswer{ref1}}},
			row{2 * sec, evTrigger{lease.TriggerPacket, 0}, StateHeld, []any{actFlush{}}},
		)},
		{"idle after the last packet", append(heldFrom(),
			row{11 * sec, evTick{}, StateHeld, []any{actProbe{}}},
			row{11 * sec, noUse(5 * sec), StateHeld, nil},
			row{45 * sec, evTick{}, StateHeld, []any{actProbe{}}},
			row{45 * sec, noUse(5 * sec), StateReleasing, gone},
			row{46 * sec, evReleased{}, StateIdle, nil},
		)},
		{"an open socket keeps the lease over idle times, and it is renewed", append(heldFrom(),
			row{45 * sec, evTick{}, StateHeld, []any{actProbe{}}},
			row{45 * sec, open, StateHeld, nil},
			row{50 * sec, evTick{}, StateHeld, []any{actProbe{}}},
			row{50 * sec, open, StateRenewing, []any{renewCall(2, 1)}},
			row{51 * sec, evAnswer{2, granted(50*sec, 1, src1), nil}, StateHeld, []any{actInstall{granted(50*sec, 1, src1)}}},
			row{100 * sec, evTick{}, StateHeld, []any{actProbe{}}},
			row{100 * sec, open, StateRenewing, []any{renewCall(3, 1)}},
		)},
		{"open sockets do not count if the file says so", append([]row{{0, setKeepSockets(false), StateIdle, nil}}, append(heldFrom(),
			row{41 * sec, evTick{}, StateHeld, []any{actProbe{}}},
			row{41 * sec, open, StateReleasing, gone},
		)...)},
		{"an agent that cannot see sockets waits 7,440 s", append(heldFrom(),
			row{45 * sec, evTick{}, StateHeld, []any{actProbe{}}},
			row{45 * sec, evUse{packet: sec}, StateHeld, nil},
			row{55 * sec, evTick{}, StateHeld, []any{actProbe{}}},
			row{55 * sec, evUse{packet: sec}, StateRenewing, []any{renewCall(2, 1)}},
		)},
		{"no renewal before T1", append(heldFrom(),
			row{49 * sec, evTick{}, StateHeld, []any{actProbe{}}},
			row{49 * sec, open, StateHeld, nil},
		)},
		{"failed renewals are repeated until the end, then the lease is removed", append(heldFrom(),
			row{50 * sec, evTick{}, StateHeld, []any{actProbe{}}},
			row{50 * sec, open, StateRenewing, []any{renewCall(2, 1)}},
			row{55 * sec, evAnswer{2, held{}, unreachable}, StateHeld, nil}, // next: half of 25 s to T2
			row{67*sec + 500*time.Millisecond, evTick{}, StateHeld, []any{actProbe{}}},
			row{67*sec + 500*time.Millisecond, open, StateRenewing, []any{renewCall(3, 1)}},
			row{90 * sec, evAnswer{3, held{}, unreachable}, StateHeld, nil},
			row{95 * sec, evTick{}, StateHeld, []any{actProbe{}}},
			row{95 * sec, open, StateRenewing, []any{renewCall(4, 1)}},
			row{99*sec + 949*time.Millisecond, evTick{}, StateRenewing, nil},
			row{99*sec + 950*time.Millisecond, evTick{}, StateIdle, []any{actRemove{ref1}}},
			row{100 * sec, evAnswer{4, granted(95*sec, 1, src1), nil}, StateIdle, []any{actRelease{ref1, lease.ReasonIdle}}},
		)},
		{"a lease that the service does not know any more is removed and asked for again while in use", append(heldFrom(),
			row{50 * sec, evTick{}, StateHeld, []any{actProbe{}}},
			row{50 * sec, open, StateRenewing, []any{renewCall(2, 1)}},
			row{51 * sec, evAnswer{2, held{}, refusal(lease.ReasonStaleGeneration)}, StateBackingOff, []any{actRemove{ref1}, actDrop{}}},
			row{52 * sec, evTick{}, StateBinding, []any{bindCall(3, lease.TriggerPacket, 0)}},
		)},
		{"revoked", append(heldFrom(),
			row{2 * sec, evRevoked{lease.Ref{Resource: ip7, Gen: 7}, lease.ReasonAdmin}, StateHeld, nil},
			row{2 * sec, evRevoked{ref1, lease.ReasonAdmin}, StateIdle, []any{actRemove{ref1}}},
		)},
		{"revoked before the answer came", append(heldFrom()[:2],
			row{0, evRevoked{ref1, lease.ReasonAdmin}, StateBinding, nil},
			row{sec, evAnswer{1, granted(0, 1, src1), nil}, StateBackingOff, nil},
		)},
		{"an answer that took longer than the lease", append(heldFrom()[:2],
			row{100 * sec, evAnswer{1, granted(0, 1, src1), nil}, StateBackingOff, nil},
		)},
		{"refused: back-off doubles, packets wait, an offer does not", append(heldFrom()[:2],
			row{0, evAnswer{1, held{}, refusal(lease.ReasonPoolDry)}, StateBackingOff, nil},
			row{sec / 2, evTrigger{lease.TriggerPacket, 0}, StateBackingOff, nil},
			row{sec - 1, evTick{}, StateBackingOff, nil},
			row{sec, evTick{}, StateBinding, []any{bindCall(2, lease.TriggerPacket, 0)}},
			row{sec, evAnswer{2, held{}, refusal(lease.ReasonPoolDry)}, StateBackingOff, nil},
			row{3 * sec, evTick{}, StateBinding, []any{bindCall(3, lease.TriggerPacket, 0)}},
			row{3 * sec, evAnswer{3, held{}, refusal(lease.ReasonPoolDry)}, StateBackingOff, nil},
			row{7 * sec, evTick{}, StateIdle, []any{actDrop{}}}, // nobody wants it any more
			row{8 * sec, evTrigger{lease.TriggerPacket, 0}, StateBinding, []any{bindCall(4, lease.TriggerPacket, 0)}},
			row{8 * sec, evAnswer{4, held{}, refusal(lease.ReasonPoolDry)}, StateBackingOff, nil},
			row{9 * sec, evTrigger{lease.TriggerDNS, 5}, StateBinding, []any{bindCall(5, lease.TriggerDNS, 5)}},
		)},
		{"a new tunnel source moves the lease while it stays in place", append(heldFrom(),
			row{2 * sec, evPath{src2, testMTU}, StateRenewing, []any{
				actCall{2, request{trigger: lease.TriggerSocket, source: src2, mtu: testMTU, want: ip7}},
			}},
			row{3 * sec, evAnswer{2, granted(2*sec, 2, src2), nil}, StateHeld, []any{actInstall{granted(2*sec, 2, src2)}}},
		)},
		{"a move that fails is tried again soon, as a move", append(heldFrom(),
			row{2 * sec, evPath{src2, testMTU}, StateRenewing, []any{
				actCall{2, request{trigger: lease.TriggerSocket, source: src2, mtu: testMTU, want: ip7}},
			}},
			row{2 * sec, evAnswer{2, held{}, unreachable}, StateHeld, nil},
			row{3 * sec, evTick{}, StateHeld, []any{actProbe{}}},
			row{3 * sec, open, StateRenewing, []any{
				actCall{3, request{trigger: lease.TriggerSocket, source: src2, mtu: testMTU, want: ip7}},
			}},
		)},
		{"a renewal without a way out is for the source there was", append(heldFrom(),
			row{2 * sec, evPath{}, StateHeld, nil},
			row{50 * sec, evTick{}, StateHeld, []any{actProbe{}}},
			row{50 * sec, open, StateRenewing, []any{renewCall(2, 1)}},
		)},
		{"the way out is lost during the back-off", append(heldFrom()[:2],
			row{0, evAnswer{1, held{}, unreachable}, StateBackingOff, nil},
			row{0, evPath{}, StateBackingOff, nil},
			row{sec, evTick{}, StateIdle, []any{actDrop{}}},
		)},
		{"the tunnel source changed while a bind was under way", append(heldFrom()[:2],
			row{sec, evPath{src2, testMTU}, StateBinding, nil},
			row{2 * sec, evAnswer{1, granted(0, 1, src1), nil}, StateRenewing, []any{
				actInstall{granted(0, 1, src1)},
				actCall{2, request{trigger: lease.TriggerSocket, source: src2, mtu: testMTU, want: ip7}},
			}},
		)},
		{"no way out for a while changes nothing", append(heldFrom(),
			row{2 * sec, evPath{}, StateHeld, nil},
			row{3 * sec, evPath{src1, testMTU}, StateHeld, nil},
		)},
		{"a new tunnel mtu is told", append(heldFrom(),
			row{2 * sec, evPath{src1, 1300}, StateRenewing, []any{
				actCall{2, request{source: src1, mtu: 1300, ref: ref1}},
			}},
		)},
		{"native IPv4 comes and goes", append(heldFrom(),
			row{2 * sec, evStandby{standbyNative}, StateStandby, append(append([]any{}, gone...), actDrop{})},
			row{2 * sec, evStandby{standbyNative}, StateStandby, nil},
			row{3 * sec, evReleased{}, StateStandby, nil},
			row{4 * sec, evTrigger{lease.TriggerPacket, 0}, StateStandby, nil},
			row{5 * sec, evStandby{}, StateIdle, nil},
		)},
		{"native IPv4 while a bind is under way: the lease goes back", append(heldFrom()[:2],
			row{sec, evStandby{standbyNative}, StateStandby, []any{actDrop{}}},
			row{2 * sec, evAnswer{1, granted(0, 1, src1), nil}, StateStandby, []any{actRelease{ref1, lease.ReasonIdle}}},
		)},
		{"a lease of an earlier life goes back", []row{
			{0, evWelcome{lease.Ref{}, ref1, newKeeper().timers}, StateIdle, []any{actRelease{ref1, lease.ReasonIdle}}},
		}},
		{"the service forgot the lease", append(heldFrom(),
			row{2 * sec, evWelcome{ref1, ref1, newKeeper().timers}, StateHeld, []any{actAnswer{ref1}}},
			row{2 * sec, evWelcome{lease.Ref{}, lease.Ref{}, newKeeper().timers}, StateHeld, []any{actAnswer{ref1}}}, // bound after the hello
			row{3 * sec, evWelcome{ref1, lease.Ref{}, newKeeper().timers}, StateRenewing, []any{
				actCall{2, request{trigger: lease.TriggerSocket, source: src1, mtu: testMTU, want: ip7}},
			}},
		)},
		{"a trigger during a release binds after it", append(heldFrom(),
			row{45 * sec, evTick{}, StateHeld, []any{actProbe{}}},
			row{45 * sec, noUse(5 * sec), StateReleasing, gone},
			row{46 * sec, evTrigger{lease.TriggerPacket, 0}, StateReleasing, nil},
			row{46 * sec, evReleased{}, StateBinding, []any{bindCall(2, lease.TriggerPacket, 0)}},
		)},
		{"a lease that cannot be installed goes back", append(heldFrom(),
			row{sec, evFailed{unreachable}, StateBackingOff, append(append([]any{}, gone...), actDrop{})},
		)},
		{"a Bind waits for the Release of a lease of an earlier life", []row{
			{0, evPath{src1, testMTU}, StateIdle, nil},
			{0, evWelcome{known: lease.Ref{Resource: ip7, Gen: 9}, timers: newKeeper().timers}, StateIdle, []any{actRelease{lease.Ref{Resource: ip7, Gen: 9}, lease.ReasonIdle}}},
			{sec, evTrigger{trigger: lease.TriggerPacket}, StateReleasing, nil},
			{2 * sec, evReleased{}, StateBinding, []any{bindCall(1, lease.TriggerPacket, 0)}},
		}},
		{"the MTU changes while a Bind is under way", []row{
			{0, evPath{src1, testMTU}, StateIdle, nil},
			{0, evTrigger{trigger: lease.TriggerPacket}, StateBinding, []any{bindCall(1, lease.TriggerPacket, 0)}},
			{0, evPath{src1, 1240}, StateBinding, nil},
			{0, evAnswer{1, granted(0, 1, src1), nil}, StateRenewing, []any{
				actInstall{granted(0, 1, src1)},
				actCall{2, request{source: src1, mtu: 1240, ref: granted(0, 1, src1).ref()}},
			}},
		}},
		{"stop gives the lease back", append(heldFrom(),
			row{2 * sec, evStop{}, StateIdle, append(append([]any{}, gone...), actDrop{})},
		)},
	} {
		t.Run(c.name, func(t *testing.T) {
			k := newKeeper()
			for i, r := range c.rows {
				if f, ok := r.ev.(setKeepSockets); ok {
					k.keepSockets = bool(f)
					continue
				}
				got := k.step(r.at, r.ev)
				if d := cmp.Diff(r.want, got, all, addrCmp, errsCmp, emptyIsNil); d != "" {
					t.Fatalf("row %d at %s %T: actions (-want +got):\n%s", i, r.at, r.ev, d)
				}
				if k.state != r.state {
					t.Fatalf("row %d at %s %T: state %s (%s), want %s", i, r.at, r.ev, k.state, k.why, r.state)
				}
			}
		})
	}
}

// setKeepSockets is a row that configures instead of stepping.
type setKeepSockets bool

var emptyIsNil = cmp.FilterValues(func(a, b []any) bool { return len(a) == 0 && len(b) == 0 }, cmp.Ignore())

// Whatever happens in whatever order, the keeper never has more than one call out that it waits for, names a later
// instant to be woken at while it holds a lease, and never holds one past its deadline.
func FuzzKeeper(f *testing.F) {
	f.Add([]byte{5, 0, 1, 9, 3, 9, 9, 2})
	f.Add([]byte{5, 1, 1, 6, 7, 6, 4, 8, 1})
	f.Fuzz(func(t *testing.T, script []byte) {
		k, now, gen := newKeeper(), time.Duration(0), lease.Gen(1)
		for _, b := range script {
			now += time.Duration(b>>4) * sec
			var ev any = evTick{}
			switch b & 0xf {
			case 0:
				ev = evTrigger{trigger: lease.TriggerPacket}
			case 1:
				gen++
				ev = evAnswer{k.call, granted(now, gen, k.calling.source), nil}
			case 2:
				ev = evAnswer{k.call, held{}, refusal(lease.ReasonQuota)}
			case 3:
				ev = evUse{sockets: true, socketsKnown: true}
			case 4:
				ev = evUse{socketsKnown: true}
			case 5:
				ev = evPath{src1, testMTU}
			case 6:
				ev = evPath{src2, testMTU}
			case 7:
				ev = evRevoked{k.lease.ref(), lease.ReasonAdmin}
			case 8:
				ev = evStandby{standbyNative}
			case 9:
				ev = evStandby{}
			case 10:
				if k.giving == 0 {
					continue
				}
				ev = evReleased{}
			case 11:
				ev = evWelcome{said: k.lease.ref(), timers: k.timers}
			case 12:
				ev = evPath{}
			case 13:
				ev = evFailed{errOver}
			case 14:
				ev = evAnswer{k.call, held{}, errors.New("unreachable")}
			}
			if _, answer := ev.(evAnswer); answer && k.call == 0 {
				continue
			}
			for _, ev := range []any{ev, evTick{}} {
				holding := k.state.holds()
				for _, act := range k.step(now, ev) {
					if c, ok := act.(actCall); ok && !holding && k.giving > 0 {
						t.Fatalf("call %d after %T while %d releases are under way", c.id, ev, k.giving)
					}
				}
			}
			if (k.state == StateBinding || k.state == StateRenewing) != (k.call != 0) {
				t.Fatalf("state %s with call %d after %T", k.state, k.call, ev)
			}
			at, ok := k.next()
			if k.state.holds() && !ok || ok && at <= now {
				t.Fatalf("%s at %s: next instant %s %v, want a later one", k.state, now, at, ok)
			}
			if k.state.holds() {
				if now >= k.lease.deadline() {
					t.Fatalf("held at %s, deadline %s", now, k.lease.deadline())
				}
			}
		}
	})
}
