package hostd

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/dstm-project/dstm/internal/hostprobe"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/leaseclient"
)

// longestWait is how long a sleep of the machine can go unnoticed when nothing else happens.
const longestWait = 10 * time.Second

// loop is the only goroutine that touches the keeper and the kernel.
func (a *Agent) loop(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	boot, mono := a.Now(), time.Now()
	for {
		wait := longestWait
		if at, ok := a.k.next(); ok {
			wait = min(wait, max(0, at-a.Now()))
		}
		timer.Reset(wait)
		select {
		case ev := <-a.events:
			a.step(ctx, ev)
		case <-timer.C:
			a.step(ctx, evTick{})
		case <-ctx.Done():
			// The lease goes back while there still is a way to say so.
			end, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
			defer cancel()
			a.step(end, evStop{})
			return nil
		}
		// Timers stand still while the machine sleeps, the lease does not.
		if slept := a.Now() - boot - time.Since(mono); slept > time.Second {
			a.resumed(slept)
		}
		boot, mono = a.Now(), time.Now()
	}
}

// resumed redials after a sleep: the other side has given the connection up, or the host is somewhere else.
func (a *Agent) resumed(slept time.Duration) {
	a.Log.Info("machine slept", "dur", slept)
	a.mu.Lock()
	a.view.path++
	a.mu.Unlock()
	a.Service.Reset()
	a.wakeAttend()
}

// step gives an event to the keeper and does what it asks for.
func (a *Agent) step(ctx context.Context, ev any) {
	old, why := a.k.state, a.k.why
	acts := a.k.step(a.Now(), ev)
	a.show()
	if a.k.state != old || a.k.why != why {
		a.report(old)
	}
	if (old == StateStandby) != (a.k.state == StateStandby) {
		a.applyNetwork()
		a.wakeAttend()
	}
	_, stopping := ev.(evStop)
	for _, act := range acts {
		a.do(ctx, act, stopping)
	}
}

// show publishes the keeper's state.
func (a *Agent) show() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.view.state, a.view.why, a.view.lease, a.view.has = a.k.state, a.k.why, a.k.lease, a.k.state.holds()
	a.metrics.state(a.k.state)
}

// report logs what people want to know: a lease got, lost, refused, and standby. Steps on the way there, renewals and a
// refusal for the same reason as the last are for debugging.
func (a *Agent) report(old State) {
	log, now := a.Log.Info, a.k.state
	switch {
	case old == now, old.holds() && now.holds(), now == StateBinding, now == StateReleasing:
		log = a.Log.Debug
	case now == StateBackingOff || old == StateBackingOff:
		if a.k.why == a.refusal {
			log = a.Log.Debug
		}
		a.refusal = a.k.why
	case now == StateHeld:
		a.refusal = ""
	}
	args := []any{"old", old.String(), "new", a.k.state.String(), "reason", a.k.why}
	if old.holds() || a.k.state.holds() {
		args = append(args, "addr", a.k.lease.Addr.String(), "gen", a.k.lease.Gen.String(), "tep", a.k.lease.TEP.String())
	}
	log("lease", args...)
}

func (a *Agent) do(ctx context.Context, act any, stopping bool) {
	switch act := act.(type) {
	case actInstall:
		if err := a.install(ctx, act.lease); err != nil {
			a.Log.Error("lease cannot be used", "addr", act.lease.Addr.String(), "err", err)
			a.step(ctx, evFailed{err})
			return
		}
		a.installed(act.lease.ref())
		a.flush(ctx)
	case actRemove:
		a.remove(ctx, act.ref)
	case actAnswer:
		a.installed(act.ref)
	case actFlush:
		a.flush(ctx)
	case actCall:
		go a.call(ctx, act)
	case actRelease:
		if stopping {
			a.release(ctx, act)
			return
		}
		go func() {
			a.release(ctx, act)
			a.post(ctx, evReleased{})
		}()
	case actProbe:
		go a.probe(ctx, a.k.lease.Binding)
	case actDrop:
		a.mu.Lock()
		n := a.held.clear()
		a.mu.Unlock()
		a.metrics.heldPackets("dropped", n)
	}
}

// install puts the lease into the packet path before the kernel may use its address.
func (a *Agent) install(ctx context.Context, l held) error {
	if err := a.DataPath.SetLease(ctx, &l.Binding, uint64(l.deadline())); err != nil {
		return err
	}
	if err := a.Network.SetDevice(a.cfg.Device.Name, int(l.Binding.MTU)); err != nil {
		return err
	}
	return a.Network.Set(a.desired())
}

