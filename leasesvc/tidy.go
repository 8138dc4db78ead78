package leasesvc

import (
	"context"
	"runtime"
	"runtime/debug"
	"time"
)

const (
	tidyEvery = 5 * time.Second
	manyNew   = 500 // connections that are worth tidying up after
	fewNew    = 50  // connections between two looks, when it is quiet
	shrinks   = 2   // halvings of the stacks that handshakes made large, one with each collection
)

// tidy gives back to the system what many handshakes left behind: garbage, and stacks. It is as much as what their idle
// connections need, and would stay for minutes.
func (s *Server) tidy(ctx context.Context, ready func()) error {
	ready()
	t := time.NewTicker(tidyEvery)
	defer t.Stop()
	var last, tidied int64
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		n := s.limits.accepted.Load()
		if n-last < fewNew && n-tidied >= manyNew {
			for range shrinks {
				runtime.GC()
			}
			debug.FreeOSMemory()
			tidied = n
		}
		last = n
	}
}
