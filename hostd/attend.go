package hostd

import (
	"context"
	"net/netip"
	"slices"
	"time"

	"github.com/dstm-project/dstm/internal/netcfg"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/leaseclient"
)

// wakeAttend makes the attend task look at the view again.
func (a *Agent) wakeAttend() {
	select {
	case a.wake <- struct{}{}:
	default:
	}
}

// attend keeps the host registered for as long as it is not in standby.
func (a *Agent) attend(ctx context.Context) error {
	wait := attendRetryMin
	for ctx.Err() == nil {
		a.mu.Lock()
		v := a.view
		a.mu.Unlock()
		if v.state == StateStandby || !v.net.source.IsValid() {
			a.notAttended(idleReason(v))
			a.sleep(ctx, time.Hour)
			continue
		}
		begun := time.Now()
		err := a.attendOnce(ctx, v)
		if ctx.Err() != nil {
			return nil
		}
		a.mu.Lock()
		served, moved := a.view.attended, a.view.path != v.path
		a.mu.Unlock()
		a.notAttended(err.Error())
		// A stream that is accepted and ended at once, as by another machine with our identity, is no service.
		if served && time.Since(begun) > attendRetryMax || moved {
			wait = attendRetryMin
		}
		if !moved {
			a.sleep(ctx, jitter(wait))
		}
		wait = min(2*wait, attendRetryMax)
	}
	return nil
}

func idleReason(v view) string {
	if v.state == StateStandby {
		return "standby"
	}
	return "no IPv6 way to the lease service"
}

// sleep waits, less if the attend task is woken.
func (a *Agent) sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-a.wake:
	case <-ctx.Done():
	}
}

// notAttended logs once why the host is not registered.
func (a *Agent) notAttended(why string) {
	a.mu.Lock()
	was, old := a.view.attended, a.view.problem
	a.view.attended, a.view.stream, a.view.problem = false, nil, why
	a.mu.Unlock()
	a.metrics.attended(false)
	if was || old != why {
		a.Log.Warn("not registered at the lease service", "reason", why)
	}
}

// attendOnce is one life of the stream. It returns why it ended.
func (a *Agent) attendOnce(ctx context.Context, v view) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	hello := leaseclient.Hello{Instance: a.instance, Sources: v.net.sources}
	if v.has {
		hello.Held = v.lease.ref()
	}
	// A lost network may not answer at all: the wait for the welcome is bounded, the stream is not.
	slow := time.AfterFunc(callTimeout, cancel)
	s, w, err := a.Service.Attend(ctx, hello)
	if !slow.Stop() && err == nil {
		s.Close()
		err = context.DeadlineExceeded
	}
	if err != nil {
		return err
	}
	defer s.Close()
	a.mu.Lock()
	a.view.stream, a.view.attended, a.view.problem = s, true, ""
	now := a.view.net.sources
	a.mu.Unlock()
	a.metrics.attended(true)
	a.Log.Info("registered at the lease service", "cell", w.Cell, "host", w.HostID)
	a.post(ctx, evWelcome{said: hello.Held, known: w.Known, timers: a.timers(float64(w.T1)/1000, float64(w.T2)/1000, w.Idle)})
	if !slices.Equal(now, v.net.sources) { // they changed while the stream came up
		if err := s.Sources(now); err != nil {
			return err
		}
	}
	done := make(chan struct{})
	defer close(done)
	go a.closeOnWake(ctx, s, v.path, done)
	return a.receive(ctx, s)
}

// closeOnWake ends the stream when the host stands by or its way out changed.
func (a *Agent) closeOnWake(ctx context.Context, s Stream, path uint64, done <-chan struct{}) {
	for {
		select {
		case <-done:
			return
		case <-ctx.Done():
			return
		case <-a.wake:
			a.mu.Lock()
			end := a.view.state == StateStandby || a.view.path != path
			a.mu.Unlock()
			if end {
				s.Close()
				return
			}
		}
	}
}

func (a *Agent) receive(ctx context.Context, s Stream) error {
	for {
		m, err := s.Recv()
		if err != nil {
			return err
		}
		switch m := m.(type) {
		case leaseclient.Offer:
			a.metrics.trigger(CauseDNS)
			a.post(ctx, evTrigger{trigger: lease.TriggerDNS, hint: m.Hint})
		case leaseclient.Revoked:
			a.post(ctx, evRevoked{m.Ref, m.Reason})
		}
	}
}

