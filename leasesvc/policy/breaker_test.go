package policy

import (
	"testing"
	"time"
)

func TestBreaker(t *testing.T) {
	type step struct {
		after time.Duration // since the step before
		how   outcome       // of a call now
		enter bool          // whether it may be made
		want  breakerState  // afterwards
		stuck bool
	}
	fail := func(n int) (out []step) {
		for i := range n {
			s := step{how: outTimeout, enter: true}
			if i == breakAfter-1 {
				s.want = open
			}
			out = append(out, s)
		}
		return out
	}
	for _, c := range []struct {
		name  string
		steps []step
	}{
		{"four failures do nothing", append(fail(4), step{how: outAllowed, enter: true}, step{how: outError, enter: true})},
		{"an answer in between counts from the start", append(append(fail(4), step{how: outDenied, enter: true}), fail(5)...)},
		{"calls without a result are neither", append(append(fail(4), step{how: outCanceled, enter: true}, step{how: outBusy, enter: true}), step{how: outInvalid, enter: true, want: open})},
		{"open until a second is over", append(
			fail(5),
			step{enter: false, want: open},
			step{after: firstOpen - 1, enter: false, want: open},
			step{after: 1, how: outAllowed, enter: true, want: closed},
		)},
		{"a probe that fails doubles the time", append(
			fail(5),
			step{after: firstOpen, how: outError, enter: true, want: open},
			step{after: 2*firstOpen - 1, enter: false, want: open},
			step{after: 1, how: outError, enter: true, want: open},
			step{after: 4*firstOpen - 1, enter: false, want: open},
			step{after: 1, how: outDenied, enter: true, want: closed},
		)},
		{"a probe whose end nobody saw is made again", append(
			fail(5),
			step{after: firstOpen, how: outCanceled, enter: true, want: open},
			step{how: outAllowed, enter: true, want: closed},
		)},
		{"after a recovery it begins again", append(append(
			fail(5),
			step{after: firstOpen, how: outError, enter: true, want: open},
			step{after: 2 * firstOpen, how: outAllowed, enter: true, want: closed},
		), append(fail(5), step{after: firstOpen, how: outAllowed, enter: true, want: closed})...)},
		{"probes without any answer: stuck", append(
			fail(5),
			step{after: firstOpen, how: outTimeout, enter: true, want: open},
			step{after: 2 * firstOpen, how: outTimeout, enter: true, want: open},
			step{after: 4 * firstOpen, how: outTimeout, enter: true, want: open, stuck: true},
		)},
		{"a plugin that says it cannot is not stuck", append(
			fail(5),
			step{after: firstOpen, how: outTimeout, enter: true, want: open},
			step{after: 2 * firstOpen, how: outError, enter: true, want: open},
			step{after: 4 * firstOpen, how: outTimeout, enter: true, want: open},
			step{after: 8 * firstOpen, how: outTimeout, enter: true, want: open},
			step{after: 16 * firstOpen, how: outTimeout, enter: true, want: open, stuck: true},
			step{after: maxOpen, how: outAllowed, enter: true, want: closed},
		)},
	} {
		t.Run(c.name, func(t *testing.T) {
			var b breaker
			now := at(t, "2026-03-04 12:00")
			for i, s := range c.steps {
				now = now.Add(s.after)
				turn, ok := b.enter(now)
				if ok != s.enter {
					t.Fatalf("step %d: enter %t, want %t", i, ok, s.enter)
				}
				stuck := ok && b.leave(now, turn, s.how)
				if b.state != s.want || stuck != s.stuck {
					t.Fatalf("step %d: %s, stuck %t; want %s, %t", i, b.state, stuck, s.want, s.stuck)
				}
			}
		})
	}
}

// TestBreakerLateCalls: what began before a change says nothing about the time after it.
func TestBreakerLateCalls(t *testing.T) {
	var b breaker
	now := at(t, "2026-03-04 12:00")
	late, _ := b.enter(now)
	for range breakAfter {
		turn, _ := b.enter(now)
		b.leave(now, turn, outTimeout)
	}
	b.leave(now, late, outAllowed)
	if b.state != open {
		t.Fatalf("%s after a late success, want open", b.state)
	}
	now = now.Add(firstOpen)
	probe, ok := b.enter(now)
	if _, second := b.enter(now); !ok || second || b.state != halfOpen {
		t.Fatalf("probe %t, second %t, %s: want one call in half-open", ok, second, b.state)
	}
	b.leave(now, late, outTimeout)
	if b.state != halfOpen {
		t.Fatalf("%s after a late failure, want half-open", b.state)
	}
	b.reset()
	b.leave(now, probe, outTimeout)
	if b.state != closed || b.failures != 0 {
		t.Errorf("%s, %d failures after the probe of a former process: want closed, 0", b.state, b.failures)
	}
}
