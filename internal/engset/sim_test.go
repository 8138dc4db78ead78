package engset

import (
	"container/heap"
	"fmt"
	"math"
	"math/rand/v2"
	"testing"
)

// A trial is one simulation: sources that ask, hold and rest, servers that are free or not. It knows no formula.
type trial struct {
	name       string
	sources    int
	servers    int
	hold, rest float64                               // mean times, any unit
	draw       func(*rand.Rand, float64) float64     // a time of that mean, for holding
	pause      func(r *rand.Rand, m float64) float64 // and for resting
}

func always(_ *rand.Rand, mean float64) float64     { return mean }
func memoryless(r *rand.Rand, mean float64) float64 { return r.ExpFloat64() * mean }
func uniform(r *rand.Rand, mean float64) float64    { return r.Float64() * 2 * mean }

// event is what a source does next: it gives its server back, or asks for one.
type event struct {
	at      float64
	holding bool
}

type events []event

func (e events) Len() int           { return len(e) }
func (e events) Less(i, j int) bool { return e[i].at < e[j].at }
func (e events) Swap(i, j int)      { e[i], e[j] = e[j], e[i] }
func (e *events) Push(x any)        { *e = append(*e, x.(event)) }
func (e *events) Pop() any          { panic("a source never goes") }

// The runs of a trial. Student's t for 29 degrees of freedom at 99.9 %, two-sided.
const (
	batches = 30
	student = 3.659
)

// run returns the share of requests that were refused, as mean and half-width of a 99.9 % confidence interval by batch
// means. The first batch is thrown away: it begins with all servers free.
func (tr trial) run(seed uint64) (mean, half float64) {
	r := rand.New(rand.NewPCG(seed, 7))
	var next events
	for range tr.sources {
		heap.Push(&next, event{at: tr.pause(r, tr.rest)})
	}
	requests := max(50_000, 400*tr.sources) // of a batch: so many turns of every source that batches do not depend on each other
	held := 0
	var shares []float64
	for batch := range batches + 1 {
		refused := 0
		for asked := 0; asked < requests; {
			e := &next[0]
			switch {
			case e.holding:
				held--
				*e = event{at: e.at + tr.pause(r, tr.rest)}
			case held < tr.servers:
				asked++
				held++
				*e = event{at: e.at + tr.draw(r, tr.hold), holding: true}
			default:
				asked++
				refused++
				*e = event{at: e.at + tr.pause(r, tr.rest)}
			}
			heap.Fix(&next, 0)
		}
		if batch > 0 {
			shares = append(shares, float64(refused)/float64(requests))
		}
	}
	for _, s := range shares {
		mean += s / batches
	}
	for _, s := range shares {
		half += (s - mean) * (s - mean) / (batches - 1)
	}
	return mean, student * math.Sqrt(half/batches)
}

func (tr trial) load() Load {
	return Load{Sources: tr.sources, Busy: tr.hold / (tr.hold + tr.rest)}
}

// disagrees says how a formula differs from the simulation; nil = it is inside of the interval.
func (tr trial) disagrees(mean, half float64, formula func(Load, int) float64) error {
	if b := formula(tr.load(), tr.servers); math.Abs(b-mean) > half {
		return fmt.Errorf("%s: %d sources busy %.4f on %d servers: formula %.6f, simulation %.6f ± %.6f",
			tr.name, tr.sources, tr.load().Busy, tr.servers, b, mean, half)
	}
	return nil
}

// trials have blocking between 5e-3 and 5e-2, so that a simulation sees it. The times of use are a minute an hour and a
// tail as in docs/capacity.md.
var trials = []trial{
	{"small, memoryless", 12, 5, 60, 240, memoryless, memoryless},
	{"small, fixed holding", 12, 5, 60, 240, always, memoryless},
	{"tail of 30 s, fixed holding", 200, 11, 90, 3510, always, memoryless},
	{"tail of 120 s, uniform rest", 200, 18, 180, 3420, always, uniform},
	{"tail of 900 s, uniform holding", 100, 36, 960, 2640, uniform, memoryless},
	{"more, tail of 120 s", 500, 35, 180, 3420, memoryless, memoryless},
}

// TestSimulation compares the formula with a simulation that knows none, and sees to it that the comparison is sharp: it
// tells the formula from its likely mistakes.
func TestSimulation(t *testing.T) {
	bugs := map[string]func(Load, int) float64{
		"one address more":            func(l Load, c int) float64 { return l.Blocking(c + 1) },
		"one address less":            func(l Load, c int) float64 { return l.Blocking(c - 1) },
		"a tenth of the use left out": func(l Load, c int) float64 { return Load{l.Sources, l.Busy * 0.9}.Blocking(c) },
		"idle time for cycle":         func(l Load, c int) float64 { return Load{l.Sources, l.Busy / (1 + l.Busy)}.Blocking(c) },
	}
	small := map[string]func(Load, int) float64{ // seen only where a source counts
		"Erlang's B for Engset": func(l Load, c int) float64 { return erlang(l.Mean(), c) },
		"time for call blocking": func(l Load, c int) float64 {
			return Load{l.Sources + 1, l.Busy}.Blocking(c)
		},
	}
	for i, tr := range trials {
		t.Run(tr.name, func(t *testing.T) {
			mean, half := tr.run(uint64(i + 1))
			t.Logf("formula %.6f, simulation %.6f ± %.6f", tr.load().Blocking(tr.servers), mean, half)
			if mean < 5e-3 || mean > 5e-2 || half > 0.1*mean {
				t.Errorf("blocking %.6f ± %.6f: too far out or too wide to decide anything", mean, half)
			}
			if err := tr.disagrees(mean, half, Load.Blocking); err != nil {
				t.Error(err)
			}
			for name, bug := range bugs {
				if tr.disagrees(mean, half, bug) == nil {
					t.Errorf("planted bug %q is not noticed", name)
				}
			}
			for name, bug := range small {
				if tr.sources < 100 && tr.disagrees(mean, half, bug) == nil {
					t.Errorf("planted bug %q is not noticed", name)
				}
			}
		})
	}
}
