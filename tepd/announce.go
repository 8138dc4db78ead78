package tepd

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"time"

	"github.com/dstm-project/dstm/bgp"
)

// Speakers starts the speaker process, or takes over the one that a former tepd started.
type Speakers interface {
	// Attach returns the speaker. reattached: it ran before us and may announce routes.
	Attach(ctx context.Context) (s bgp.Remote, reattached bool, err error)
}

const (
	speakerTimeout  = 5 * time.Second // of every call to the speaker
	attachTimeout   = 15 * time.Second
	attachRetry     = 2 * time.Second // from one attempt to start a speaker to the next
	beatEvery       = time.Second     // also how soon the death of a speaker is seen
	withdrawTimeout = 3 * time.Second // of everything at the end
)

// action is what to do about announcements.
type action uint8

const (
	actWait     action = iota // leave whatever is announced as it is
	actAnnounce               // exactly the desired routes
	actWithdraw               // nothing
)

// decide says what to do. A restarted tepd leaves the routes of a speaker that it took over alone until it is healthy, but
// not longer than grace: the packet path forwards under its old deadline meanwhile.
func decide(h Health, everUp bool, sinceStart, grace time.Duration) action {
	switch {
	case h.announces():
		return actAnnounce
	case !everUp && sinceStart < grace:
		return actWait
	}
	return actWithdraw
}

// announcer keeps the speaker at the desired routes. It is used by one goroutine.
type announcer struct {
	g       *Gateway
	conf    bgp.Config
	begun   time.Duration
	everUp  bool
	sp      bgp.Remote
	retryAt time.Duration
	beatAt  time.Duration
	version uint64
	known   bool          // sent is what the speaker has
	sent    []bgp.Route   // what it has
	until   time.Duration // the deadline that it was given, CLOCK_BOOTTIME
	said    string        // the refusals that were logged last
	failed  string        // the error that was logged last
}

// announce runs the announcer until ctx ends, then withdraws and ends the speaker.
func (g *Gateway) announce(ctx context.Context, conf bgp.Config) error {
	a := &announcer{g: g, conf: conf, begun: g.Now()}
	t := time.NewTicker(g.cfg.Health.Interval)
	defer t.Stop()
	for {
		a.step(ctx)
		select {
		case <-ctx.Done():
			a.close()
			return nil
		case <-g.wake:
		case <-t.C:
		}
	}
}

// step does what is due. Errors are logged, each once; the next step tries again.
func (a *announcer) step(ctx context.Context) {
	err := a.attach(ctx)
	if err == nil && a.sp != nil {
		if err = a.beat(ctx); err == nil {
			err = a.reconcile(ctx)
		}
		if err != nil && ctx.Err() == nil {
			a.lose()
		}
	}
	switch {
	case ctx.Err() != nil:
	case err == nil && a.sp != nil:
		a.failed = ""
		a.g.view.setSpeaker(a.sp, "")
	case err != nil && err.Error() != a.failed:
		a.failed = err.Error()
		a.g.Log.Error("bgp speaker", "err", err)
		a.g.view.setSpeaker(a.sp, a.failed)
	}
}

func (a *announcer) attach(ctx context.Context) error {
	if a.sp != nil || a.g.Now() < a.retryAt {
		return nil
	}
	a.retryAt = a.g.Now() + attachRetry
	ctx, cancel := context.WithTimeout(ctx, attachTimeout)
	defer cancel()
	sp, reattached, err := a.g.Speakers.Attach(ctx)
	if err != nil {
		return fmt.Errorf("start: %w", err)
	}
	st, err := sp.Status(ctx)
	if err != nil {
		return fmt.Errorf("status: %w", err)
	}
	if err := sp.Configure(ctx, a.conf); errors.Is(err, bgp.ErrRestart) {
		a.g.Log.Warn("bgp speaker starts anew for the changed configuration", "reason", err)
		if err := sp.Close(ctx, bgp.Withdraw); err != nil {
			a.g.Log.Warn("bgp speaker not closed", "err", err)
		}
		a.retryAt = 0
		return a.attach(ctx)
	} else if err != nil {
		return fmt.Errorf("configure: %w", err)
	}
	a.sp, a.version, a.sent, a.until = sp, st.Version, st.Routes, 0
	a.known = len(st.Routes) == 0 // communities and the like may have changed; the first Set decides
	a.beatAt = 0
	a.g.Log.Info("bgp speaker attached", "reattached", reattached, "routes", len(st.Routes), "implementation", st.Implementation)
	return nil
}

// lose gives up a speaker that does not answer; the next attach finds it again or starts another.
func (a *announcer) lose() {
	a.sp, a.known, a.sent = nil, false, nil
}

