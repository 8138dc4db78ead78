//go:build seedbugs

package leasesim

import (
	"sync"
	"testing"

	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/lease/replica"
)

// A seededBug is a mistake that some check must find. In a run that looks for it no other check counts.
type seededBug struct {
	check string
	name  string
	in    func(string)     // where it is planted; nil = in the simulation's own service or gateway
	seeds uint64           // within which it must be found
	adapt func(p *profile) // the worlds to look in; nil = as drawn
}

var seededBugs = []seededBug{
	{"I1", "wanted before it is fenced", lease.PlantBug, 50, nil},
	{"I1", "adopted beside port sets", lease.PlantBug, 100, cut},
	{"I2", "renewal not written", lease.PlantBug, 50, nil},
	{"I2", "answers without a barrier", nil, 100, takenOver},
	{"I3", "generation without revision", lease.PlantBug, 50, nil},
	{"I4", "floor ignored", replica.PlantBug, 50, nil},
	{"I6", "hold-down forgotten at the start", lease.PlantBug, 50, nil},
	{"I7", "deadline from the receipt", replica.PlantBug, 50, nil},
	{"I7", "without end", replica.PlantBug, 50, nil},
	{"I8", "acknowledged before applied", nil, 50, nil},
	{"I8", "gap in the records", replica.PlantBug, 50, nil},
	{"I8", "snapshot merged", replica.PlantBug, 50, nil},
	{"I9", "reservation binds others", lease.PlantBug, 50, nil},
	{"I10", "back after the deadline", replica.PlantBug, 100, lonely},
	{"I10", "from the answer", replica.PlantBug, 50, nil},
	{"I10", "counts itself", replica.PlantBug, 50, nil},
	{"I10", "answer of a stranger", replica.PlantBug, 100, slow},
	{"I10", "answer to an earlier question", replica.PlantBug, 200, slow},
	{"F9", "others of an older reply", replica.PlantBug, 300, slow},
	{"I10", "never asks", nil, 50, steady},
	{"I12", "any cluster", replica.PlantBug, 50, nil},
	{"I13", "refused for ever", replica.PlantBug, 50, nil},
	{"I14", "fenced when revoked", lease.PlantBug, 50, nil},
	{"I15", "reservation without end", lease.PlantBug, 50, nil},
	{"F4", "fence by generation", lease.PlantBug, 50, nil},
	{"F4", "wanted before it is fenced", lease.PlantBug, 50, nil},
	{"F5", "deadlines forgotten at the start", lease.PlantBug, 50, nil},
	{"F5", "shorter D at once", lease.PlantBug, 100, renewed},
	{"F6", "reply before durable", nil, 50, nil},
	{"F6", "table before it is durable", nil, 100, stalling},
	{"F9", "any witness", lease.PlantBug, 200, nil},
	{"F9", "witness that heard nothing since", lease.PlantBug, 200, nil},
	{"F9", "witness of a short session", lease.PlantBug, 200, nil},
	{"F9", "witness without a margin", lease.PlantBug, 100, edge},
	{"F9", "witnesses of a copy", lease.PlantBug, 150, copied},
	{"F9", "shorter session lease at once", lease.PlantBug, 400, renewed},
	{"F9", "quiet and in session", replica.PlantBug, 200, lonely},
	{"F9", "fenced for ever", lease.PlantBug, 50, nil},
	{"history", "renewal of whatever there is", lease.PlantBug, 100, revoking},
	{"one lease", "second lease", lease.PlantBug, 50, nil},
	{"reason", "no second try", nil, 200, restless},
}

// TestSeededBugs plants one mistake at a time. The check that is there for it must find it in some world, by itself.
func TestSeededBugs(t *testing.T) {
	for _, b := range seededBugs {
		t.Run(b.check+" "+b.name, func(t *testing.T) {
			o := options{only: b.check, adapt: b.adapt}
			if b.in == nil {
				o.bug = b.name
			} else {
				b.in(b.name)
				defer b.in("")
			}
			var mu sync.Mutex
			var found *failure
			at, tried := uint64(0), 0
			eachSeed(b.seeds, func(seed uint64) bool {
				o := o
				o.seed = seed
				_, err := run(o)
				mu.Lock()
				defer mu.Unlock()
				tried++
				if f, ok := err.(*failure); ok && f.check == b.check && found == nil {
					found, at = f, seed
				}
				return found == nil
			})
			if found == nil {
				t.Fatalf("not found in %d worlds", b.seeds)
			}
			t.Logf("seed %d, %d worlds: %v", at, tried, found)
		})
	}
}
