package lease_test

import (
	"testing"
	"time"

	"github.com/dstm-project/dstm/lease"
)

// TestOneHostDrainsNoPool: a host that moves, or binds and releases, as fast as it can gets a handful of addresses behind it
// and no more, whether gateways acknowledge or one of them is cut off.
func TestOneHostDrainsNoPool(t *testing.T) {
	for _, c := range []struct {
		name    string
		fenced  bool
		release bool
	}{
		{"moves, gateways acknowledge", true, false},
		{"moves, a gateway is cut off", false, false},
		{"binds and releases, a gateway is cut off", false, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			core, _ := core(t, config("198.51.100.0/24"), 64)
			refused := 0
			for i := range 300 {
				now, source := at(time.Duration(i)*time.Millisecond), srcA
				if i%2 == 1 && !c.release {
					source = srcB
				}
				a := core.Step(now, lease.Bind{Host: "busy", Source: source, Hurry: true})
				switch a.Deny {
				case lease.ReasonNone:
					if c.release {
						core.Step(now, lease.Release{Host: "busy", Ref: a.Grant.Ref})
					}
				case lease.ReasonQuota:
					refused++
				default:
					t.Fatalf("bind %d: %s", i, a.Deny)
				}
				if c.fenced {
					core.Step(now, lease.FenceTo{Rev: lease.MaxRev})
				}
			}
			if st := core.Stats(); refused == 0 || st.Free < 256-8 {
				t.Errorf("%d refused, %+v: want refusals and nearly all addresses free", refused, st)
			}
			if a := core.Step(at(time.Second), lease.Bind{Host: "other", Source: srcC}); a.Deny != lease.ReasonNone {
				t.Errorf("another host: %s", a.Deny)
			}
			// When hold-downs are over the host is as any other.
			core.Step(at(time.Second), lease.FenceTo{Rev: lease.MaxRev})
			core.Step(at(10*time.Minute), lease.Tick{})
			if a := core.Step(at(10*time.Minute), lease.Bind{Host: "busy", Source: srcC}); a.Deny != lease.ReasonNone {
				t.Errorf("after the hold-down: %s", a.Deny)
			}
		})
	}
}
