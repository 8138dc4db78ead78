package tepd

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/dstm-project/dstm/bgp"
	"github.com/dstm-project/dstm/dataplane"
	"github.com/dstm-project/dstm/internal/netcfg"
	"github.com/dstm-project/dstm/lease"
)

const announcedAll = "set [198.51.100.0/24 2001:db8:a::1/128]"

var withdrawn = []string{"set [198.51.100.0/24]", "set []"}

func entriesOf(w *world) int {
	n, _ := w.path.has()
	return n
}

func deadlineOf(w *world) uint64 {
	_, d := w.path.has()
	return d
}

// TestAckIsHonest holds the packet path in the middle of a change: nothing may be acknowledged, and no deadline that needs
// the change be set, before it returns (I8, F7).
func TestAckIsHonest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, testConfig)
		w.start()
		defer w.end()
		st := w.stream()
		gate := make(chan struct{})
		w.path.setGate(gate)
		w.sync(st, 1, time.Hour)
		time.Sleep(time.Second)
		if got := st.acked(); got != 0 {
			t.Errorf("acknowledged revision %d while the packet path was still at it", got)
		}
		if _, deadline := w.path.has(); deadline != 0 {
			t.Errorf("deadline %d set before its floor was applied", deadline)
		}
		gate <- struct{}{}
		synctest.Wait()
		if got := st.acked(); got != 10 {
			t.Errorf("acknowledged revision %d, want 10", got)
		}
		if want := st.hello.SentBootNS + uint64(time.Hour); deadlineOf(w) != want {
			t.Errorf("deadline %d, want %d", deadlineOf(w), want)
		}
		w.send(st, lease.Batch{Session: 1, From: 11, To: 12, Records: []lease.Record{lease.BindRecord(12, binding(2, 12))}})
		if got := st.acked(); got != 10 {
			t.Errorf("acknowledged revision %d before the batch was applied", got)
		}
		gate <- struct{}{}
		synctest.Wait()
		if got, n := st.acked(), entriesOf(w); got != 12 || n != 2 {
			t.Errorf("acknowledged revision %d with %d entries, want 12 with 2", got, n)
		}
	})
}

// TestFailedApplyIsNotAcknowledged: after an error of the packet path the next stream brings the whole table.
func TestFailedApplyIsNotAcknowledged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, testConfig)
		w.start()
		defer w.end()
		st := w.stream()
		w.sync(st, 1, time.Hour)
		w.path.mu.Lock()
		w.path.fail = errors.New("map is full")
		w.path.mu.Unlock()
		w.send(st, lease.Batch{Session: 1, From: 11, To: 11, Records: []lease.Record{lease.BindRecord(11, binding(2, 11))}})
		if got := st.acked(); got != 10 {
			t.Errorf("acknowledged revision %d, want 10", got)
		}
		again := w.stream()
		if got := again.hello.HaveRev; got != 0 {
			t.Errorf("the next stream resumes at revision %d: want 0, a whole table", got)
		}
		if got := w.g.Status().Problem; got != "packet path: map is full" {
			t.Errorf("problem %q", got)
		}
	})
}

func TestReconnectResumes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, testConfig)
		w.start()
		defer w.end()
		st := w.stream()
		w.sync(st, 1, time.Hour)
		time.Sleep(6 * time.Second)
		synctest.Wait()
		if b, ok := st.lastBeat(); !ok || b.Applied != 10 || b.Digest == 0 {
			t.Errorf("heartbeat %+v, want one of revision 10 with a digest", b)
		}
		close(st.broken)
		again := w.stream()
		if got := again.hello.HaveRev; got != 10 {
			t.Errorf("the next stream asks from revision %d, want 10", got)
		}
		w.sync(again, 2, time.Hour)
		if got := again.acked(); got != 10 {
			t.Errorf("acknowledged revision %d on resume, want 10", got)
		}
	})
}

// TestSilentService: a service that takes the stream and never answers is left.
func TestSilentService(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, testConfig)
		w.start()
		defer w.end()
		w.stream()
		w.stream()
		if got := w.g.view.load().problem; got != "the lease service does not answer" {
			t.Errorf("problem %q", got)
		}
	})
}

