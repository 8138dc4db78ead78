package lease_test

import (
	"net/netip"
	"reflect"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/dstm-project/dstm/lease"
)

func TestFenceSet(t *testing.T) {
	const d = 4 * time.Hour
	f := lease.NewFenceSet(lease.FenceConfig{FailStatic: d}, 0, 10, lease.Member{TEP: "old", Instance: "x", Session: 7})
	if got := f.Watermark(d); got != 0 {
		t.Errorf("a member from the store may hold a grant made just before: watermark %d", got)
	}
	horizon, ok := f.Next(0)
	if want := d + 7200*time.Millisecond; !ok || horizon < want || horizon > want+time.Second {
		t.Errorf("horizon %s, want %s (500 ppm) and a little", horizon, want)
	}
	if got := f.Watermark(horizon); got != lease.MaxRev {
		t.Errorf("fenced by time: watermark %d", got)
	}

	now := horizon
	m := f.Hello(now, "old", "y", netip.AddrPort{})
	if want := (lease.Member{TEP: "old", Instance: "y", Session: 8, Horizon: d, FailStatic: d}); !reflect.DeepEqual(m, want) {
		t.Errorf("member %+v, want %+v", m, want)
	}
	g, err := f.Grant(now, "old", 8, 10)
	if g.Session != d || g.Floor != 10 || g.Member != nil || err != nil {
		t.Errorf("grant %+v: %v", g, err)
	}
	if err := f.Ack("old", 7, 10); err == nil || err.Error() != "gateway old speaks in session 7, its session is 8" {
		t.Errorf("ack of an old session: %v", err)
	}
	if err := f.Ack("old", 8, 11); err == nil {
		t.Error("ack of a revision that is not there")
	}
	if got := f.Waiting(now, 5); !cmp.Equal(got, []string{"old"}) {
		t.Errorf("waiting %v", got)
	}
	if err := f.Ack("old", 8, 10); err != nil {
		t.Error(err)
	}
	if got := f.Watermark(now); got != 10 {
		t.Errorf("watermark %d", got)
	}
	f.Hello(now, "old", "z", netip.AddrPort{})
	if got := f.Watermark(now); got != 0 {
		t.Errorf("an ack of the session before counts: watermark %d", got)
	}
	if _, err := f.Grant(now, "new", 1, 10); err == nil || err.Error() != "gateway new has no session" {
		t.Errorf("grant to a stranger: %v", err)
	}
}

// TestShorterFailStatic: a restart with a shorter fail_static must not forget what was granted before it.
func TestShorterFailStatic(t *testing.T) {
	const long, short = 4 * time.Hour, 10 * time.Minute
	f := lease.NewFenceSet(lease.FenceConfig{FailStatic: long}, 0, 1)
	m := f.Hello(0, "tep1", "a", netip.AddrPort{})
	if _, err := f.Grant(0, "tep1", 1, 1); err != nil {
		t.Fatal(err)
	}
	f = lease.NewFenceSet(lease.FenceConfig{FailStatic: short}, 0, 1, m) // restart
	if got := f.Watermark(long - time.Second); got != 0 {
		t.Errorf("the gateway may still forward, yet revisions up to %d count as fenced", got)
	}
	if m = f.Hello(time.Minute, "tep1", "a", netip.AddrPort{}); m.Horizon != long {
		t.Errorf("horizon %s while the long grant may run, want %s", m.Horizon, long)
	}
	at, _ := f.Next(0)
	if got := f.Watermark(at); got != lease.MaxRev {
		t.Errorf("past every grant: watermark %d", got)
	}
	if m = f.Hello(at, "tep1", "a", netip.AddrPort{}); m.Horizon != short {
		t.Errorf("horizon %s after every grant, want %s", m.Horizon, short)
	}
}