// remove ends the local connections while the way is still there (their peers hear of it), then takes the address from
// the kernel, so that nothing with this source can leave by another way, then the lease from the packet path.
func (a *Agent) remove(ctx context.Context, ref lease.Ref) {
	n, err := a.Sockets.Abort(func(c hostprobe.Conn) bool { return a.viaTunnel(c.Local, ref.Addr) })
	if err != nil {
		a.Log.Warn("connections not ended", "addr", ref.Addr.String(), "err", err)
	}
	if n > 0 {
		a.Log.Info("connections ended", "addr", ref.Addr.String(), "count", n)
	}
	a.applyNetwork()
	if err := a.DataPath.SetLease(ctx, nil, 0); err != nil {
		a.Log.Error("lease not removed from the data path", "addr", ref.Addr.String(), "err", err)
	}
}

func (a *Agent) applyNetwork() {
	if err := a.Network.Set(a.desired()); err != nil {
		a.Log.Error("network not as desired", "err", err)
	}
}

// installed tells the service; without a stream the next Hello does.
func (a *Agent) installed(ref lease.Ref) {
	a.mu.Lock()
	s := a.view.stream
	a.mu.Unlock()
	if s == nil {
		return
	}
	if err := s.Installed(ref); err != nil {
		a.Log.Debug("installed not sent", "err", err)
	}
}

func (a *Agent) call(ctx context.Context, act actCall) {
	callCtx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	r := act.req
	sent := a.Now()
	var l leaseclient.Lease
	var err error
	kind := "bind"
	if r.ref.Addr.IsValid() {
		kind = "renew"
		l, err = a.Service.Renew(callCtx, leaseclient.RenewRequest{Ref: r.ref, Source: r.source, MTU: r.mtu})
	} else {
		l, err = a.Service.Bind(callCtx, leaseclient.BindRequest{
			Source: r.source, Hint: r.hint, Want: r.want.Addr, Trigger: r.trigger, MTU: r.mtu,
		})
	}
	a.metrics.call(kind, err, a.Now()-sent)
	if err == nil && !l.Installed {
		a.Log.Warn("gateways do not have the lease yet", "addr", l.Addr.String(), "waiting", fmt.Sprint(l.Waiting))
	}
	mtu := r.mtu
	if l.MTU != 0 {
		mtu = min(mtu, l.MTU)
	}
	a.post(ctx, evAnswer{id: act.id, err: err, lease: held{
		Binding: lease.Binding{Resource: l.Resource, Host: r.source, TEP: l.TEP, Gen: l.Gen, MTU: mtu},
		sent:    sent, valid: l.Valid,
	}})
}

func (a *Agent) release(ctx context.Context, act actRelease) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	start := a.Now()
	err := a.Service.Release(ctx, act.ref, act.reason)
	a.metrics.call("release", err, a.Now()-start)
	if err != nil {
		a.Log.Warn("lease not given back, it ends by itself", "addr", act.ref.Addr.String(), "gen", act.ref.Gen.String(), "err", err)
	}
}

// viaTunnel reports whether a local address is the lease's, or the placeholder, which the packet path rewrites.
func (a *Agent) viaTunnel(local, leased netip.Addr) bool {
	return local == leased || local == a.cfg.Device.Placeholder.Addr()
}

// probe finds out whether the lease is in use: by packets that this host sent, because strangers send to every address
// all day long, and by connections to somewhere that would ask for a lease.
func (a *Agent) probe(ctx context.Context, b lease.Binding) {
	ev := evUse{socketsKnown: true}
	var err error
	if ev.packet, err = a.lastSent(ctx); err != nil {
		a.Log.Warn("activity of the data path not known", "err", err)
		ev.packet = a.Now() // unknown counts as use: a lease too long is better than one cut off
	}
	a.mu.Lock()
	own := append(slices.Clone(a.view.net.own), a.cfg.Device.Placeholder)
	a.mu.Unlock()
	ev.sockets, err = a.Sockets.InUse(func(c hostprobe.Conn) bool {
		return a.viaTunnel(c.Local, b.Addr) && destination(c.Remote, own) == CausePacket
	})
	if err != nil {
		a.Log.Debug("sockets not known", "err", err)
		ev.socketsKnown = false
	}
	a.post(ctx, ev)
}

// lastSent returns when the packet path was last busy, 0 if this host has sent nothing since the last probe.
func (a *Agent) lastSent(ctx context.Context) (time.Duration, error) {
	c, err := a.DataPath.Counters(ctx)
	if err != nil {
		return 0, err
	}
	a.mu.Lock()
	before := a.view.sent
	a.view.sent = c.Up.Tx
	a.mu.Unlock()
	if c.Up.Tx == before {
		return 0, nil
	}
	return a.DataPath.Activity(ctx)
}

// flush sends what was held, now through the lease.
func (a *Agent) flush(ctx context.Context) {
	for {
		a.mu.Lock()
		p, late, ok := a.held.pop(time.Now())
		a.mu.Unlock()
		a.metrics.heldPackets("dropped", late)
		if !ok {
			return
		}
		if err := a.DataPath.Inject(ctx, p); err != nil {
			a.metrics.heldPackets("dropped", 1)
			a.Log.Debug("held packet not sent", "err", err)
			continue
		}
		a.metrics.heldPackets("sent", 1)
	}
}
