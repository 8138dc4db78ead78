package leasesim

import (
	"fmt"
	"math/rand/v2"
	"time"
)

// event is something that happens at an instant. Events of one instant happen in the order in which they were planned.
type event struct {
	at  time.Duration
	seq uint64
	do  func()
}

func (e event) before(o event) bool { return e.at < o.at || e.at == o.at && e.seq < o.seq }

// queue is a binary heap of events.
type queue []event

func (q *queue) push(e event) {
	*q = append(*q, e)
	h := *q
	i := len(h) - 1
	for i > 0 && h[i].before(h[(i-1)/2]) {
		h[i], h[(i-1)/2] = h[(i-1)/2], h[i]
		i = (i - 1) / 2
	}
}

func (q *queue) pop() event {
	h := *q
	top, n := h[0], len(h)-1
	h[0], h[n] = h[n], event{}
	h = h[:n]
	for i := 0; ; {
		least := i
		for _, c := range [2]int{2*i + 1, 2*i + 2} {
			if c < n && h[c].before(h[least]) {
				least = c
			}
		}
		if least == i {
			break
		}
		h[i], h[least] = h[least], h[i]
		i = least
	}
	*q = h
	return top
}

// newRand returns the source of all choices of a seed.
func newRand(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, 0x6473746d)) }

// failure is the first breach of an invariant that a run found.
type failure struct {
	check string // its name, as in the table of docs/design/simulation.md
	text  string
	at    time.Duration
	event int
}

func (f *failure) Error() string {
	return fmt.Sprintf("%s: %s (at %s, event %d)", f.check, f.text, f.at, f.event)
}

// kernel is the event loop of a run.
type kernel struct {
	rng    *rand.Rand
	now    time.Duration // true time; every clock of a party derives from it
	todo   queue
	seq    uint64
	events int
	stamps int64 // see stamp
	failed *failure
	only   string       // when set, the one check that counts
	trace  func(string) // nil = off
}

// after plans something.
func (k *kernel) after(d time.Duration, do func()) {
	k.seq++
	k.todo.push(event{at: k.now + max(d, 0), seq: k.seq, do: do})
}

// run lets time pass up to an instant, or to the first failure. look is called after each event.
func (k *kernel) run(until time.Duration, look func()) {
	for len(k.todo) > 0 && k.todo[0].at <= until && k.failed == nil {
		e := k.todo.pop()
		k.now = e.at
		k.events++
		e.do()
		look()
	}
	k.now = max(k.now, until)
}

// stamp numbers the instants of a history: no two are equal, whatever the clock says.
func (k *kernel) stamp() int64 {
	k.stamps++
	return k.stamps
}

// fail notes a breach.
func (k *kernel) fail(check, format string, args ...any) {
	if k.failed != nil || k.only != "" && check != k.only {
		return
	}
	k.failed = &failure{check: check, text: fmt.Sprintf(format, args...), at: k.now, event: k.events}
}

// tracef notes what happens. Callers on hot paths ask for k.trace first.
func (k *kernel) tracef(format string, args ...any) {
	if k.trace != nil {
		k.trace(fmt.Sprintf("%12s %s", k.now.Round(time.Microsecond), fmt.Sprintf(format, args...)))
	}
}

// chance is true with probability p.
func (k *kernel) chance(p float64) bool { return p > 0 && k.rng.Float64() < p }

// between draws a time, uniformly.
func (k *kernel) between(a, b time.Duration) time.Duration {
	return a + time.Duration(k.rng.Float64()*float64(b-a))
}

// exp draws a time of that mean, without memory.
func (k *kernel) exp(mean time.Duration) time.Duration {
	return time.Duration(k.rng.ExpFloat64() * float64(mean))
}
