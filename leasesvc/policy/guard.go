package policy

import (
	"cmp"
	"context"
	"errors"
	"sync"
	"time"
)

const (
	maxCalls   = 64 // under way to one plugin
	firstRetry = 20 * time.Millisecond
	maxRetry   = 30 * time.Second
	// steady is how long a process must have run so that its end is no reason to wait longer for the next.
	steady = 10 * time.Second
)

// ErrInvalid marks an answer of a plugin that is none.
var ErrInvalid = errors.New("not an answer")

// Process is a plugin that runs.
type Process interface {
	// Decide returns when ctx ends at the latest. An error that is ErrInvalid means that the plugin did answer, one that is
	// context.DeadlineExceeded that the time was over for one of the two.
	Decide(ctx context.Context, r Request) (Decision, error)
	// Done is closed when the process has ended.
	Done() <-chan struct{}
	// End says how it ended, after Done.
	End() string
	// Close ends the process, within seconds, and returns when it has ended.
	Close()
}

// Starter starts the process of a plugin. ctx bounds the start, not the process.
type Starter func(ctx context.Context, c PluginConfig) (Process, error)

// outcome is how a call to a plugin went; its text is a label of metrics.
type outcome string

const (
	outAllowed  outcome = "allow"
	outDenied   outcome = "deny"
	outTimeout  outcome = "timeout"
	outInvalid  outcome = "invalid" // an answer that is none
	outError    outcome = "error"
	outDown     outcome = "down"     // no process
	outOpen     outcome = "breaker"  // the breaker is open
	outBusy     outcome = "busy"     // too many calls under way
	outCanceled outcome = "canceled" // the caller has gone, or another policy denied
)

// failed reports whether the plugin is to blame.
func (o outcome) failed() bool { return o == outTimeout || o == outInvalid || o == outError }

// unknown reports whether the call says nothing about the plugin.
func (o outcome) unknown() bool { return o == outCanceled || o == outBusy }

// guard stands before one plugin: it keeps a process running, and Binds from waiting for it.
type guard struct {
	conf  PluginConfig
	d     Deps
	m     pluginMetrics
	calls chan struct{} // a place for each call under way
	stuck chan struct{} // the process must be replaced

	mu      sync.Mutex
	proc    Process // nil = none runs
	breaker breaker
}

func newGuard(c PluginConfig, d Deps, m pluginMetrics) *guard {
	return &guard{conf: c, d: d, m: m, calls: make(chan struct{}, maxCalls), stuck: make(chan struct{}, 1)}
}

// onFailure decides in place of the plugin.
func (g *guard) onFailure() Decision {
	if g.conf.OnFailure == Open {
		return Decision{Verdict: Allow}
	}
	return Decision{Deny, "policy " + g.conf.Name + " does not answer"}
}

// decide asks the plugin, unless that is hopeless.
func (g *guard) decide(ctx context.Context, r Request) (Decision, outcome) {
	begin := g.d.Now()
	d, how := g.call(ctx, r)
	g.m.called(how, g.d.Now().Sub(begin))
	if how != outAllowed && how != outDenied {
		d = g.onFailure()
	}
	return d, how
}

func (g *guard) call(ctx context.Context, r Request) (Decision, outcome) {
	p, turn, how := g.enter()
	if p == nil {
		return Decision{}, how
	}
	ctx, cancel := context.WithTimeoutCause(ctx, g.conf.Budget, errBudget)
	defer cancel()
	select {
	case g.calls <- struct{}{}:
		defer func() { <-g.calls }()
	case <-ctx.Done():
		if how = interrupted(ctx); how == outTimeout {
			how = outBusy
		}
		g.leave(p, turn, how)
		return Decision{}, how
	}
	d, err := p.Decide(ctx, r)
	switch {
	case err == nil && d.Verdict == Allow:
		d, how = Decision{Verdict: Allow}, outAllowed
	case err == nil && d.Verdict == Deny:
		d.Reason, how = cmp.Or(Clean(d.Reason, MaxReason), "denied by policy "+g.conf.Name), outDenied
	case err == nil, errors.Is(err, ErrInvalid):
		how = outInvalid
	case errors.Is(err, context.DeadlineExceeded):
		how = cmp.Or(interrupted(ctx), outTimeout) // the other side's clock may be ahead of ours
	default:
		how = cmp.Or(interrupted(ctx), outError)
	}
	g.leave(p, turn, how)
	return d, how
}

// interrupted says what the end of a call's context means, "" if it has not ended.
func interrupted(ctx context.Context) outcome {
	switch {
	case ctx.Err() == nil:
		return ""
	case errors.Is(context.Cause(ctx), errBudget):
		return outTimeout
	}
	return outCanceled
}

// enter returns the process if it may be asked now, or why not.
func (g *guard) enter() (p Process, turn uint64, how outcome) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.proc == nil {
		return nil, 0, outDown
	}
	old := g.breaker.state
	turn, ok := g.breaker.enter(g.d.Now())
	g.changed(old, "time is over")
	if !ok {
		return nil, 0, outOpen
	}
	return g.proc, turn, ""
}

func (g *guard) leave(p Process, turn uint64, how outcome) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.proc != p {
		return
	}
	old := g.breaker.state
	stuck := g.breaker.leave(g.d.Now(), turn, how)
	g.changed(old, string(how))
	if stuck {
		select {
		case g.stuck <- struct{}{}:
		default:
		}
	}
}

// changed tells of a change of the breaker. The caller holds mu.
func (g *guard) changed(old breakerState, reason string) {
	s := g.breaker.state
	if s == old {
		return
	}
	g.m.breaker(s)
	if s == closed || old == closed { // between the two others it goes back and forth
		g.d.Log.Warn("policy plugin: breaker", "plugin", g.conf.Name, "old", old.String(), "new", s.String(), "reason", reason)
	}
}

// supervise keeps a process running until ctx ends. It calls tried after the first start, good or bad.
func (g *guard) supervise(ctx context.Context, tried func()) {
	defer tried()
	log := g.d.Log.With("plugin", g.conf.Name)
	wait := firstRetry
	for first := true; ctx.Err() == nil; first = false {
		if !first {
			g.m.restarted()
		}
		begin := g.d.Now()
		p, err := g.d.Start(ctx, g.conf)
		if err == nil {
			log.Info("policy plugin started")
			g.set(p)
			tried()
			how := g.watch(ctx, p)
			g.set(nil)
			p.Close()
			if ctx.Err() != nil {
				return
			}
			err = errors.New(how)
		}
		tried()
		if g.d.Now().Sub(begin) >= steady {
			wait = firstRetry
		}
		if ctx.Err() == nil {
			log.Warn("policy plugin does not run", "err", err, "retry", wait)
		}
		sleep(ctx, wait)
		wait = min(2*wait, maxRetry)
	}
}

// watch returns why the process is of no use any more.
func (g *guard) watch(ctx context.Context, p Process) string {
	select {
	case <-p.Done():
		return "ended: " + p.End()
	case <-g.stuck:
		return "does not answer: it is ended"
	case <-ctx.Done():
		return ""
	}
}

// set puts a process in the place of the former one; nil = there is none.
func (g *guard) set(p Process) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.proc = p
	old := g.breaker.state
	g.breaker.reset()
	g.changed(old, "another process")
	g.m.up(p != nil)
	select {
	case <-g.stuck: // was about the former one
	default:
	}
}

func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
