package replica

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/dstm-project/dstm/lease"
)

var (
	equate  = cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{}, netip.AddrPort{})
	host    = netip.MustParseAddr("2001:db8:1::a")
	tep     = netip.MustParseAddr("2001:db8:a::1")
	cluster = lease.ClusterID{1}
	pool    = lease.Pool{Name: "main", Prefix: netip.MustParsePrefix("198.51.100.0/24"), TEP: tep}
)

func binding(last byte, gen lease.Gen) lease.Binding {
	return lease.Binding{Resource: lease.Whole(netip.AddrFrom4([4]byte{198, 51, 100, last})), Host: host, TEP: tep, Gen: gen, MTU: 1440}
}

func bind(rev lease.Rev, last byte, gen lease.Gen) lease.Record {
	return lease.BindRecord(rev, binding(last, gen))
}

func unbind(rev lease.Rev, last byte, gen lease.Gen) lease.Record {
	return lease.UnbindRecord(rev, lease.Ref{Resource: binding(last, gen).Resource, Gen: gen})
}

func reply(session, echo uint64, floor lease.Rev) lease.SessionReply {
	return lease.SessionReply{Session: session, EchoBootNS: echo, GrantNS: 1000, Floor: floor, Cluster: cluster, Epoch: 1}
}

// following returns a replica in session 1 whose packet path holds .1 (generation 3) at revision 10; its deadline is 1100.
func following(t *testing.T) *Replica {
	t.Helper()
	r := New(Config{TEP: "tep1", Instance: "i"})
	r.Hello(100)
	must(t, session(r), reply(1, 100, 10))
	must(t, r.Snapshot, lease.SnapshotChunk{
		Session: 1, Rev: 10, Last: true, Records: []lease.Record{lease.PoolRecord(1, pool, false), bind(3, 1, 3)},
	})
	r.Applied(10)
	return r
}

// session takes replies as they come back at once.
func session(r *Replica) func(lease.SessionReply) (Out, error) {
	return func(m lease.SessionReply) (Out, error) { return r.Session(m, m.EchoBootNS) }
}

func must[M any](t *testing.T, f func(M) (Out, error), m M) Out {
	t.Helper()
	out, err := f(m)
	if err != nil {
		t.Fatalf("%+v: %v", m, err)
	}
	return out
}

// A first session, message by message.
func TestFirstSession(t *testing.T) {
	r := New(Config{TEP: "tep1", Instance: "i", Caps: []string{"c"}})
	if got, want := r.Hello(100), (lease.Hello{TEP: "tep1", Instance: "i", Caps: []string{"c"}, SentBootNS: 100}); !cmp.Equal(got, want, equate) {
		t.Errorf("hello %+v, want %+v", got, want)
	}
	for _, step := range []struct {
		name string
		got  Out
		want Out
	}{
		{"the deadline waits for the floor", must(t, session(r), reply(1, 100, 10)), Out{}},
		{"a chunk changes nothing yet", must(t, r.Snapshot, lease.SnapshotChunk{Session: 1, Rev: 10, Records: []lease.Record{bind(3, 1, 3)}}), Out{}},
		{"the last chunk brings all", must(t, r.Snapshot, lease.SnapshotChunk{
			Session: 1, Rev: 10, Index: 1, Last: true, Records: []lease.Record{lease.PoolRecord(1, pool, false), bind(9, 2, 9)},
		}), Out{Change: &Change{Rev: 10, Replace: true, Pools: true, Upserts: []lease.Binding{binding(1, 3), binding(2, 9)}}}},
		{"acknowledged once applied", r.Applied(10), Out{Ack: &lease.Ack{Session: 1, Applied: 10}, Deadline: 1100}},
		{"a batch is folded", must(t, r.Batch, lease.Batch{Session: 1, From: 11, To: 16, Records: []lease.Record{
			unbind(11, 1, 3), bind(12, 3, 12), unbind(13, 3, 12), bind(14, 1, 14), unbind(16, 2, 9),
		}}), Out{Change: &Change{
			Rev: 16, Upserts: []lease.Binding{binding(1, 14)}, Deletes: []lease.Resource{binding(2, 0).Resource, binding(3, 0).Resource},
		}}},
		{"progress", must(t, r.Batch, lease.Batch{Session: 1, From: 17, To: 17}), Out{Change: &Change{Rev: 17}}},
		{"applied", r.Applied(17), Out{Ack: &lease.Ack{Session: 1, Applied: 17}}},
	} {
		if diff := cmp.Diff(step.want, step.got, equate); diff != "" {
			t.Errorf("%s: -want +got:\n%s", step.name, diff)
		}
	}
	var want lease.Digest
	want.AddPool(pool)
	want.AddBinding(binding(1, 14))
	if got := r.Heartbeat(500); got != (lease.Heartbeat{Session: 1, SentBootNS: 500, Applied: 17, ContinuousNS: 400, Digest: want}) {
		t.Errorf("heartbeat %+v, digest should be %x", got, want)
	}
	if got := r.Hello(600); got.HaveRev != 17 || got.Cluster != cluster || got.Epoch != 1 {
		t.Errorf("a reconnect resumes: %+v", got)
	}
	if out := must(t, session(r), reply(2, 600, 17)); !cmp.Equal(out, Out{Ack: &lease.Ack{Session: 2, Applied: 17}, Deadline: 1600}) {
		t.Errorf("what is held is acknowledged in the new session: %+v", out)
	}
}

