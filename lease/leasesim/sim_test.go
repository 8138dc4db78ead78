package leasesim

import (
	"fmt"
	"hash/fnv"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

const (
	normalSeeds  = 200
	soakSeeds    = 10_000
	specialSeeds = 6   // of each special world
	soakSpecial  = 250 // the same in a soak
	tail         = 60  // lines of the trace that a failure shows
)

// seeds returns how many worlds a test runs.
func seeds(normal, soak uint64) uint64 {
	if os.Getenv("DSTM_SOAK") == "1" {
		return soak
	}
	return normal
}

// TestSeeds runs one world for each seed and looks for breaches. DSTM_SOAK=1 runs many more; DSTM_SEED=n runs one and, with
// -v, shows everything that happens in it.
func TestSeeds(t *testing.T) {
	if s := os.Getenv("DSTM_SEED"); s != "" {
		seed, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatalf("DSTM_SEED=%s: %v", s, err)
		}
		_, err = run(options{seed: seed, trace: func(line string) {
			if testing.Verbose() {
				fmt.Println(line)
			}
		}})
		if err != nil {
			t.Errorf("seed %d: %v", seed, err)
		}
		return
	}
	all := seeds(normalSeeds, soakSeeds)
	var sum counts
	var mu sync.Mutex
	eachSeed(all, func(seed uint64) bool {
		w, err := run(options{seed: seed})
		mu.Lock()
		defer mu.Unlock()
		sum.add(w.counts)
		if err != nil {
			t.Errorf("seed %d: %v\n%s\nreplay: DSTM_SEED=%d go test ./lease/leasesim -run TestSeeds -v", seed, err, lastLines(options{seed: seed}), seed)
		}
		return err == nil
	})
	t.Logf("%d seeds: %+v", all, sum)
	n := int(all)
	for _, least := range []struct {
		what      string
		got, want int
	}{
		{"leases of an address that another host had before", sum.reused, 50 * n},
		{"deadlines that gateways moved without the service", sum.alone, 10 * n},
		{"gateways fenced by a witness", sum.witnessed, n / 2},
		{"starts of a service", sum.starts, 3 * n},
		{"takeovers", sum.takeovers, n / 4},
		{"restores", sum.restores, n / 20},
		{"reboots of a gateway", sum.reboots, n},
		{"partitions", sum.parted, 10 * n},
	} {
		if least.got < least.want {
			t.Errorf("%d %s in %d worlds, less than %d: too few to find anything", least.got, least.what, n, least.want)
		}
	}
}

func (c *counts) add(o counts) {
	c.binds += o.binds
	for i := range c.refused {
		c.refused[i] += o.refused[i]
	}
	c.reused += o.reused
	c.alone += o.alone
	c.witnessed += o.witnessed
	c.starts += o.starts
	c.takeovers += o.takeovers
	c.restores += o.restores
	c.reboots += o.reboots
	c.parted += o.parted
}

// eachSeed runs seeds on every processor, until one of them says false.
func eachSeed(n uint64, one func(seed uint64) bool) {
	var next atomic.Uint64
	var failed atomic.Bool
	var all sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		all.Go(func() {
			for seed := next.Add(1) - 1; seed < n && !failed.Load(); seed = next.Add(1) - 1 {
				if !one(seed) {
					failed.Store(true)
				}
			}
		})
	}
	all.Wait()
}

// lastLines runs a world once more and returns what happened just before its end.
func lastLines(o options) string {
	var lines []string
	o.trace = func(line string) {
		if len(lines) == 2*tail {
			lines = append(lines[:0], lines[tail:]...)
		}
		if len(line) > 200 {
			line = line[:200] + "…"
		}
		lines = append(lines, line)
	}
	_, _ = run(o)
	return strings.Join(lines[max(0, len(lines)-tail):], "\n")
}

// TestReplay: a seed gives the same run, event by event.
func TestReplay(t *testing.T) {
	life := func(seed uint64) (sum uint64, events int) {
		h := fnv.New64a()
		w, err := run(options{seed: seed, trace: func(line string) { _, _ = h.Write([]byte(line)) }})
		if err != nil {
			t.Errorf("seed %d: %v", seed, err)
		}
		return h.Sum64(), w.events
	}
	for seed := range uint64(6) {
		sum, n := life(seed)
		if again, m := life(seed); sum != again || n != m {
			t.Errorf("seed %d: trace %x of %d events, then %x of %d", seed, sum, n, again, m)
		}
	}
}