// TestShorterD: a gateway that asks others goes on for the D that it was told, whatever a restart of the service makes of it.
func TestShorterD(t *testing.T) {
	const long, short, d = 4 * time.Hour, 10 * time.Minute, 30 * time.Second
	q := netip.MustParseAddrPort("[2001:db8:3::1]:3546")
	f := lease.NewFenceSet(lease.FenceConfig{FailStatic: long, Session: d}, 0, 1)
	m := f.Hello(0, "tep1", "a", q)
	if _, err := f.Grant(0, "tep1", 1, 1); err != nil {
		t.Fatal(err)
	}
	restarted := lease.FenceConfig{FailStatic: short, Session: d}
	f = lease.NewFenceSet(restarted, 0, 1, m)
	if got := f.Watermark(long - time.Second); got != 0 {
		t.Errorf("the gateway may go on, yet revisions up to %d count as fenced", got)
	}
	if m = f.Hello(time.Minute, "tep1", "a", q); m.FailStatic != long || m.Horizon != d {
		t.Errorf("D %s and horizon %s while the long one counts, want %s and %s", m.FailStatic, m.Horizon, long, d)
	}
	f = lease.NewFenceSet(restarted, 0, 1, m) // once more
	if got := f.Watermark(long - time.Second); got != 0 {
		t.Errorf("after the second restart revisions up to %d count as fenced", got)
	}
	at, _ := f.Next(0)
	if m = f.Hello(at, "tep1", "a", q); m.FailStatic != short {
		t.Errorf("D %s when the long one has passed, want %s", m.FailStatic, short)
	}
}

// TestShorterSession: while a gateway may go by a reply of before a restart with a shorter session lease, no witness of a
// session of the new length speaks against it.
func TestShorterSession(t *testing.T) {
	const long, short, D = time.Minute, 10 * time.Second, time.Hour
	q := netip.MustParseAddrPort("[2001:db8:3::1]:3546")
	known := lease.Member{TEP: "t", Session: 1, Horizon: long, Question: q, Witnesses: []string{"w"}}
	f := lease.NewFenceSet(lease.FenceConfig{FailStatic: D, Session: short}, 0, 10, known)
	at := 10 * time.Minute // until then it was cut off, and the others were silent
	f.Hello(at, "w", "i", q)
	session := f.Hello(at, "t", "i", q).Session
	first, err := f.Grant(at, "t", session, 10)
	if err != nil || first.Session != short {
		t.Fatalf("grant %+v: %v", first, err)
	}
	at += time.Second
	if _, err := f.Beat("t", lease.Heartbeat{Session: session, EchoServiceNS: first.ServiceNS}); err != nil {
		t.Fatal(err)
	}
	if g, err := f.Grant(at, "t", session, 10); err != nil || len(g.Others) != 1 {
		t.Fatalf("grant %+v: %v", g, err)
	}
	if got := f.Status(at)[0].Horizon; got != long {
		t.Errorf("horizon %s just when it got the first reply, want %s", got, long)
	}
	at += long + time.Second
	if _, err := f.Grant(at, "t", session, 10); err != nil || f.Status(at)[0].Horizon != short {
		t.Errorf("horizon %s when the long one has passed: %v", f.Status(at)[0].Horizon, err)
	}
}