func TestDeadline(t *testing.T) {
	r := following(t)
	r.Heartbeat(200)
	r.Heartbeat(300)
	for _, step := range []struct {
		name string
		m    lease.SessionReply
		want uint64
	}{
		{"moves on", reply(1, 300, 10), 1300},
		{"never back", reply(1, 200, 10), 0},
		{"another session's", reply(2, 300, 10), 0},
		{"no grant", lease.SessionReply{Session: 1, EchoBootNS: 300, Floor: 10, Cluster: cluster, Epoch: 1}, 0},
		{"a grant beyond 64 bits", lease.SessionReply{Session: 1, EchoBootNS: 300, GrantNS: ^uint64(0), Cluster: cluster, Epoch: 1}, 0},
	} {
		if out := must(t, session(r), step.m); out.Deadline != step.want {
			t.Errorf("%s: deadline %d, want %d", step.name, out.Deadline, step.want)
		}
	}
	r.Heartbeat(400)
	if out := must(t, session(r), reply(1, 400, 12)); out.Deadline != 0 {
		t.Errorf("extended below the floor: %d", out.Deadline)
	}
	must(t, r.Batch, lease.Batch{Session: 1, From: 11, To: 12})
	if out := r.Applied(12); out.Deadline != 1400 {
		t.Errorf("the floor is reached: %d", out.Deadline)
	}
}

func TestRefused(t *testing.T) {
	session := func(m lease.SessionReply) func(*Replica) (Out, error) {
		return func(r *Replica) (Out, error) { return r.Session(m, m.EchoBootNS) }
	}
	batch := func(from, to lease.Rev, recs ...lease.Record) func(*Replica) (Out, error) {
		return func(r *Replica) (Out, error) {
			return r.Batch(lease.Batch{Session: 1, From: from, To: to, Records: recs})
		}
	}
	snap := func(index uint32, rev lease.Rev, recs ...lease.Record) func(*Replica) (Out, error) {
		return func(r *Replica) (Out, error) {
			return r.Snapshot(lease.SnapshotChunk{Session: 1, Rev: rev, Index: index, Last: true, Records: recs})
		}
	}
	other, older, none := reply(1, 100, 0), reply(1, 100, 0), reply(1, 100, 0)
	other.Cluster, older.Epoch, none.Cluster = lease.ClusterID{2}, 0, lease.ClusterID{}
	for _, tt := range []struct {
		name string
		do   func(*Replica) (Out, error)
		want string
	}{
		{"I12: two clusters", session(other), "session reply of cluster 02000000000000000000000000000000, this gateway follows cluster 01"},
		{"no cluster", session(none), "without a cluster id"},
		{"older epoch", session(older), "epoch 0, this gateway is in epoch 1"},
		{"echo from the future", session(reply(1, 101, 0)), "echoes boot time 101, the newest sent is 100"},
		{"a gap", batch(12, 13), "batch of revisions 12 to 13, expected one from 11"},
		{"twice", batch(10, 10), "expected one from 11"},
		{"backwards", batch(11, 10), "expected one from 11"},
		{"record order", batch(11, 12, bind(12, 2, 12), bind(11, 3, 11)), "revision 11 out of order"},
		{"record beyond", batch(11, 12, bind(13, 2, 13)), "revision 13 out of order"},
		{"generation not above the one held", batch(11, 11, bind(11, 1, 2)), "198.51.100.1@0.2 does not come after the one held (0.3)"},
		{"unbind of an older lease", batch(11, 11, unbind(11, 1, 2)), "comes after a binding of generation 0.3"},
		{"old snapshot", snap(0, 9), "snapshot at revision 9, the table is at 10"},
		{"chunk missing", snap(1, 11), "expected chunk 0"},
		{"twice in a snapshot", snap(0, 11, bind(4, 2, 4), bind(5, 2, 5)), "holds 198.51.100.2 twice"},
		{"from after the snapshot", snap(0, 11, bind(12, 2, 12)), "record of revision 12 in a snapshot at 11"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := following(t)
			before := r.Table()
			out, err := tt.do(r)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want ...%s...", err, tt.want)
			}
			if !cmp.Equal(out, Out{}) {
				t.Errorf("an error came with %+v", out)
			}
			if strings.HasPrefix(tt.name, "I12") && !cmp.Equal(before, r.Table(), equate) {
				t.Error("the table changed")
			}
		})
	}
}