func TestAnnounceOnlyWhenHealthy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, testConfig+testBGP)
		w.start()
		time.Sleep(2 * time.Minute) // longer than grace: with nothing announced there is nothing to withdraw
		if got := w.speaker.calls(); got != nil {
			t.Errorf("calls before the table was there: %v", got)
		}
		if err := w.g.Ready(); err == nil || !strings.Contains(err.Error(), "no table from the lease service yet") {
			t.Errorf("ready: %v", err)
		}
		st := w.stream()
		for len(w.service.streams) > 0 { // those before it were left because nobody answered
			st = w.stream()
		}
		w.sync(st, 1, time.Hour)
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if d := cmp.Diff([]string{announcedAll}, w.speaker.calls()); d != "" {
			t.Errorf("speaker calls (-want +got):\n%s", d)
		}
		if err := w.g.Ready(); err != nil {
			t.Errorf("ready: %v", err)
		}
		w.end()
		want := append(append([]string{announcedAll}, withdrawn...), "close 1")
		if d := cmp.Diff(want, w.speaker.calls()); d != "" {
			t.Errorf("speaker calls at the end (-want +got):\n%s", d)
		}
		if n := entriesOf(w); n != 1 {
			t.Errorf("packet path has %d entries after the end, want the 1 that there was", n)
		}
	})
}

// TestFailStatic: with the lease service down nothing is withdrawn while the deadline runs, and everything after (I10).
func TestFailStatic(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, testConfig+testBGP)
		w.start()
		st := w.stream()
		w.sync(st, 1, 10*time.Minute)
		time.Sleep(10 * time.Second)
		w.service.setDown(true)
		close(st.broken)
		time.Sleep(9 * time.Minute)
		synctest.Wait()
		if d := cmp.Diff([]string{announcedAll}, w.speaker.calls()); d != "" {
			t.Errorf("speaker calls while the deadline runs (-want +got):\n%s", d)
		}
		if left := time.Until(w.speaker.limit()); left <= 0 || left > time.Minute {
			t.Errorf("the speaker withdraws by itself in %s, want it at the deadline, in less than 1m", left)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if d := cmp.Diff(append([]string{announcedAll}, withdrawn...), w.speaker.calls()); d != "" {
			t.Errorf("speaker calls after the deadline (-want +got):\n%s", d)
		}
		if got := w.g.Status(); got.Health != "down" || !strings.HasPrefix(got.Reason, "the deadline passed") || got.DeadlineMS != 0 {
			t.Errorf("status %+v", got)
		}
		w.end()
	})
}

// TestReattach: a new process leaves the routes of a running speaker alone until it is healthy itself, or grace is over.
func TestReattach(t *testing.T) {
	was := []bgp.Route{{Prefix: poolPfx}, {Prefix: pfx("2001:db8:a::1/128")}}
	t.Run("healthy in time", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, testConfig+testBGP)
			w.speaker.routes = was
			w.start()
			st := w.stream()
			time.Sleep(9 * time.Second)
			if got := w.speaker.calls(); got != nil {
				t.Errorf("calls before the table was there: %v", got)
			}
			w.sync(st, 1, time.Hour)
			time.Sleep(5 * time.Second)
			synctest.Wait()
			if d := cmp.Diff([]string{announcedAll}, w.speaker.calls()); d != "" {
				t.Errorf("speaker calls (-want +got):\n%s", d)
			}
			w.end()
		})
	})
	t.Run("grace over", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, testConfig+testBGP)
			w.speaker.routes = was
			w.service.setDown(true)
			w.start()
			time.Sleep(59 * time.Second)
			synctest.Wait()
			if got := w.speaker.calls(); got != nil {
				t.Errorf("calls within grace: %v", got)
			}
			time.Sleep(3 * time.Second)
			synctest.Wait()
			if d := cmp.Diff(withdrawn, w.speaker.calls()); d != "" {
				t.Errorf("speaker calls (-want +got):\n%s", d)
			}
			w.end()
		})
	})
	t.Run("speaker restarts", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, testConfig+testBGP)
			w.start()
			w.sync(w.stream(), 1, time.Hour)
			time.Sleep(5 * time.Second)
			w.speaker.mu.Lock()
			w.speaker.dead, w.speaker.routes, w.speaker.log = true, nil, nil
			w.speaker.mu.Unlock()
			time.Sleep(15 * time.Second)
			synctest.Wait()
			if d := cmp.Diff([]string{announcedAll}, w.speaker.calls()); d != "" {
				t.Errorf("calls of the new speaker (-want +got):\n%s", d)
			}
			w.end()
		})
	})
}

