package lease_test

import (
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
	m := f.Hello(now, "old", "y")
	if want := (lease.Member{TEP: "old", Instance: "y", Session: 8, Horizon: d}); !reflect.DeepEqual(m, want) {
		t.Errorf("member %+v, want %+v", m, want)
	}
	grant, floor, err := f.Grant(now, "old", 8, 10)
	if grant != d || floor != 10 || err != nil {
		t.Errorf("grant %s floor %d: %v", grant, floor, err)
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
	f.Hello(now, "old", "z")
	if got := f.Watermark(now); got != 0 {
		t.Errorf("an ack of the session before counts: watermark %d", got)
	}
	if _, _, err := f.Grant(now, "new", 1, 10); err == nil || err.Error() != "gateway new has no session" {
		t.Errorf("grant to a stranger: %v", err)
	}
}

// TestShorterFailStatic: a restart with a shorter fail_static must not forget what was granted before it.
func TestShorterFailStatic(t *testing.T) {
	const long, short = 4 * time.Hour, 10 * time.Minute
	f := lease.NewFenceSet(lease.FenceConfig{FailStatic: long}, 0, 1)
	m := f.Hello(0, "tep1", "a")
	if _, _, err := f.Grant(0, "tep1", 1, 1); err != nil {
		t.Fatal(err)
	}
	f = lease.NewFenceSet(lease.FenceConfig{FailStatic: short}, 0, 1, m) // restart
	if got := f.Watermark(long - time.Second); got != 0 {
		t.Errorf("the gateway may still forward, yet revisions up to %d count as fenced", got)
	}
	if m = f.Hello(time.Minute, "tep1", "a"); m.Horizon != long {
		t.Errorf("horizon %s while the long grant may run, want %s", m.Horizon, long)
	}
	at, _ := f.Next(0)
	if got := f.Watermark(at); got != lease.MaxRev {
		t.Errorf("past every grant: watermark %d", got)
	}
	if m = f.Hello(at, "tep1", "a"); m.Horizon != short {
		t.Errorf("horizon %s after every grant, want %s", m.Horizon, short)
	}
}

func TestServing(t *testing.T) {
	empty := lease.NewFenceSet(lease.FenceConfig{FailStatic: time.Hour}, 0, 0)
	empty.Hello(0, "t", "i")
	if got := empty.Serving(0); got != nil {
		t.Errorf("before anything was acknowledged: serving %v", got)
	}
	if err := empty.Ack("t", 1, 0); err != nil || !cmp.Equal(empty.Serving(0), []string{"t"}) {
		t.Errorf("after the acknowledgement of an empty table: serving %v, %v", empty.Serving(0), err)
	}
	f := lease.NewFenceSet(lease.FenceConfig{FailStatic: time.Hour}, 0, 3)
	ms := time.Millisecond
	m := f.Hello(0, "t", "i")
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
	want := []lease.TEPStatus{{Member: m, Acked: 4, Head: 5}}
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
	if _, ok := a.Get(time.Minute, "h", id(20)); !ok || a.Len() != 8 {
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