func TestNack(t *testing.T) {
	strange := lease.Record{Rev: 11, Kind: lease.KindUnknown, Critical: true}
	bad := bind(11, 2, 11)
	bad.Bind.Host = netip.MustParseAddr("192.0.2.1")
	for _, tt := range []struct {
		name string
		rec  lease.Record
		want lease.Nack
	}{
		{"unknown critical", strange, lease.Nack{Reason: "unknown critical record at revision 11"}},
		{"host not IPv6", bad, lease.Nack{Ref: lease.Ref{Resource: bad.Bind.Resource, Gen: 11}, Reason: "binding 198.51.100.2: host 192.0.2.1 is not an IPv6 address"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := following(t)
			out := must(t, r.Batch, lease.Batch{Session: 1, From: 11, To: 11, Records: []lease.Record{tt.rec}})
			want := Out{Ack: &lease.Ack{Session: 1, Applied: 10, Nacks: []lease.Nack{tt.want}}}
			if diff := cmp.Diff(want, out, equate); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			if out := must(t, r.Batch, lease.Batch{Session: 1, From: 12, To: 12}); out.Change != nil {
				t.Error("something behind a refused record was applied")
			}
		})
	}
	r := following(t)
	strange.Critical = false
	if out := must(t, r.Batch, lease.Batch{Session: 1, From: 11, To: 11, Records: []lease.Record{strange}}); out.Change == nil {
		t.Error("an unknown record that is not critical is passed over")
	}
}

// After a restore the revisions start over and only a whole table helps; the old one forwards until then.
func TestNewEpoch(t *testing.T) {
	r := following(t)
	r.Hello(200)
	m := reply(2, 200, 4)
	m.Epoch = 2
	if out := must(t, session(r), m); out.Ack != nil || out.Deadline != 0 {
		t.Errorf("%+v", out)
	}
	if len(r.Table()) != 1 {
		t.Error("the table went before the new one came")
	}
	must(t, r.Snapshot, lease.SnapshotChunk{Session: 2, Rev: 4, Last: true})
	if out := r.Applied(4); out.Deadline != 1200 || len(r.Table()) != 0 {
		t.Errorf("%+v, table %v", out, r.Table())
	}
}

func TestFailedApply(t *testing.T) {
	r := following(t)
	must(t, r.Batch, lease.Batch{Session: 1, From: 11, To: 11, Records: []lease.Record{bind(11, 2, 11)}})
	r.Failed()
	if out := r.Applied(11); out.Ack != nil {
		t.Error("I8: acknowledged what the packet path does not hold")
	}
	if h := r.Hello(200); h.HaveRev != 0 {
		t.Errorf("resumes at %d although the packet path is in doubt", h.HaveRev)
	}
}
