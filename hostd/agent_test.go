package hostd

import (
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"

	"github.com/dstm-project/dstm/dataplane"
	"github.com/dstm-project/dstm/internal/netcfg"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/leaseclient"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const defRoute = "route 0.0.0.0/0 dev dstm0 metric 4096"

func started(t *testing.T, w *world) {
	t.Helper()
	expect(t, w,
		"net: clean", "configure dstm0 192.0.0.2/29", "filter dstm0 established", "net: ", "device up mtu 0",
		"net: 192.0.0.2/29, "+defRoute, "path: mtu 1460", "attend [2001:db8:1::5] held false",
	)
}

func bound(t *testing.T, w *world) {
	t.Helper()
	w.packet(1)
	expect(t, w,
		"bind packet hint 0 from 2001:db8:1::5 mtu 1460",
		"path: lease 198.51.100.7 gen 0.1 host 2001:db8:1::5 until 14m59.55s",
		"device up mtu 1440", "net: 192.0.0.2/29, 198.51.100.7/32, "+defRoute+" src 198.51.100.7",
		"installed 198.51.100.7@0.1", "inject 1",
	)
}

func TestAgentFirstPacketToStop(t *testing.T) {
	inWorld(t, nil, func(t *testing.T, w *world, a *Agent) {
		if s := a.Status(); s.State != "idle" {
			t.Errorf("state %s before the start, want idle", s.State)
		}
		synctest.Wait()
		started(t, w)
		bound(t, w)
		want := Status{
			State: "held", Reason: "bound", Lease: "198.51.100.7", Gen: "0.1", LeftMS: 899550, TEP: "2001:db8:a::1", MTU: 1440,
			Attended: true, Source: "2001:db8:1::5", Link: "eth0", Sources: []netip.Addr{src1},
		}
		if d := cmp.Diff(want, a.Status(), addrCmp); d != "" {
			t.Errorf("status (-want +got):\n%s", d)
		}
		t.Cleanup(func() {
			if d := cmp.Diff([]string{
				"abort [198.51.100.7 192.0.0.2]", "net: 192.0.0.2/29, " + defRoute, "path: no lease",
				"release 198.51.100.7@0.1 IDLE", "net: clean", "filter removed", "path: closed",
			}, w.trace); d != "" {
				t.Errorf("stop (-want +got):\n%s", d)
			}
		})
	})
}

// A TCP connection that is idle for hours keeps its lease while its socket is open, and gives it back after.
func TestAgentIdleConnection(t *testing.T) {
	inWorld(t, nil, func(t *testing.T, w *world, a *Agent) {
		started(t, w)
		bound(t, w)
		w.mu.Lock()
		w.sockets = true
		w.mu.Unlock()
		time.Sleep(3 * time.Hour)
		renewals := 0
		for _, line := range w.take() {
			switch {
			case strings.HasPrefix(line, "renew"):
				renewals++
			case strings.HasPrefix(line, "release"), strings.HasPrefix(line, "abort"), strings.HasPrefix(line, "bind"):
				t.Fatalf("with an open socket: %s", line)
			}
		}
		if want := 3 * 60 * 2 / 15; renewals != want && renewals != want-1 {
			t.Errorf("%d renewals in three hours, want about %d: one per half lease time", renewals, want)
		}
		w.mu.Lock()
		w.sockets, w.used, w.sent = false, w.now(), w.sent+1
		w.mu.Unlock()
		time.Sleep(119 * sec)
		for _, line := range w.take() {
			if strings.HasPrefix(line, "release") {
				t.Fatalf("released before the idle time was over")
			}
		}
		time.Sleep(2 * sec)
		expect(t, w, "abort [198.51.100.7 192.0.0.2]", "net: 192.0.0.2/29, "+defRoute, "path: no lease", "release 198.51.100.7@0.1 IDLE")
		if s := a.Status(); s.State != "idle" || s.Lease != "" {
			t.Errorf("status %+v, want idle without a lease", s)
		}
	})
}

// What strangers send to the address does not keep the lease.
func TestAgentIgnoresStrangers(t *testing.T) {
	inWorld(t, nil, func(t *testing.T, w *world, _ *Agent) {
		started(t, w)
		bound(t, w)
		for range 13 {
			time.Sleep(10 * sec)
			w.mu.Lock()
			w.used = w.now()
			w.mu.Unlock()
		}
		if got := w.take(); len(got) == 0 || got[len(got)-1] != "release 198.51.100.7@0.1 IDLE" {
			t.Errorf("under a scan: %q, want the lease released", got)
		}
	})
}

func TestAgentOfferAndRevoke(t *testing.T) {
	inWorld(t, nil, func(t *testing.T, w *world, a *Agent) {
		started(t, w)
		w.down <- leaseclient.Offer{Hint: 9, Within: sec}
		if got := w.take(); len(got) == 0 || got[0] != "bind dns hint 9 from 2001:db8:1::5 mtu 1460" {
			t.Fatalf("after an offer: %q", got)
		}
		w.down <- leaseclient.Offer{Hint: 10, Within: sec}
		expect(t, w, "installed 198.51.100.7@0.1")
		w.down <- leaseclient.Revoked{Ref: lease.Ref{Resource: ip7, Gen: 1}, Reason: lease.ReasonAdmin}
		expect(t, w, "abort [198.51.100.7 192.0.0.2]", "net: 192.0.0.2/29, "+defRoute, "path: no lease")
		if s := a.Status(); s.State != "idle" || s.Reason != "revoked: ADMIN" {
			t.Errorf("status %+v, want idle because revoked", s)
		}
	})
}

func TestAgentStandsByForNativeIPv4(t *testing.T) {
	inWorld(t, nil, func(t *testing.T, w *world, a *Agent) {
		started(t, w)
		bound(t, w)
		w.mu.Lock()
		w.v4 = netcfg.IPv4{HasDefault: true, Default: netcfg.Route{Link: "eth0"}}
		w.mu.Unlock()
		w.change <- struct{}{}
		time.Sleep(sec)
		expect(t, w, "path: mtu 1440", "net: ", "abort [198.51.100.7 192.0.0.2]", "path: no lease", "release 198.51.100.7@0.1 IDLE")
		if s := a.Status(); s.State != "standby: native ipv4" || s.Attended {
			t.Errorf("status %+v, want standby, not registered", s)
		}
		w.packet(2)
		expect(t, w)
		w.mu.Lock()
		w.v4 = netcfg.IPv4{}
		w.mu.Unlock()
		w.change <- struct{}{}
		time.Sleep(sec)
		expect(t, w, "path: mtu 1460", "net: 192.0.0.2/29, "+defRoute, "attend [2001:db8:1::5] held false")
	})
}

// Every change of the network reaches the packet path: an uplink may have come.
func TestAgentNewUplink(t *testing.T) {
	inWorld(t, nil, func(t *testing.T, w *world, _ *Agent) {
		started(t, w)
		w.mu.Lock()
		before := w.uplinked
		w.mu.Unlock()
		w.change <- struct{}{}
		time.Sleep(sec)
		expect(t, w)
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.uplinked != before+1 {
			t.Errorf("packet path configured %d times after a change, want once", w.uplinked-before)
		}
	})
}

func TestAgentRenumbered(t *testing.T) {
	inWorld(t, nil, func(t *testing.T, w *world, _ *Agent) {
		started(t, w)
		bound(t, w)
		w.mu.Lock()
		w.globals = []netcfg.GlobalAddr{{Link: "eth0", Addr: src2}, {Link: "eth0", Addr: src1, Deprecated: true}}
		w.mu.Unlock()
		w.change <- struct{}{}
		time.Sleep(sec)
		got := w.take()
		for i := range got {
			got[i], _, _ = strings.Cut(got[i], " until") // depends on the settling time
		}
		slices.Sort(got)                                                                                               // stream and call go their own ways
		got = slices.Compact(slices.DeleteFunc(got, func(l string) bool { return l == "installed 198.51.100.7@0.1" })) // said again
		want := []string{
			"attend [2001:db8:2::5 2001:db8:1::5] held true",
			"bind socket hint 0 from 2001:db8:2::5 mtu 1460",
			"device up mtu 1440",
			"installed 198.51.100.7@0.2",
			"path: lease 198.51.100.7 gen 0.2 host 2001:db8:2::5",
			"path: mtu 1440",
			"reset",
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("after renumbering (-want +got):\n%s", d)
		}
	})
}

// A lease service that cannot be reached is no reason to end, nor to fill the log.
func TestAgentUnreachableService(t *testing.T) {
	inWorld(t, func(w *world) { w.refuse = errors.New("connection refused") }, func(t *testing.T, w *world, a *Agent) {
		synctest.Wait()
		w.packet(1)
		time.Sleep(time.Hour)
		tries := 0
		for _, line := range w.take() {
			if strings.HasPrefix(line, "attend") {
				tries++
			}
		}
		if tries < 300 || tries > 1000 {
			t.Errorf("%d tries to register in an hour, want one per 5 to 10 s", tries)
		}
		if n := strings.Count(w.log.String(), "not registered"); n != 1 {
			t.Errorf("said %d times that it is not registered, want once:\n%s", n, w.log.String())
		}
		if n := strings.Count(w.log.String(), "msg=lease"); n != 1 {
			t.Errorf("said %d times that there is no lease, want once:\n%s", n, w.log.String())
		}
		if s := a.Status(); s.Attended || s.Problem != "connection refused" || s.State != "idle" {
			t.Errorf("status %+v, want idle, not attended because of the refusal", s)
		}
		w.mu.Lock()
		w.refuse = nil
		w.mu.Unlock()
		time.Sleep(10 * sec)
		if s := a.Status(); !s.Attended || s.Problem != "" {
			t.Errorf("status %+v, want attended", s)
		}
	})
}

func TestAgentDropsLatePackets(t *testing.T) {
	inWorld(t, func(w *world) { w.refuse = &leaseclient.Error{Reason: lease.ReasonPoolDry} }, func(t *testing.T, w *world, a *Agent) {
		synctest.Wait()
		w.packet(1)
		time.Sleep(30 * sec)
		w.mu.Lock()
		w.refuse = nil
		w.mu.Unlock()
		w.take()
		w.packet(2)
		if got := w.take(); len(got) == 0 || got[len(got)-1] != "inject 2" || slices.Contains(got, "inject 1") {
			t.Errorf("after the back-off: %q, want only the young packet sent", got)
		}
		if n := testutil.ToFloat64(a.metrics.triggers.WithLabelValues("packet")); n != 2 {
			t.Errorf("%v packet triggers, want 2", n)
		}
		w.packets <- dataplane.Held{Data: ipv4("192.0.0.2", "224.0.0.251"), At: time.Now()}
		synctest.Wait()
		if n := testutil.ToFloat64(a.metrics.triggers.WithLabelValues("multicast")); n != 1 {
			t.Errorf("%v multicast packets counted, want 1", n)
		}
	})
}

func TestAgentRefusesForeignDevice(t *testing.T) {
	w := &world{foreign: true}
	cfg, err := ParseConfig("test", []byte(minimal))
	if err != nil {
		t.Fatal(err)
	}
	a := New(cfg, Deps{Network: fakeNet{w}, Now: w.now, Log: slog.New(slog.DiscardHandler)})
	err = a.Run(t.Context(), func() {})
	if err == nil || !strings.Contains(err.Error(), "interface dstm0 (tuntap) exists already and is not ours") {
		t.Errorf("error %v, want the foreign device refused", err)
	}
	if len(w.trace) != 0 {
		t.Errorf("touched the system all the same: %q", w.trace)
	}
}

func TestHeldQueue(t *testing.T) {
	t0 := time.Unix(0, 0)
	at := func(n byte, d time.Duration) dataplane.Held { return dataplane.Held{Data: []byte{n}, At: t0.Add(d)} }
	q := heldQueue{most: 3, age: 3 * sec}
	for i, want := range []bool{true, true, true, false} {
		if got := q.push(at(byte(i), time.Duration(i)*sec)); got != want {
			t.Errorf("packet %d kept: %v, want %v", i, got, want)
		}
	}
	p, late, ok := q.pop(t0.Add(4 * sec))
	if !ok || late != 1 || p.Data[0] != 1 {
		t.Errorf("got packet %v, %d late, %v; want packet 1 and 1 late", p.Data, late, ok)
	}
	if n := q.clear(); n != 1 {
		t.Errorf("cleared %d, want 1", n)
	}
	if _, _, ok := q.pop(t0); ok {
		t.Error("a packet after clear")
	}
}