// TestLeaseRoutes: the /32 comes and goes with its lease.
func TestLeaseRoutes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, testConfig+testBGP+"  announce: {pool: lease}\n")
		w.start()
		st := w.stream()
		w.sync(st, 1, time.Hour)
		time.Sleep(5 * time.Second)
		w.send(st, lease.Batch{Session: 1, From: 11, To: 11, Records: []lease.Record{lease.BindRecord(11, binding(2, 11))}})
		w.send(st, lease.Batch{Session: 1, From: 12, To: 12, Records: []lease.Record{
			lease.UnbindRecord(12, lease.Ref{Resource: binding(1, 3).Resource, Gen: 3}),
		}})
		want := []string{
			"set [198.51.100.1/32 2001:db8:a::1/128]",
			"set [198.51.100.1/32 198.51.100.2/32 2001:db8:a::1/128]",
			"set [198.51.100.2/32 2001:db8:a::1/128]",
		}
		if d := cmp.Diff(want, w.speaker.calls()); d != "" {
			t.Errorf("speaker calls (-want +got):\n%s", d)
		}
		w.end()
	})
}

func TestPoolOutsideAllowAdvertise(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, testConfig+strings.Replace(testBGP, "198.51.100.0/24", "203.0.113.0/24", 1))
		w.start()
		w.sync(w.stream(), 1, time.Hour)
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if d := cmp.Diff([]string{"set [2001:db8:a::1/128]"}, w.speaker.calls()); d != "" {
			t.Errorf("speaker calls (-want +got):\n%s", d)
		}
		notes := strings.Join(w.g.Status().Notes, "\n")
		if !strings.Contains(notes, "pool main (198.51.100.0/24) is outside of allow_advertise") {
			t.Errorf("notes %q do not say that the pool is refused", notes)
		}
		if got := testutil.ToFloat64(w.g.metrics.refused); got != 1 {
			t.Errorf("refused routes %v, want 1", got)
		}
		w.end()
	})
}

// TestExitIsLost: without a way out for IPv4 the gateway goes, with it it comes back.
func TestExitIsLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, testConfig+testBGP)
		w.start()
		w.sync(w.stream(), 1, time.Hour)
		time.Sleep(5 * time.Second)
		setExit := func(link string) {
			w.kernel.mu.Lock()
			w.kernel.exit = netcfg.Hop{Link: link}
			w.kernel.mu.Unlock()
			time.Sleep(5 * time.Second)
			synctest.Wait()
		}
		setExit("dstm0")
		setExit("eth1")
		want := append(append([]string{announcedAll}, withdrawn...), announcedAll)
		if d := cmp.Diff(want, w.speaker.calls()); d != "" {
			t.Errorf("speaker calls (-want +got):\n%s", d)
		}
		w.end()
	})
}

// TestRestartKeepsPools: a new process serves the pools of the one before it until the lease service says otherwise.
func TestRestartKeepsPools(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first := newWorld(t, testConfig)
		first.start()
		first.sync(first.stream(), 1, time.Hour)
		first.end()

		w := newWorld(t, testConfig)
		w.cfg.Paths.Run = first.cfg.Paths.Run
		w.kernel.links = first.kernel.links
		w.service.setDown(true)
		w.start()
		synctest.Wait()
		if d := cmp.Diff(first.kernel.set, w.kernel.set, cmpAddr, cmpPrefix); d != "" {
			t.Errorf("kernel state of the first and the second process (-first +second):\n%s", d)
		}
		if d := cmp.Diff(first.path.cfg, w.path.cfg, cmpAddr, cmpPrefix); d != "" {
			t.Errorf("packet path of the first and the second process (-first +second):\n%s", d)
		}
		w.end()
	})
}

func TestForeignDevice(t *testing.T) {
	for _, c := range []struct {
		name string
		link netcfg.Link
		want string
	}{
		{"another kind", netcfg.Link{Index: 7, Name: "dstm0", Kind: "dummy"}, "interface dstm0 exists already and is of kind dummy, not a TUN of ours: remove it (ip link del dstm0) or set tunnel.device"},
		{"another owner", netcfg.Link{Index: 8, Name: "dstm0", Kind: tunKind}, "interface dstm0 exists already and was made by another program: stop that program, remove the interface (ip link del dstm0) or set tunnel.device"},
	} {
		w := newWorld(t, testConfig)
		w.kernel.links["dstm0"] = c.link
		err := w.g.Run(t.Context(), func() {})
		if err == nil || err.Error() != c.want {
			t.Errorf("%s: error %v, want %q", c.name, err, c.want)
		}
		if w.path.cfg.Device != "" {
			t.Errorf("%s: the packet path was configured", c.name)
		}
	}
}

