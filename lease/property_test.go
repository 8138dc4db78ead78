package lease_test

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/dstm-project/dstm/lease"
)

// run takes n steps, then lets the world settle and compares all tables.
func (s *sim) run(n int) error {
	for range n {
		if err := s.act(); err != nil {
			return err
		}
	}
	if err := s.settle(); err != nil {
		return err
	}
	var want lease.Digest
	want.AddPool(s.core.Pool())
	for b := range s.core.Bindings() {
		want.AddBinding(b)
	}
	for _, g := range s.gates {
		if st := g.rep.Status(); !st.Synced || st.Digest != want {
			return fmt.Errorf("%s settled with synced %t digest %x, the service has %x", g.name, st.Synced, st.Digest, want)
		}
	}
	if st := s.core.Stats(); st.Bound+st.Revoking+st.Hold+st.Reserved != 0 {
		return fmt.Errorf("addresses leaked: %+v", st)
	}
	return nil
}

// TestInvariants runs random schedules and looks for a break of I1, I2, I3, I4 and I9.
func TestInvariants(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(50, 400).Draw(t, "steps")
		s := newSim(func(n int) int { return rapid.IntRange(0, n-1).Draw(t, "d") }, "")
		if err := s.run(n); err != nil {
			t.Fatal(err)
		}
	})
}

func simulate(seed uint64, bug string) (*sim, error) {
	rng := rand.New(rand.NewPCG(seed, 1))
	s := newSim(rng.IntN, bug)
	return s, s.run(600)
}

// TestSchedules is the same over plain seeds, and sees to it that the schedules are worth something.
func TestSchedules(t *testing.T) {
	const schedules = 3000
	reuses, alone, witness := 0, 0, 0
	for seed := range uint64(schedules) {
		s, err := simulate(seed, "")
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		reuses, alone, witness = reuses+s.reuses, alone+s.alone, witness+s.witness
	}
	if reuses < schedules {
		t.Errorf("addresses changed hands %d times in %d schedules: too few to find anything", reuses, schedules)
	}
	if alone < schedules/10 {
		t.Errorf("%d deadlines were moved without the service: too few to find anything", alone)
	}
	t.Logf("addresses changed hands %d times, %d deadlines moved without the service, %d gateways fenced by a witness", reuses, alone, witness)
}

// TestPlantedBugs weakens one rule at a time; the invariants must notice.
func TestPlantedBugs(t *testing.T) {
	for bug, want := range map[string]string{
		"ack compared with generation":   "I1",
		"deadlines forgotten at restart": "I1",
		"floor ignored":                  "I",
		"acknowledged before applied":    "I",
		"deadline from the receipt":      "I",
		"renewals not written":           "I2",
		"generation without revision":    "I3",
		"reservation binds others":       "I9",
	} {
		t.Run(bug, func(t *testing.T) {
			for seed := range uint64(3000) {
				if _, err := simulate(seed, bug); err != nil && strings.HasPrefix(err.Error(), want) {
					t.Logf("seed %d: %v", seed, err)
					return
				}
			}
			t.Errorf("no schedule noticed it")
		})
	}
}

// BenchmarkLife is one life of an address: bind, release, fence, free.
func BenchmarkLife(b *testing.B) {
	cfg := config("198.51.100.0/24")
	c, err := lease.NewCore(cfg, lease.NewCell(1, 0, 0), at(0), nil)
	if err != nil {
		b.Fatal(err)
	}
	now := time.Duration(0)
	for b.Loop() {
		g := c.Step(at(now), lease.Bind{Host: "a", Source: srcA}).Grant
		c.Step(at(now), lease.Release{Host: "a", Ref: g.Ref})
		c.Step(at(now), lease.FenceTo{Rev: lease.MaxRev})
		now += cfg.Timers.HoldDown
		c.Step(at(now), lease.Tick{})
	}
}
