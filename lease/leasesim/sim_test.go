package leasesim

import (
	"testing"
	"time"
)

func TestOne(t *testing.T) {
	for seed := range uint64(30) {
		begun := time.Now()
		w, err := run(options{seed: seed})
		t.Logf("seed %d: %d events, %s sim, %s real, %+v, err %v", seed, w.events, w.now, time.Since(begun), w.counts, err)
	}
}
