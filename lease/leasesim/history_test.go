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
	bind := func(host int, begun, ended int64, gen lease.Gen) call {
		return at(callBind, host, begun, ended, whole, gen)
	}
	renew := func(host int, begun, ended int64, gen lease.Gen) call {
		return at(callRenew, host, begun, ended, whole, gen)
	}
	release := func(host int, begun, ended int64, gen lease.Gen) call {
		return at(callRelease, host, begun, ended, whole, gen)
	}
	expire := func(when time.Duration) call {
		c := at(callEnd, 0, 3, 3, whole, 1)
		c.expired, c.until = true, when
		return c
	}
	refused := renew(1, 3, 4, 1)
	refused.refused = true
	for _, tt := range []struct {
		name  string
		calls []call
		want  porcupine.CheckResult
	}{
		{"one after the other", []call{bind(1, 1, 2, 1), release(1, 3, 4, 1), bind(2, 5, 6, 2)}, porcupine.Ok},
		{"two at once", []call{bind(1, 1, 2, 1), bind(2, 5, 6, 2)}, porcupine.Illegal},
		{"release and bind at the same time", []call{bind(1, 1, 2, 1), bind(2, 3, 6, 2), release(1, 4, 5, 1)}, porcupine.Ok},
		{"released too late", []call{bind(1, 1, 2, 1), bind(2, 3, 4, 2), release(1, 5, 6, 1)}, porcupine.Illegal},
		{"generations go back", []call{bind(1, 1, 2, 2), release(1, 3, 4, 2), bind(2, 5, 6, 1)}, porcupine.Illegal},
		{"renewed after the release", []call{bind(1, 1, 2, 1), release(1, 3, 4, 1), renew(1, 5, 6, 1)}, porcupine.Illegal},
		{"renewed by another", []call{bind(1, 1, 2, 1), renew(2, 3, 4, 1)}, porcupine.Illegal},
		{"refused while it is held", []call{bind(1, 1, 2, 1), refused}, porcupine.Illegal},
		{"expired in time", []call{bind(1, 1, 2, 1), expire(10 * time.Second)}, porcupine.Ok},
		{"expired too early", []call{bind(1, 1, 2, 1), expire(9 * time.Second)}, porcupine.Illegal},
		{"two port sets", []call{at(callBind, 1, 1, 2, set(0), 1), at(callBind, 2, 3, 4, set(3), 2)}, porcupine.Ok},
		{"a port set beside the whole", []call{at(callBind, 1, 1, 2, set(0), 1), bind(2, 3, 4, 2)}, porcupine.Illegal},
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