// TestWitness walks the rules of F9 from the service's side. d is 30 s, so its horizon is 30.016 s.
func TestWitness(t *testing.T) {
	const d, D = 30 * time.Second, 4 * time.Hour
	q := netip.MustParseAddrPort("[2001:db8:3::1]:3546")
	type world struct {
		*lease.FenceSet
		echo map[string]uint64
	}
	grant := func(t *testing.T, w *world, now time.Duration, tep string) lease.Granted {
		t.Helper()
		g, err := w.Grant(now, tep, 1, 10)
		if err != nil {
			t.Fatal(err)
		}
		w.echo[tep] = g.ServiceNS
		return g
	}
	beat := func(t *testing.T, w *world, tep string, continuous time.Duration) {
		t.Helper()
		if _, err := w.Beat(tep, lease.Heartbeat{Session: 1, EchoServiceNS: w.echo[tep], ContinuousNS: uint64(continuous)}); err != nil {
			t.Fatal(err)
		}
	}
	// start is two gateways in session at 0 s that know of each other.
	start := func(t *testing.T) *world {
		w := &world{lease.NewFenceSet(lease.FenceConfig{FailStatic: D, Session: d}, 0, 10), map[string]uint64{}}
		for _, tep := range []string{"t", "w"} {
			w.Hello(0, tep, "i", q)
		}
		for range 2 {
			for _, tep := range []string{"t", "w"} {
				grant(t, w, 0, tep)
				beat(t, w, tep, 0)
			}
		}
		return w
	}
	fenced := func(w *world, now time.Duration) bool { return w.Watermark(now) != 0 || len(w.Waiting(now, 10)) == 1 }
	s := time.Second
	t.Run("who is asked", func(t *testing.T) {
		w := start(t)
		g := grant(t, w, s, "t")
		if want := []lease.Peer{{TEP: "w", Question: q}}; !cmp.Equal(g.Others, want, opaque) || g.Session != d || g.FailStatic != D || g.Member != nil {
			t.Errorf("%+v, want others %v and nothing to store", g, want)
		}
		w.Close("w", 1)
		if g = grant(t, w, 2*s, "t"); len(g.Others) != 0 || g.Member == nil || len(g.Member.Witnesses) != 0 {
			t.Errorf("%+v, want nobody to ask, and that to be stored first", g)
		}
	})
	t.Run("fenced by a witness", func(t *testing.T) {
		w := start(t)
		w.Close("t", 1)
		beat(t, w, "w", 31*s) // of a reply from before
		grant(t, w, 31*s, "w")
		if fenced(w, 31*s) {
			t.Error("fenced by an answer from before the grant of the silent one had passed")
		}
		beat(t, w, "w", 30*s) // not longer than d and its margin
		if fenced(w, 32*s) {
			t.Error("fenced by a session that is too short")
		}
		beat(t, w, "w", 31*s)
		if !fenced(w, 32*s) {
			t.Error("not fenced by a witness")
		}
		if st := w.Status(32 * s)[0]; st.Fenced != "witness" || st.Deadline != 0 {
			t.Errorf("status %+v", st)
		}
		w.Hello(33*s, "t", "j", q)
		if _, err := w.Grant(33*s, "t", 2, 10); err != nil || fenced(w, 33*s) {
			t.Errorf("still fenced in a new session: %v", err)
		}
	})
	t.Run("without a witness", func(t *testing.T) {
		w := start(t)
		w.Close("w", 1)
		grant(t, w, s, "t") // t has nobody to ask from here on
		beat(t, w, "t", s)
		w.Close("t", 1)
		w.Hello(2*s, "w", "i", q)
		g, err := w.Grant(100*s, "w", 2, 10)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Beat("w", lease.Heartbeat{Session: 2, EchoServiceNS: g.ServiceNS, ContinuousNS: uint64(98 * s)}); err != nil {
			t.Fatal(err)
		}
		if fenced(w, 100*s) {
			t.Error("fenced by one that the silent gateway does not ask")
		}
	})
	t.Run("after a restart", func(t *testing.T) {
		known := lease.Member{TEP: "t", Session: 1, Horizon: d, Question: q, Witnesses: []string{"w"}}
		f := lease.NewFenceSet(lease.FenceConfig{FailStatic: D, Session: d}, 0, 10, known, lease.Member{TEP: "w", Horizon: d, Question: q})
		f.Hello(0, "w", "i", q)
		for _, step := range []struct {
			at         time.Duration
			continuous time.Duration
			want       bool
		}{{29 * s, 29 * s, false}, {30 * s, 30 * s, false}, {40 * s, 31 * s, true}} {
			g, err := f.Grant(step.at, "w", 1, 10)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := f.Beat("w", lease.Heartbeat{Session: 1, EchoServiceNS: g.ServiceNS, ContinuousNS: uint64(step.continuous)}); err != nil {
				t.Fatal(err)
			}
			if got := len(f.Waiting(step.at, 10)) == 1; got != step.want {
				t.Errorf("at %s: fenced %t, want %t", step.at, got, step.want)
			}
		}
	})
	t.Run("after a restore", func(t *testing.T) {
		// Since the copy was made t may have been told to ask nobody.
		known := lease.Member{TEP: "t", Session: 1, Horizon: d, Question: q, Witnesses: []string{"w"}}
		f := lease.NewFenceSet(lease.FenceConfig{FailStatic: D, Session: d, Epoch: 2}, 0, 10, known.Restored(D), lease.Member{TEP: "w", Question: q}.Restored(D))
		session := f.Hello(0, "w", "i", q).Session
		for at := time.Duration(0); at < 10*d; at += d {
			g, err := f.Grant(at, "w", session, 10)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := f.Beat("w", lease.Heartbeat{Session: session, EchoServiceNS: g.ServiceNS, ContinuousNS: uint64(at)}); err != nil {
				t.Fatal(err)
			}
			if got := f.Waiting(at, 10); len(got) != 2 {
				t.Fatalf("at %s only %v may forward", at, got)
			}
		}
	})
	t.Run("by order, and out", func(t *testing.T) {
		w := start(t)
		if err := w.Order("t"); err == nil {
			t.Error("a gateway with a stream was called off")
		}
		if err := w.Order("x"); err == nil {
			t.Error("a stranger was called off")
		}
		w.Close("t", 1)
		if err := w.Remove(s, "t"); err == nil || err.Error() != "gateway t may still forward for 4h0m6s: wait, or fence it" {
			t.Errorf("removed while it may forward: %v", err)
		}
		if err := w.Order("t"); err != nil || !fenced(w, s) {
			t.Errorf("by order: %v", err)
		}
		if err := w.Remove(s, "t"); err != nil || len(w.Status(s)) != 1 {
			t.Errorf("removal: %v, left %+v", err, w.Status(s))
		}
	})
}

