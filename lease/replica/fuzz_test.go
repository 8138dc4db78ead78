package replica

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"github.com/dstm-project/dstm/lease"
)

// script turns fuzz bytes into messages: small numbers mostly, so that some of them fit.
type script struct{ b []byte }

func (s *script) byte() byte {
	if len(s.b) == 0 {
		return 0
	}
	v := s.b[0]
	s.b = s.b[1:]
	return v
}

func (s *script) num() uint64 {
	v := s.byte()
	if v == 255 && len(s.b) >= 8 {
		n := binary.BigEndian.Uint64(s.b)
		s.b = s.b[8:]
		return n
	}
	return uint64(v % 16)
}

func (s *script) record() lease.Record {
	gen, rev := lease.Gen(s.num()), lease.Rev(s.num())
	res := lease.Resource{Addr: netip.AddrFrom4([4]byte{198, 51, 100, s.byte() % 4}), PSIDLen: s.byte() % 32 / 30}
	switch s.byte() % 5 {
	case 0, 1:
		return lease.BindRecord(rev, lease.Binding{Resource: res, Host: host, TEP: tep, Gen: gen})
	case 2:
		return lease.UnbindRecord(rev, lease.Ref{Resource: res, Gen: gen})
	case 3:
		return lease.PoolRecord(rev, pool, s.byte()%2 == 0)
	}
	return lease.Record{Rev: rev, Kind: lease.Kind(s.byte()), Critical: s.byte()%8 == 0}
}

func (s *script) records() []lease.Record {
	out := make([]lease.Record, s.byte()%4)
	for i := range out {
		out[i] = s.record()
	}
	return out
}

// FuzzReplica feeds arbitrary messages and looks at what must hold after each: the packet path that follows the changes
// has the table, the digest fits, acknowledgements never run ahead of what was applied, the deadline never goes back,
// and it never moves before the floor.
func FuzzReplica(f *testing.F) {
	f.Add([]byte{0, 1, 1, 1, 0, 2, 1, 1, 0, 1, 0})
	f.Add([]byte{0, 1, 5, 0, 1, 0, 1, 4, 1, 0, 1, 2, 1, 0, 0, 0, 3, 2, 1, 5, 9, 2, 3, 4, 0, 1})
	f.Fuzz(func(t *testing.T, data []byte) {
		s := &script{b: data}
		r := New(Config{TEP: "t", Instance: "i"})
		path := map[lease.Resource]lease.Binding{}
		applied, deadline, clock := lease.Rev(0), uint64(0), uint64(0)
		session, epoch := uint64(1), lease.Epoch(0)
		for len(s.b) > 0 {
			var out Out
			switch s.byte() % 6 {
			case 0:
				clock++
				r.Hello(clock)
				session++
				out, _ = r.Session(lease.SessionReply{Session: session, EchoBootNS: clock, GrantNS: s.num(), Floor: lease.Rev(s.num()), Cluster: cluster, Epoch: epoch}, clock)
			case 1:
				out, _ = r.Session(lease.SessionReply{Session: s.num(), EchoBootNS: s.num(), GrantNS: s.num(), Floor: lease.Rev(s.num()), Cluster: cluster, Epoch: lease.Epoch(s.byte() % 2)}, s.num())
			case 2, 3:
				out, _ = r.Batch(lease.Batch{Session: session, From: r.have + 1, To: lease.Rev(s.num()), Records: s.records()})
			case 4:
				out, _ = r.Snapshot(lease.SnapshotChunk{Session: session, Rev: lease.Rev(s.num()), Index: uint32(s.byte() % 2), Last: s.byte()%2 == 0, Records: s.records()})
			case 5:
				clock += s.num() % 16
				r.Heartbeat(clock)
			}
			if out.Change != nil {
				change(path, out.Change)
				done := r.Applied(out.Change.Rev)
				if done.Ack == nil {
					t.Fatal("an applied change was not acknowledged")
				}
				applied = done.Ack.Applied
				out.Ack, out.Deadline = done.Ack, max(out.Deadline, done.Deadline)
			}
			if out.Ack != nil && out.Ack.Applied > applied {
				t.Fatalf("acknowledged %d, applied %d", out.Ack.Applied, applied)
			}
			if out.Deadline != 0 && out.Deadline <= deadline {
				t.Fatalf("deadline from %d to %d", deadline, out.Deadline)
			}
			deadline = max(deadline, out.Deadline)
			compare(t, r, path)
		}
	})
}

func change(path map[lease.Resource]lease.Binding, c *Change) {
	if c.Replace {
		clear(path)
	}
	for _, b := range c.Upserts {
		path[b.Resource] = b
	}
	for _, res := range c.Deletes {
		delete(path, res)
	}
}

func compare(t *testing.T, r *Replica, path map[lease.Resource]lease.Binding) {
	t.Helper()
	st := r.Status()
	if !st.Synced {
		return
	}
	var want lease.Digest
	for _, b := range path {
		want.AddBinding(b)
	}
	for _, p := range r.Pools() {
		want.AddPool(p)
	}
	if st.Digest != want || st.Bindings != len(path) {
		t.Fatalf("table of %d with digest %x, the packet path has %d with %x", st.Bindings, st.Digest, len(path), want)
	}
}
