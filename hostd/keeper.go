package hostd

import (
	"net/netip"
	"time"

	"github.com/dstm-project/dstm/lease"
)

// State is where the keeper stands.
type State uint8

// The states of the keeper.
//
//	         trigger             bound                renew at T1, sources changed
//	┌─ idle ────────► binding ─────────► held ◄──────────────────────────────────┐
//	│   ▲ ▲              │ refused,      │ │ └──────────────────────► renewing ──┘
//	│   │ └─ no trigger  ▼ failed        │ │ idle                        │ refused for good
//	│   └───────── backing-off ◄─ ─ ─ ─ ─┼─┼─────────────────────────────┘ (lease removed)
//	│   ▲   trigger within hold time:    │ └──► releasing ──► idle
//	│   │   back to binding              │ revoked, expired
//	│   └────────────────────────────────┘
//	└─ native IPv4 ──► standby ──► idle        (standby is entered from every state)
const (
	StateIdle       State = 0 // no lease, nobody wants one
	StateBinding    State = 1 // asked for one
	StateBackingOff State = 2 // refused or failed; the next try waits
	StateHeld       State = 3 // the lease is in the packet path
	StateRenewing   State = 4 // held, and asked for more time or for another tunnel source
	StateReleasing  State = 5 // giving a lease back; what wants the next one waits for that
	StateStandby    State = 6 // not ours to serve: the host has IPv4 of its own
)

var stateNames = [...]string{"idle", "binding", "backing-off", "held", "renewing", "releasing", "standby"}

// String returns the state as status and logs show it.
func (s State) String() string { return stateNames[s] }

// holds reports whether the packet path has the lease.
func (s State) holds() bool { return s == StateHeld || s == StateRenewing }

// standbyNative is the reason for standby.
const standbyNative = "native ipv4"

// Instants are CLOCK_BOOTTIME: time goes on while the machine sleeps, as it does at the lease service.
type instant = time.Duration

// held is a lease with its times.
type held struct {
	lease.Binding
	sent  instant // when the request that got it was sent
	valid time.Duration
}

// deadline is when the lease ends for us: counted from the sending of the request, and with the rate margin of design
// rule F5 taken off, so that we always stop before the lease service does.
func (h held) deadline() instant { return h.sent + h.valid - h.valid/2000 }

// request is what a Bind or Renew asks for.
type request struct {
	trigger lease.Trigger
	hint    uint64
	source  netip.Addr
	mtu     uint16
	want    lease.Resource // zero Addr = any
	ref     lease.Ref      // Renew: the lease; zero Addr = Bind
}

// The events that move a keeper.
type (
	evTrigger struct { // something needs IPv4
		trigger lease.Trigger
		hint    uint64
	}
	evAnswer struct { // a Bind or Renew came back
		id    uint64
		lease held
		err   error
	}
	evReleased struct{} // a Release came back, or gave up
	evRevoked  struct { // the service took the lease
		ref    lease.Ref
		reason lease.Reason
	}
	evUse struct { // an answer to actProbe
		packet       instant // last packet, 0 = none
		sockets      bool    // an IPv4 socket has the address
		socketsKnown bool    // the kernel could be asked
	}
	evPath struct { // the way to the lease service and gateways, as the kernel has it now
		source netip.Addr // not valid: no way
		mtu    uint16     // of the tunnel, inner bytes
	}
	evWelcome struct { // the stream is up
		said   lease.Ref // what we said to hold
		known  lease.Ref // the service's idea of our lease; zero Addr = none
		timers timers
	}
	evStandby struct{ why string } // "" = stand up again
	evFailed  struct{ err error }  // the lease could not be put into the packet path
	evTick    struct{}             // an instant that next() named has come
	evStop    struct{}
)

// The actions that a step asks for, in this order.
type (
	actRemove  struct{ ref lease.Ref } // take the lease out of packet path and kernel
	actInstall struct{ lease held }    // put it in, say Installed, send what was held
	actAnswer  struct{ ref lease.Ref } // say Installed again: an Offer came although we hold a lease
	actCall    struct {                // Bind, or Renew if request.ref is set; answer with id
		id  uint64
		req request
	}
	actRelease struct {
		ref    lease.Ref
		reason lease.Reason
	}
	actFlush struct{} // send held packets: there is a lease
	actProbe struct{} // find out about use; answer with evUse
	actDrop  struct{} // drop held packets: no lease will come in time
)

