// Package policy says who may have a lease: rules and quotas of the configuration, and external policies, which are plugins
// in processes of their own. All of them must allow; the first that denies decides. An answer takes no longer than the
// budget, whatever a plugin does.
//
// Rules and quotas are pure: the caller gives the time. The processes are behind Starter; package external starts them.
package policy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/dstm-project/dstm/lease"
)

// Verdict is what a policy says. The zero value is no verdict, and allows nothing.
type Verdict uint8

// The verdicts; numbers as in dstm.policy.v1.Verdict.
const (
	Allow Verdict = 1
	Deny  Verdict = 2
)

// String returns the verdict as the configuration has it.
func (v Verdict) String() string {
	switch v {
	case Allow:
		return "allow"
	case Deny:
		return "deny"
	}
	return fmt.Sprintf("verdict %d", uint8(v))
}

// Request is what a decision is about: a new lease for an authenticated host.
type Request struct {
	Host    string     // identity: the name in the host's certificate
	Source  netip.Addr // IPv6 address that the tunnel comes from, checked already
	Trigger lease.Trigger
	Pool    string // that the address would come from; empty = not chosen yet, which no rule with pools matches
}

// Decision is the answer.
type Decision struct {
	Verdict Verdict
	Reason  string // of a denial, for the host and its user: at most MaxReason bytes, no control characters
}

// Allowed reports whether the lease may be given.
func (d Decision) Allowed() bool { return d.Verdict == Allow }

// Deps are what an Engine is built from.
type Deps struct {
	Start    Starter // of plugins; may be nil when none is configured
	Log      *slog.Logger
	Registry prometheus.Registerer // nil = no metrics
	Now      func() time.Time      // nil = time.Now
}

// Engine decides by a configuration.
type Engine struct {
	budget  time.Duration
	rules   []Rule
	quotas  *quotas
	plugins []*guard
	d       Deps
	m       *metrics
}

// New returns the engine of a configuration that Check found nothing wrong with. Plugins are asked once Run has started them;
// until then on_failure decides for them.
func New(c Config, d Deps) *Engine {
	if d.Now == nil {
		d.Now = time.Now
	}
	e := &Engine{budget: c.Budget, rules: c.Rules, d: d, m: newMetrics(d.Registry, c.Plugins)}
	e.quotas = newQuotas(c.Quotas, d.Now(), e.m.evicted)
	for _, p := range c.Plugins {
		if p.Budget == 0 {
			p.Budget = c.Budget
		}
		e.plugins = append(e.plugins, newGuard(p, d, e.m.of(p.Name)))
	}
	return e
}

// Run keeps the plugins running until ctx ends; then it ends them and returns nil. It calls ready when each has been started
// for the first time, or could not be.
func (e *Engine) Run(ctx context.Context, ready func()) error {
	var first, all sync.WaitGroup
	for _, g := range e.plugins {
		first.Add(1)
		all.Go(func() { g.supervise(ctx, sync.OnceFunc(first.Done)) })
	}
	first.Wait()
	ready()
	<-ctx.Done()
	all.Wait()
	return nil
}

// Decide answers within the budget. Each call takes from the quotas of its host and its /64 unless a rule denies it, so ask
// once for each new lease, not for renewals or a request that is repeated.
func (e *Engine) Decide(ctx context.Context, r Request) Decision {
	begin := e.d.Now()
	d, why := e.decide(ctx, begin, r)
	e.m.decided(why, e.d.Now().Sub(begin))
	return d
}

func (e *Engine) decide(ctx context.Context, now time.Time, r Request) (Decision, result) {
	if d := decideByRules(e.rules, now, r); !d.Allowed() {
		return d, deniedByRule
	}
	if d := e.quotas.take(now, r); !d.Allowed() {
		return d, deniedByQuota
	}
	if len(e.plugins) == 0 {
		return Decision{Verdict: Allow}, allowed
	}
	return e.ask(ctx, r)
}

// Why the context of a call ended, if not by the caller.
var (
	errBudget = errors.New("the budget is spent")
	errEnough = errors.New("another policy denied")
)

const callerGone = "the caller has gone"

type answer struct {
	from *guard
	Decision
	outcome
}

// ask asks all plugins at once: one that is slow must not take the time of the others.
func (e *Engine) ask(caller context.Context, r Request) (Decision, result) {
	timed, stop := context.WithTimeoutCause(caller, e.budget, errBudget)
	defer stop()
	ctx, cancel := context.WithCancelCause(timed)
	defer cancel(errEnough)
	answers := make(chan answer, len(e.plugins))
	waiting := make(map[*guard]bool, len(e.plugins))
	for _, g := range e.plugins {
		waiting[g] = true
		go func() {
			d, how := g.decide(ctx, r)
			answers <- answer{g, d, how}
		}()
	}
	all := allowed
	for len(waiting) > 0 {
		a, ok := next(ctx, answers)
		if !ok {
			return e.outOfTime(ctx, waiting)
		}
		delete(waiting, a.from)
		switch {
		case a.outcome == outCanceled:
			return Decision{Deny, callerGone}, canceled
		case a.Allowed() && a.outcome != outAllowed:
			all = allowedDespite
		case !a.Allowed() && a.outcome == outDenied:
			return a.Decision, deniedByPlugin
		case !a.Allowed():
			return a.Decision, deniedByFailure
		}
	}
	return Decision{Verdict: Allow}, all
}

// next returns the next answer: one that is there, even if the time is over.
func next(ctx context.Context, answers <-chan answer) (answer, bool) {
	select {
	case a := <-answers:
		return a, true
	default:
	}
	select {
	case a := <-answers:
		return a, true
	case <-ctx.Done():
		return answer{}, false
	}
}

// outOfTime decides for those who have not answered. What they still do is bounded by the same context; they count it.
func (e *Engine) outOfTime(ctx context.Context, waiting map[*guard]bool) (Decision, result) {
	if !errors.Is(context.Cause(ctx), errBudget) {
		return Decision{Deny, callerGone}, canceled
	}
	for _, g := range e.plugins {
		if d := g.onFailure(); waiting[g] && !d.Allowed() {
			return d, deniedByFailure
		}
	}
	return Decision{Verdict: Allow}, allowedDespite
}
