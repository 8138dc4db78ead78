package leasesim

import (
	"net/netip"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/dstm-project/dstm/lease"
)

// TestModel: which histories of one address are in order.
func TestModel(t *testing.T) {
	whole := lease.Whole(netip.MustParseAddr("198.51.100.1"))
	set := func(psid uint16) lease.Resource { return lease.Resource{Addr: whole.Addr, PSIDLen: 2, PSID: psid} }
	at := func(k kind, host int, begun, ended int64, r lease.Resource, gen lease.Gen) call {
		return call{kind: k, host: host, begun: begun, ended: ended, ref: lease.Ref{Resource: r, Gen: gen}, until: 10 * time.Second}
	}
	with := func(c call, change func(*call)) call { change(&c); return c }
	expires := func(at time.Duration) func(*call) {
		return func(c *call) { c.expired, c.until = true, at }
	}
	for _, tt := range []struct {
		name  string
		calls []call
		want  porcupine.CheckResult
	}{
		{"one after the other", []call{
			at(callBind, 1, 1, 2, whole, 1), at(callRelease, 1, 3, 4, whole, 1), at(callBind, 2, 5, 6, whole, 2),
		}, porcupine.Ok},
		{"two at once", []call{at(callBind, 1, 1, 2, whole, 1), at(callBind, 2, 5, 6, whole, 2)}, porcupine.Illegal},
		{"release and bind at the same time", []call{
			at(callBind, 1, 1, 2, whole, 1), at(callBind, 2, 3, 6, whole, 2), at(callRelease, 1, 4, 5, whole, 1),
		}, porcupine.Ok},
		{"released too late", []call{
			at(callBind, 1, 1, 2, whole, 1), at(callBind, 2, 3, 4, whole, 2), at(callRelease, 1, 5, 6, whole, 1),
		}, porcupine.Illegal},
		{"generations go back", []call{
			at(callBind, 1, 1, 2, whole, 2), at(callRelease, 1, 3, 4, whole, 2), at(callBind, 2, 5, 6, whole, 1),
		}, porcupine.Illegal},
		{"renewed after the release", []call{
			at(callBind, 1, 1, 2, whole, 1), at(callRelease, 1, 3, 4, whole, 1), at(callRenew, 1, 5, 6, whole, 1),
		}, porcupine.Illegal},
		{"renewed by another", []call{at(callBind, 1, 1, 2, whole, 1), at(callRenew, 2, 3, 4, whole, 1)}, porcupine.Illegal},
		{"refused while it is held", []call{
			at(callBind, 1, 1, 2, whole, 1), with(at(callRenew, 1, 3, 4, whole, 1), func(c *call) { c.refused = true }),
		}, porcupine.Illegal},
		{"expired in time", []call{at(callBind, 1, 1, 2, whole, 1), with(at(callEnd, 0, 3, 3, whole, 1), expires(10*time.Second))}, porcupine.Ok},
		{"expired too early", []call{at(callBind, 1, 1, 2, whole, 1), with(at(callEnd, 0, 3, 3, whole, 1), expires(9*time.Second))}, porcupine.Illegal},
		{"two port sets", []call{at(callBind, 1, 1, 2, set(0), 1), at(callBind, 2, 3, 4, set(3), 2)}, porcupine.Ok},
		{"a port set beside the whole", []call{at(callBind, 1, 1, 2, set(0), 1), at(callBind, 2, 3, 4, whole, 2)}, porcupine.Illegal},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var ops []porcupine.Operation
			for _, c := range tt.calls {
				ops = append(ops, porcupine.Operation{ClientId: c.host, Input: c, Call: c.begun, Return: c.ended})
			}
			if got := porcupine.CheckOperationsTimeout(model, ops, porcupineTime); got != tt.want {
				t.Errorf("%s, want %s", got, tt.want)
			}
		})
	}
}