// timers are the times that the keeper works by.
type timers struct {
	t1, t2      float64       // of valid
	idle        time.Duration // after the last use
	keepSockets bool          // open sockets are use
	holdTime    time.Duration // how long a trigger is worth a retry
	backoffMin  time.Duration
	backoffMax  time.Duration
}

// blindIdle is the idle time of an agent that cannot see sockets (RFC 5382 section 5, REQ-5: 2 hours 4 minutes).
const blindIdle = 7440 * time.Second

// keeper decides when to have a lease. It is pure: no I/O, no clock, no goroutine.
type keeper struct {
	timers
	jitter func(time.Duration) time.Duration // spreads a wait, result in [d/2, d]

	state   State
	why     string // the reason of the last change, for people
	path    evPath
	lease   held
	call    uint64        // id of the outstanding call, 0 = none
	callID  uint64        // the last id given out
	calling request       // what the outstanding call asks for
	wait    time.Duration // current back-off, 0 = none
	tryAt   instant       // backing off: the next try; held: the next renewal
	wanted  instant       // until when a trigger is worth a try
	trigger evTrigger     // the last
	used    instant       // last known use of the lease
	revoked lease.Ref     // the last one revoked, in case its Bind's answer is slower
	giving  int           // Releases under way
	blind   bool          // the last probe could not see sockets
	probeAt instant
}

// next returns the instant at which the keeper wants evTick, ok false if none.
func (k *keeper) next() (at instant, ok bool) {
	switch {
	case k.state == StateBackingOff:
		return k.tryAt, true
	case k.state.holds():
		return min(k.lease.deadline(), k.probeAt), true
	}
	return 0, false
}

// step takes one event at an instant.
func (k *keeper) step(now instant, ev any) []any {
	switch ev := ev.(type) {
	case evTrigger:
		return k.onTrigger(now, ev)
	case evAnswer:
		return k.onAnswer(now, ev)
	case evReleased:
		return k.onReleased(now)
	case evRevoked:
		k.revoked = ev.ref
		if k.state.holds() && k.lease.ref() == ev.ref {
			return k.lose("revoked: " + ev.reason.String())
		}
	case evUse:
		return k.onUse(now, ev)
	case evPath:
		return k.onPath(now, ev)
	case evWelcome:
		return k.onWelcome(now, ev)
	case evStandby:
		return k.onStandby(ev)
	case evFailed:
		if k.state.holds() {
			k.call = 0
			k.backOff(now, "not installed: "+ev.err.Error())
			return []any{actRemove{k.lease.ref()}, k.giveBack(k.lease.ref(), lease.ReasonIdle), actDrop{}}
		}
	case evTick:
		return k.onTick(now)
	case evStop:
		return k.leave(StateIdle, "stopped", lease.ReasonIdle)
	}
	return nil
}

func (h held) ref() lease.Ref { return lease.Ref{Resource: h.Resource, Gen: h.Gen} }

func (k *keeper) to(s State, why string) { k.state, k.why = s, why }

// giveBack asks for a Release. Until it came back no Bind goes out: the service would answer a Bind that overtakes it with
// the same lease, and then take that back.
func (k *keeper) giveBack(ref lease.Ref, reason lease.Reason) any {
	k.giving++
	return actRelease{ref, reason}
}

// leave gives up whatever there is and goes to s.
func (k *keeper) leave(s State, why string, reason lease.Reason) []any {
	acts := []any{}
	if k.state.holds() {
		acts = append(acts, actRemove{k.lease.ref()}, k.giveBack(k.lease.ref(), reason))
	}
	k.call, k.wait = 0, 0
	k.to(s, why)
	return append(acts, actDrop{})
}

func (k *keeper) onTrigger(now instant, ev evTrigger) []any {
	k.trigger, k.wanted = ev, now+k.holdTime
	switch k.state {
	case StateIdle:
		return k.bind(ev)
	case StateBackingOff:
		if ev.trigger != lease.TriggerPacket { // the service or the user asks: no back-off against them
			return k.bind(ev)
		}
	case StateHeld, StateRenewing:
		switch ev.trigger {
		case lease.TriggerDNS:
			return []any{actAnswer{k.lease.ref()}}
		case lease.TriggerPacket: // it left just before the lease came
			return []any{actFlush{}}
		}
	}
	return nil
}

