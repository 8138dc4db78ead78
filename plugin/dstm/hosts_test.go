package dstm

import (
	"fmt"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/dstm-project/dstm/internal/tlsid"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/leaseclient"
)

// TestTable: a list, changes, and a second list after a break, which what it does not name does not survive.
func TestTable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tab := newTable(newMetrics(nil))
		at := func(i byte) netip.Addr { return netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 15: i}) }
		state := func() (out []string) {
			for i := range byte(6) {
				if h := tab.find(at(i)); h != nil {
					now := tab.now()
					out = append(out, fmt.Sprintf("%d key %d leased %v quiet %v", i, h.key, h.leased(now), h.quiet(now)))
				}
			}
			return out
		}
		check := func(step string, want ...string) {
			t.Helper()
			if diff := cmp.Diff(want, state()); diff != "" {
				t.Errorf("%s: %s", step, diff)
			}
			if n := testutil.ToFloat64(tab.met.hosts); n != float64(len(want)) || tab.amount != len(want) {
				t.Errorf("%s: metric %v, amount %d, want %d", step, n, tab.amount, len(want))
			}
		}
		up := func(i byte, key uint64, left, refused time.Duration) {
			ev := leaseclient.HostState{Source: at(i), Registered: true, Key: key, Left: left, RefusedFor: refused}
			if refused > 0 {
				ev.Refused = lease.ReasonQuota
			}
			tab.upsert(ev)
		}
		tab.listing()
		up(1, 7, 0, 0)
		up(2, 7, time.Minute, 0)
		up(3, 9, 0, time.Minute)
		up(4, 0, 0, 0)
		up(5, 0, time.Minute, 0)
		tab.listed()
		check("list", "1 key 7 leased true quiet false", "2 key 7 leased true quiet false", "3 key 9 leased false quiet true",
			"4 key 0 leased false quiet false", "5 key 0 leased true quiet false")
		time.Sleep(time.Minute)
		check("times run out", "1 key 7 leased false quiet false", "2 key 7 leased false quiet false", "3 key 9 leased false quiet false",
			"4 key 0 leased false quiet false", "5 key 0 leased false quiet false")
		tab.remove(at(4))
		tab.remove(at(4))
		tab.upsert(leaseclient.HostState{Source: at(5)})
		up(2, 9, 0, 0) // the address moved to another host
		check("changes", "1 key 7 leased false quiet false", "2 key 9 leased false quiet false", "3 key 9 leased false quiet false")
		tab.listing()
		up(2, 9, time.Minute, 0)
		check("second list begun", "1 key 7 leased false quiet false", "2 key 9 leased true quiet false", "3 key 9 leased true quiet false")
		tab.listed()
		check("second list", "2 key 9 leased true quiet false")
		if len(tab.byKey) != 1 {
			t.Errorf("%d hosts by key, want 1", len(tab.byKey))
		}
		tab.clear()
		check("cleared")
	})
}

// TestClients: blocks alike share a client; a reload keeps it; a failed one gives back exactly what it took.
func TestClients(t *testing.T) {
	dials := 0
	var last *fakeService
	cs := newClients(func(*config, *tlsid.Source) (service, error) {
		dials++
		last = newFake(t)
		return last, nil
	}, newMetrics(nil))
	acquire := func() func() {
		t.Helper()
		_, release, err := cs.acquire(testConfig(), nil)
		if err != nil {
			t.Fatal(err)
		}
		return release
	}
	one, two := acquire(), acquire()
	cs.restarting()
	three := acquire()
	cs.restartFailed()
	three() // once more does no harm
	cs.restarting()
	four := acquire()
	cs.restarted()
	one()
	two()
	cs.restartFailed() // a late one of the old instance gives back nothing
	if dials != 1 || last.closed || len(cs.byKey) != 1 {
		t.Errorf("%d dials, closed %v, %d clients; want 1, false, 1", dials, last.closed, len(cs.byKey))
	}
	four()
	if !last.closed || len(cs.byKey) != 0 {
		t.Errorf("closed %v, %d clients after the last user; want true, 0", last.closed, len(cs.byKey))
	}
}