// netState is the host's network as far as it matters here.
type netState struct {
	sources []netip.Addr   // reported to the service
	hop     netcfg.Hop     // the way out
	source  netip.Addr     // of the tunnel; not valid = no way
	mtu     uint16         // of the tunnel
	own     []netip.Prefix // IPv4 prefixes of other interfaces
	native  bool           // an IPv4 default route that is not ours
	problem string         // of the packet path with these uplinks
}

// watch reads the network after changes.
func (a *Agent) watch(ctx context.Context, changes <-chan struct{}) error {
	for {
		select {
		case _, ok := <-changes:
			if !ok {
				return nil
			}
		case <-ctx.Done():
			return nil
		}
		select { // one change seldom comes alone
		case <-time.After(settle):
		case <-ctx.Done():
			return nil
		}
		select {
		case <-changes:
		default:
		}
		if err := a.look(ctx); err != nil {
			a.Log.Warn("network not read", "err", err)
		}
	}
}

// look reads the network and tells the keeper and the service what differs.
func (a *Agent) look(ctx context.Context) error {
	a.mu.Lock()
	old, v := a.view.net, a.view
	a.mu.Unlock()
	cur, err := a.read(v)
	if err != nil {
		return err
	}
	moved := cur.source != old.source || cur.hop.Link != old.hop.Link || cur.hop.Gateway != old.hop.Gateway
	reported := !slices.Equal(cur.sources, old.sources)
	mtu := cur.mtu
	if v.has {
		mtu = min(mtu, v.lease.Binding.MTU)
	}
	// Interfaces may have come or have been made anew under the same name. The same again changes nothing.
	problem := ""
	if err := a.configurePath(ctx, mtu); err != nil {
		problem = err.Error()
	}
	if problem != "" && problem != old.problem {
		a.Log.Warn("data path not configured", "err", problem)
	}
	cur.problem = problem
	a.mu.Lock()
	a.view.net = cur
	if moved {
		a.view.path++
	}
	stream := a.view.stream
	a.mu.Unlock()
	if moved {
		a.Log.Info("way out", "old", text(old.source), "new", text(cur.source), "link", cur.hop.Link, "mtu", cur.mtu)
		if old.source.IsValid() {
			a.Service.Reset()
		}
		a.wakeAttend()
	} else if reported && stream != nil {
		if err := stream.Sources(cur.sources); err != nil {
			a.Log.Debug("sources not sent", "err", err)
		}
	}
	why := ""
	if cur.native {
		why = standbyNative
	}
	if (v.state == StateStandby) != cur.native {
		a.post(ctx, evStandby{why})
	}
	if moved || cur.mtu != old.mtu {
		a.post(ctx, evPath{cur.source, cur.mtu})
	}
	return nil
}

func (a *Agent) read(v view) (netState, error) {
	var n netState
	addrs, err := a.Network.GlobalIPv6()
	if err != nil {
		return n, err
	}
	v4, err := a.Network.ReadIPv4()
	if err != nil {
		return n, err
	}
	n.native = v4.HasDefault && v4.Default.Link != a.cfg.Device.Name
	for _, p := range v4.Addrs {
		if p.Link != a.cfg.Device.Name {
			n.own = append(n.own, p.Prefix)
		}
	}
	n.sources = sources(addrs, a.cfg.Device.Name)
	targets := []netip.Addr{}
	if v.has {
		targets = append(targets, v.lease.TEP)
	}
	for _, s := range a.cfg.LeaseService.Servers {
		targets = append(targets, s.Addr())
	}
	for _, t := range targets {
		if hop, err := a.Network.Lookup(t); err == nil { // no way to one is a way to look for another
			n.hop, n.source = hop, tunnelSource(addrs, hop, v.net.source)
			n.mtu = tunnelMTU(hop)
			break
		}
	}
	return n, nil
}

// text shows an address that need not be there.
func text(a netip.Addr) string {
	if !a.IsValid() {
		return "none"
	}
	return a.String()
}