func (k *keeper) onReleased(now instant) []any {
	k.giving--
	if k.state != StateReleasing || k.giving > 0 {
		return nil
	}
	k.to(StateIdle, k.why)
	if now <= k.wanted { // a trigger came while the lease was on its way back
		return k.bind(k.trigger)
	}
	return nil
}

// bind asks for a lease from idle, backing-off or releasing.
func (k *keeper) bind(ev evTrigger) []any {
	if k.giving > 0 {
		k.to(StateReleasing, k.why)
		return nil
	}
	if !k.path.source.IsValid() {
		k.to(StateIdle, "no IPv6 way out")
		return []any{actDrop{}}
	}
	k.to(StateBinding, "trigger "+ev.trigger.String())
	return k.ask(request{trigger: ev.trigger, hint: ev.hint})
}

func (k *keeper) ask(r request) []any {
	if r.source, r.mtu = k.path.source, k.path.mtu; !r.source.IsValid() { // no way out just now: a renewal stays as it was
		r.source, r.mtu = k.lease.Host, k.lease.Binding.MTU
	}
	k.callID++
	k.call, k.calling = k.callID, r
	return []any{actCall{k.call, r}}
}

func (k *keeper) onAnswer(now instant, ev evAnswer) []any {
	if ev.id != k.call {
		// Nobody waits for it any more. A lease that came late is given back, unless it is the one we hold.
		if ev.err == nil && !(k.state.holds() && k.lease.ref() == ev.lease.ref()) && k.state != StateBinding {
			return []any{k.giveBack(ev.lease.ref(), lease.ReasonIdle)}
		}
		return nil
	}
	k.call = 0
	if ev.err != nil {
		return k.onRefused(now, ev.err)
	}
	if ev.lease.deadline() <= now || ev.lease.ref() == k.revoked {
		return k.onRefused(now, errOver)
	}
	return k.onBound(now, ev.lease)
}

func (k *keeper) onBound(now instant, l held) []any {
	var acts []any
	if k.state.holds() && k.lease.Addr != l.Addr { // the same address in a new generation keeps its connections
		acts = append(acts, actRemove{k.lease.ref()})
	}
	if !k.state.holds() {
		k.used = now
	}
	k.lease, k.wait = l, 0
	k.tryAt = l.sent + time.Duration(float64(l.valid)*k.t1)
	k.probeAt = k.nextProbe(now)
	k.to(StateHeld, "bound")
	acts = append(acts, actInstall{l})
	switch { // what changed while the call was under way
	case !k.path.source.IsValid():
	case k.path.source != l.Host:
		acts = append(acts, k.rebind("tunnel source changed")...)
	case k.path.mtu != k.calling.mtu:
		acts = append(acts, k.tellMTU()...)
	}
	return acts
}

func (k *keeper) onRefused(now instant, err error) []any {
	if k.state == StateBinding {
		k.backOff(now, err.Error())
		return nil
	}
	if k.state != StateRenewing {
		return nil
	}
	if !temporary(err) {
		// The lease is not ours any more, or the new source is not allowed: both end it. Use brings the next Bind.
		acts := []any{actRemove{k.lease.ref()}}
		k.wanted = now - 1
		if now-k.used < k.sampling() {
			k.wanted = now + k.holdTime
		}
		k.backOff(now, err.Error())
		return append(acts, actDrop{})
	}
	k.to(StateHeld, "renewal failed: "+err.Error())
	k.tryAt = now + k.retryIn(now)
	k.probeAt = k.nextProbe(now)
	return nil
}

// retryIn is the wait after a failed renewal: half of what is left until T2, then until the end, as in RFC 2131 section
// 4.4.5. A move to another tunnel source is more urgent, because the old one may carry nothing any more.
func (k *keeper) retryIn(now instant) time.Duration {
	if !k.calling.ref.Addr.IsValid() {
		k.wait = min(max(2*k.wait, k.backoffMin), k.backoffMax)
		return k.jitter(k.wait)
	}
	until := k.lease.sent + time.Duration(float64(k.lease.valid)*k.t2)
	if until <= now {
		until = k.lease.deadline()
	}
	return max(k.jitter((until-now)/2), min(k.backoffMin, (k.lease.deadline()-now)/2))
}

func (k *keeper) backOff(now instant, why string) {
	k.wait = min(max(2*k.wait, k.backoffMin), k.backoffMax)
	k.tryAt = now + k.jitter(k.wait)
	k.to(StateBackingOff, why)
}