// failsOnce is a packet path whose first Configure makes the device and then fails.
type failsOnce struct {
	makesDevice
	failed bool
}

func (f *failsOnce) Configure(ctx context.Context, c dataplane.GatewayConfig) error {
	if err := f.makesDevice.Configure(ctx, c); err != nil || f.failed {
		return err
	}
	f.failed = true
	return errDown
}

// TestFailedFirstStart: the device of a start that failed is ours, for the next start and for Cleanup.
func TestFailedFirstStart(t *testing.T) {
	for _, next := range []string{"start", "cleanup"} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, testConfig)
			d := w.g.Deps
			d.Path = &failsOnce{makesDevice: makesDevice{w.path, w.kernel}}
			if err := New(w.cfg, d).Run(t.Context(), func() {}); !errors.Is(err, errDown) {
				t.Fatalf("first start: %v, want %v", err, errDown)
			}
			if _, there := w.kernel.links["dstm0"]; !there {
				t.Fatal("the first start made no device")
			}
			if next == "start" {
				w.start()
				w.end()
				return
			}
			if err := Cleanup(t.Context(), w.cfg, d, noSpeaker); err != nil {
				t.Error(err)
			}
			if _, there := w.kernel.links["dstm0"]; there {
				t.Error("the device stays after cleanup")
			}
		})
	}
}

func TestOnlyOneRuns(t *testing.T) {
	w := newWorld(t, testConfig)
	unlock, err := lock(w.cfg.Paths)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.g.Run(t.Context(), func() {}); !errors.Is(err, ErrRunning) {
		t.Errorf("Run: %v, want %v", err, ErrRunning)
	}
	if err := Cleanup(t.Context(), w.cfg, w.g.Deps, noSpeaker); !errors.Is(err, ErrRunning) {
		t.Errorf("Cleanup: %v, want %v", err, ErrRunning)
	}
	unlock()
	if unlock, err = lock(w.cfg.Paths); err != nil {
		t.Errorf("lock after unlock: %v", err)
	} else {
		unlock()
	}
}

func TestCleanup(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, testConfig+testBGP)
		w.start()
		w.sync(w.stream(), 1, time.Hour)
		w.end()
		w.speaker.log = nil
		end := func(ctx context.Context) error { return w.speaker.Close(ctx, bgp.Withdraw) }
		if err := Cleanup(t.Context(), w.cfg, w.g.Deps, end); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff([]string{"cleanup", "remove dstm0"}, w.kernel.log); d != "" {
			t.Errorf("kernel calls (-want +got):\n%s", d)
		}
		if d := cmp.Diff([]string{"close 1"}, w.speaker.log); d != "" {
			t.Errorf("speaker calls (-want +got):\n%s", d)
		}
		h, err := loadHandover(w.cfg.Paths)
		if err != nil || h.Device != "" {
			t.Errorf("handover after cleanup: %+v, %v", h, err)
		}
	})
}

func TestCleanupLeavesStrangers(t *testing.T) {
	for _, c := range []struct {
		name string
		h    handover
		want string
	}{
		{"never ran", handover{}, ""},
		{"replaced since", handover{Device: "dstm0", Index: 7}, "packet path: interface dstm0 is not the one that tepd made (index 9, ours was 7): it stays, and so do the pins in /sys/fs/bpf/dstm"},
	} {
		w := newWorld(t, testConfig)
		w.kernel.links["dstm0"] = netcfg.Link{Index: 9, Name: "dstm0", Kind: tunKind}
		if err := c.h.save(w.cfg.Paths); err != nil {
			t.Fatal(err)
		}
		got := ""
		if err := Cleanup(t.Context(), w.cfg, w.g.Deps, noSpeaker); err != nil {
			got = err.Error()
		}
		if got != c.want {
			t.Errorf("%s: error %q, want %q", c.name, got, c.want)
		}
		if _, there := w.kernel.links["dstm0"]; !there || w.path.cfg.Device != "" {
			t.Errorf("%s: an interface that is not ours was touched", c.name)
		}
	}
}

func TestMetrics(t *testing.T) {
	r := prometheus.NewRegistry()
	newMetrics(r, &fakePath{t: t})
	problems, err := testutil.GatherAndLint(r)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}

func noSpeaker(context.Context) error { return nil }
