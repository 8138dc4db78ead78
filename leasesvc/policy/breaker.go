package policy

import (
	"fmt"
	"time"
)

const (
	breakAfter = 5                // failures in a row
	firstOpen  = time.Second      // then twice as long after each probe that fails
	maxOpen    = 30 * time.Second //
	stuckAfter = 3                // probes in a row without any answer: another process may help
)

// breakerState says whether a plugin is asked.
//
//	         breakAfter failures in a row            the time is over: one call is the probe
//	CLOSED ────────────────────────────────▶ OPEN ──────────────────────────────────────────▶ HALF_OPEN
//	  ▲                                        ▲  the probe failed, or nobody saw its end          │ │
//	  │                                        └───────────────────────────────────────────────────┘ │
//	  └───────────────────────────────── the probe did not fail ─────────────────────────────────────┘
type breakerState uint8

const (
	closed   breakerState = 0
	halfOpen breakerState = 1
	open     breakerState = 2
)

func (s breakerState) String() string {
	switch s {
	case closed:
		return "closed"
	case halfOpen:
		return "half-open"
	case open:
		return "open"
	}
	return fmt.Sprintf("breaker state %d", uint8(s))
}

// breaker keeps calls from a plugin that fails. The zero value is closed. It has no clock and no lock.
type breaker struct {
	state    breakerState
	failures int           // in a row while closed
	silent   int           // probes in a row without any answer
	wait     time.Duration // how long it is open
	until    time.Time     // while open
	turn     uint64        // counts changes: calls that began before one say nothing about the time after it
}

func (b *breaker) change(s breakerState) {
	b.state = s
	b.failures = 0
	b.turn++
}

func (b *breaker) openFor(now time.Time, wait time.Duration) {
	b.wait, b.until = wait, now.Add(wait)
	b.change(open)
}

// enter asks whether a call may be made. Whoever may gives turn to leave.
func (b *breaker) enter(now time.Time) (turn uint64, ok bool) {
	switch {
	case b.state == open && !now.Before(b.until):
		b.change(halfOpen)
	case b.state != closed:
		return 0, false
	}
	return b.turn, true
}

// leave tells how a call ended. stuck: the plugin does not come back by itself.
func (b *breaker) leave(now time.Time, turn uint64, how outcome) (stuck bool) {
	if turn != b.turn {
		return false
	}
	switch {
	case b.state == halfOpen && how.unknown():
		b.change(open) // until stays: the next call is the probe
	case b.state == halfOpen && how.failed():
		if b.silent++; how != outTimeout {
			b.silent = 0
		}
		b.openFor(now, min(2*b.wait, maxOpen))
		return b.silent >= stuckAfter
	case b.state == halfOpen:
		b.silent = 0
		b.change(closed)
	case how.unknown():
	case !how.failed():
		b.failures = 0
	default:
		if b.failures++; b.failures == breakAfter {
			b.openFor(now, firstOpen)
		}
	}
	return false
}

// reset closes the breaker: another process is there.
func (b *breaker) reset() {
	turn := b.turn
	*b = breaker{turn: turn + 1}
}