func (k *keeper) onTick(now instant) []any {
	switch {
	case k.state == StateBackingOff && now >= k.tryAt:
		if now <= k.wanted {
			return k.bind(k.trigger)
		}
		k.to(StateIdle, k.why) // the next trigger asks at once; the wait goes on growing until one succeeds
		return []any{actDrop{}}
	case k.state.holds() && now >= k.lease.deadline():
		return k.lose("expired")
	case k.state.holds() && now >= k.probeAt:
		k.probeAt = now + k.sampling()
		return []any{actProbe{}}
	}
	return nil
}

// lose takes out a lease that is over. Sockets and packets that still want IPv4 trigger anew.
func (k *keeper) lose(why string) []any {
	ref := k.lease.ref()
	k.call, k.wait = 0, 0
	k.to(StateIdle, why)
	return []any{actRemove{ref}}
}

// sampling is how often use is looked at: four times per idle time, so that the end of use is known well enough.
func (k *keeper) sampling() time.Duration { return max(k.idle/4, time.Second/4) }

func (k *keeper) idleTime() time.Duration {
	if k.blind && k.keepSockets {
		return max(k.idle, blindIdle)
	}
	return k.idle
}

// nextProbe is when use must be known again: for sampling, for release and for renewal.
func (k *keeper) nextProbe(now instant) instant {
	at := min(now+k.sampling(), k.used+k.idleTime())
	if k.state != StateRenewing {
		at = min(at, max(k.tryAt, now))
	}
	return max(at, now+time.Millisecond)
}

func (k *keeper) onUse(now instant, ev evUse) []any {
	if !k.state.holds() {
		return nil
	}
	k.blind = !ev.socketsKnown
	k.used = max(k.used, ev.packet)
	if k.keepSockets && ev.sockets {
		k.used = now
	}
	if now-k.used >= k.idleTime() {
		ref := k.lease.ref()
		k.call, k.wanted = 0, now-1
		k.to(StateReleasing, "idle")
		return []any{actRemove{ref}, k.giveBack(ref, lease.ReasonIdle)}
	}
	var acts []any
	switch {
	case k.state != StateHeld || now < k.tryAt:
	case k.path.source.IsValid() && k.path.source != k.lease.Host:
		acts = k.rebind("tunnel source changed")
	default:
		k.to(StateRenewing, "renewal")
		acts = k.ask(request{ref: k.lease.ref()})
	}
	k.probeAt = k.nextProbe(now)
	return acts
}

func (k *keeper) onPath(now instant, ev evPath) []any {
	old := k.path
	k.path = ev
	if !k.state.holds() || !ev.source.IsValid() || old == ev {
		return nil
	}
	switch {
	case ev.source != k.lease.Host && !(k.call != 0 && k.calling.source == ev.source):
		return k.rebind("tunnel source changed")
	case ev.mtu != k.calling.mtu && k.call == 0: // calling is the last that was told
		return k.tellMTU()
	}
	return nil
}

func (k *keeper) tellMTU() []any {
	k.to(StateRenewing, "tunnel mtu changed")
	return k.ask(request{ref: k.lease.ref()})
}

// rebind binds again while the lease is in place: the service moves it to the new tunnel source with a new generation.
func (k *keeper) rebind(why string) []any {
	k.to(StateRenewing, why)
	return k.ask(request{trigger: lease.TriggerSocket, want: k.lease.Resource})
}

func (k *keeper) onWelcome(now instant, ev evWelcome) []any {
	k.t1, k.t2, k.idle = ev.timers.t1, ev.timers.t2, ev.timers.idle
	switch {
	case k.state.holds() && k.call != 0: // its answer settles everything
	case k.state.holds() && ev.known != k.lease.ref() && ev.said == k.lease.ref():
		return k.rebind("the lease service knows another lease")
	case k.state.holds():
		return []any{actAnswer{k.lease.ref()}} // the stream that should have said so may have been down
	case k.state == StateIdle && ev.known.Addr.IsValid():
		// Of an earlier life of this host: nobody here uses it.
		return []any{k.giveBack(ev.known, lease.ReasonIdle)}
	}
	return nil
}

func (k *keeper) onStandby(ev evStandby) []any {
	switch {
	case ev.why == "" && k.state == StateStandby:
		k.to(StateIdle, "standby ended")
	case ev.why != "" && k.state != StateStandby:
		return k.leave(StateStandby, ev.why, lease.ReasonIdle)
	}
	return nil
}