func TestServing(t *testing.T) {
	empty := lease.NewFenceSet(lease.FenceConfig{FailStatic: time.Hour}, 0, 0)
	empty.Hello(0, "t", "i", netip.AddrPort{})
	if got := empty.Serving(0); got != nil {
		t.Errorf("before anything was acknowledged: serving %v", got)
	}
	if err := empty.Ack("t", 1, 0); err != nil || !cmp.Equal(empty.Serving(0), []string{"t"}) {
		t.Errorf("after the acknowledgement of an empty table: serving %v, %v", empty.Serving(0), err)
	}
	f := lease.NewFenceSet(lease.FenceConfig{FailStatic: time.Hour}, 0, 3)
	ms := time.Millisecond
	m := f.Hello(0, "t", "i", netip.AddrPort{})
	for _, step := range []struct {
		name    string
		at      time.Duration
		publish lease.Rev
		ack     lease.Rev
		want    []string
	}{
		{"not caught up", 0, 3, 0, nil},
		{"caught up", 10 * ms, 3, 3, []string{"t"}},
		{"new records, young", 20 * ms, 4, 3, []string{"t"}},
		{"999 ms behind", 1019 * ms, 5, 3, []string{"t"}},
		{"1 s behind", 1020 * ms, 5, 3, nil},
		{"the next one is young", 1021 * ms, 5, 4, []string{"t"}},
	} {
		f.Publish(step.at, step.publish)
		if err := f.Ack("t", m.Session, step.ack); err != nil {
			t.Fatal(err)
		}
		if got := f.Serving(step.at); !cmp.Equal(got, step.want) {
			t.Errorf("%s: serving %v, want %v", step.name, got, step.want)
		}
	}
	f.Close("t", m.Session)
	if got := f.Serving(1022 * ms); got != nil {
		t.Errorf("without a stream: serving %v", got)
	}
	want := []lease.TEPStatus{{Member: m, Acked: 4, Head: 5, Fenced: "time"}}
	if got := f.Status(1022 * ms); !cmp.Equal(got, want, opaque) {
		t.Errorf("status %+v", got)
	}
}

func TestAnswers(t *testing.T) {
	a := lease.NewAnswers[string](time.Minute)
	id := func(b byte) lease.RequestID { return lease.RequestID{b} }
	a.Put(0, "h", id(1), "one")
	a.Put(0, "h", lease.RequestID{}, "none")
	if v, ok := a.Get(59*time.Second, "h", id(1)); v != "one" || !ok {
		t.Errorf("got %q %t", v, ok)
	}
	if _, ok := a.Get(0, "other", id(1)); ok {
		t.Error("another host sees the answer")
	}
	if _, ok := a.Get(time.Minute, "h", id(1)); ok || a.Len() != 0 {
		t.Error("kept too long")
	}
	for i := range byte(20) {
		a.Put(time.Minute, "h", id(i+1), "x")
	}
	if _, ok := a.Get(time.Minute, "h", id(20)); !ok || a.Len() != 2 {
		t.Errorf("%d answers of one host", a.Len())
	}
}

func TestDigest(t *testing.T) {
	b := lease.Binding{Resource: ref("198.51.100.1", 0).Resource, Host: srcA, TEP: tepA, Gen: 1, MTU: 1400}
	c := b
	c.Addr = c.Addr.Next()
	p := config("198.51.100.0/24").Pool
	var x, y lease.Digest
	x.AddBinding(b)
	x.AddBinding(c)
	x.AddPool(p)
	y.AddPool(p)
	y.AddBinding(c)
	y.AddBinding(b)
	if x != y || x == 0 {
		t.Errorf("digests of one table: %x, %x", x, y)
	}
	y.RemoveBinding(b)
	b.MTU++
	y.AddBinding(b)
	if x == y {
		t.Error("another MTU, the same digest")
	}
}
