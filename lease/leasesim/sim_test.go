package leasesim

import (
	"fmt"
	"os"
	"strconv"
	"testing"
	"time"
)

func TestOne(t *testing.T) {
	from, _ := strconv.Atoi(os.Getenv("FROM"))
	n, _ := strconv.Atoi(os.Getenv("N"))
	for seed := uint64(from); seed < uint64(from+n); seed++ {
		begun := time.Now()
		w, err := run(options{seed: seed})
		if err == nil {
			continue
		}
		t.Logf("seed %d: %d events, %s sim, %s real, %+v, err %v", seed, w.events, w.now, time.Since(begun), w.counts, err)
	}
}

func TestTrace(t *testing.T) {
	n, err := strconv.ParseUint(os.Getenv("DSTM_SEED"), 10, 64)
	if err != nil {
		t.Skip()
	}
	f, _ := os.Create("/tmp/simtrace.txt")
	defer f.Close()
	_, err = run(options{seed: n, trace: func(s string) { fmt.Fprintln(f, s) }})
	t.Log(err)
}