func (a *announcer) beat(ctx context.Context) error {
	if a.g.Now() < a.beatAt {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, speakerTimeout)
	defer cancel()
	if err := a.sp.Beat(ctx); err != nil {
		return fmt.Errorf("beat: %w", err)
	}
	a.beatAt = a.g.Now() + min(a.conf.Orphan/4, beatEvery)
	return nil
}

// reconcile compares what the speaker has with what is desired now.
func (a *announcer) reconcile(ctx context.Context) error {
	v := a.g.view.load()
	a.everUp = a.everUp || v.health.announces()
	switch decide(v.health, a.everUp, a.g.Now()-a.begun, a.g.cfg.BGP.Speaker.Grace) {
	case actAnnounce:
		pools, _ := served(a.g.cfg, v.routes.pools)
		want := desiredRoutes(a.g.cfg, pools, v.routes.addrs, v.routes.leases)
		a.tell(want)
		return a.set(ctx, want.routes, time.Duration(v.replica.Deadline))
	case actWithdraw:
		return a.withdraw(ctx)
	case actWait:
	}
	return nil
}

// set announces exactly the routes, which the speaker withdraws by itself when the deadline of the packet path passes.
func (a *announcer) set(ctx context.Context, routes []bgp.Route, deadline time.Duration) error {
	now := a.g.Now()
	// An unchanged set is sent again when a quarter of its time is over, so that not each heartbeat costs a call.
	fresh := a.until == deadline || a.until-now > (deadline-now)*3/4
	if a.known && fresh && reflect.DeepEqual(routes, a.sent) {
		return nil
	}
	if err := a.send(ctx, routes, time.Now().Add(deadline-now)); err != nil {
		return err
	}
	a.until = deadline
	return nil
}

// withdraw takes back everything, the tunnel address first: hosts must find another gateway before answers do.
func (a *announcer) withdraw(ctx context.Context) error {
	if a.known && len(a.sent) == 0 {
		return nil
	}
	var pools []bgp.Route
	for _, r := range a.sent {
		if r.Prefix.Addr().Is4() {
			pools = append(pools, r)
		}
	}
	if len(pools) > 0 && len(pools) < len(a.sent) {
		left := time.Now().Add(withdrawTimeout) // never longer, should we end in between
		if err := a.send(ctx, pools, left); err != nil {
			return err
		}
	}
	return a.send(ctx, nil, time.Time{})
}

func (a *announcer) send(ctx context.Context, routes []bgp.Route, notAfter time.Time) error {
	ctx, cancel := context.WithTimeout(ctx, speakerTimeout)
	defer cancel()
	a.version++
	adv, err := a.sp.Set(ctx, bgp.RouteSet{Version: a.version, Routes: routes, NotAfter: notAfter})
	if err != nil {
		a.known = false
		return fmt.Errorf("set: %w", err)
	}
	a.g.metrics.announced.Set(float64(len(adv.Prefixes)))
	for _, r := range adv.Refused {
		a.g.Log.Error("route refused by the speaker", "route", r.Prefix.String(), "reason", r.Reason)
	}
	if !a.known || len(routes) != len(a.sent) {
		a.g.Log.Info("announced", "old", len(a.sent), "new", len(routes))
	}
	a.known, a.sent = true, routes
	return nil
}

// tell logs what is desired but not announced, when it changed.
func (a *announcer) tell(want announcement) {
	var lines []string
	for _, r := range want.refused {
		lines = append(lines, r.Reason)
	}
	if want.capped > 0 {
		lines = append(lines, fmt.Sprintf("%d leases are more than max_host_routes %d: the pools are announced as aggregates",
			want.capped, a.g.cfg.BGP.Announce.MaxHostRoutes))
	}
	a.g.metrics.refused.Set(float64(len(want.refused)))
	a.g.metrics.capped.Set(float64(want.capped))
	said := strings.Join(lines, "\n")
	if said == a.said {
		return
	}
	a.said = said
	a.g.view.setNotes(lines)
	for _, l := range lines {
		a.g.Log.Warn("not announced", "reason", l)
	}
}

// close withdraws and ends the speaker. The packet path goes on, so that what is under way to us still arrives.
func (a *announcer) close() {
	if a.sp == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), withdrawTimeout)
	defer cancel()
	if err := a.withdraw(ctx); err != nil {
		a.g.Log.Warn("not withdrawn", "err", err)
	}
	if err := a.sp.Close(ctx, bgp.Withdraw); err != nil {
		a.g.Log.Warn("bgp speaker not closed", "err", err)
	}
	a.g.view.setSpeaker(nil, "stopped")
}
