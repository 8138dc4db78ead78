package wire

import (
	"errors"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	leasev1 "github.com/dstm-project/dstm/api/lease/v1"
	"github.com/dstm-project/dstm/lease"
)

var (
	addr    = netip.MustParseAddr("198.51.100.7")
	host    = netip.MustParseAddr("2001:db8:1::1")
	tep     = netip.MustParseAddr("2001:db8:a::1")
	cluster = lease.ClusterID{1, 2, 3}
	binding = lease.Binding{Resource: lease.Whole(addr), Host: host, TEP: tep, Gen: lease.MakeGen(3, 9), MTU: 1460}
	pool    = lease.Pool{Name: "main", Prefix: netip.MustParsePrefix("198.51.100.0/24"), TEP: tep}
)

// TestSyncRoundTrip sends every message of the sync protocol through its bytes.
func TestSyncRoundTrip(t *testing.T) {
	recs := []lease.Record{lease.BindRecord(9, binding), lease.UnbindRecord(10, lease.Ref{Resource: binding.Resource, Gen: binding.Gen}), lease.PoolRecord(11, pool, true)}
	up := []struct {
		m    *leasev1.SyncUp
		want any
	}{
		{FromHello(lease.Hello{TEP: "tep1", Instance: "i", Cluster: cluster, Epoch: 3, HaveRev: 7, Caps: []string{"x"}, SentBootNS: 5}), lease.Hello{TEP: "tep1", Instance: "i", Cluster: cluster, Epoch: 3, HaveRev: 7, Caps: []string{"x"}, SentBootNS: 5}},
		{FromHeartbeat(lease.Heartbeat{Session: 1, SentBootNS: 2, Applied: 3, Digest: 4}), lease.Heartbeat{Session: 1, SentBootNS: 2, Applied: 3, Digest: 4}},
		{FromAck(lease.Ack{Session: 1, Applied: 2, Nacks: []lease.Nack{{Ref: lease.Ref{Resource: binding.Resource, Gen: 4}, Reason: "r"}, {Reason: "no resource"}}}), lease.Ack{Session: 1, Applied: 2, Nacks: []lease.Nack{{Ref: lease.Ref{Resource: binding.Resource, Gen: 4}, Reason: "r"}, {Reason: "no resource"}}}},
	}
	for _, c := range up {
		var m leasev1.SyncUp
		throughBytes(t, c.m, &m)
		if got, err := SyncUp(&m); err != nil || !reflect.DeepEqual(got, c.want) {
			t.Errorf("got %+v, %v, want %+v", got, err, c.want)
		}
	}
	reply := lease.SessionReply{Session: 1, EchoBootNS: 2, GrantNS: uint64(30 * time.Second), Floor: 4, Cluster: cluster, Epoch: 5, NextBeatNS: uint64(10 * time.Second), Lagging: true, ServiceNS: 77, FailStaticNS: uint64(4 * time.Hour), Others: []lease.Peer{{TEP: "tep2", Question: netip.MustParseAddrPort("[2001:db8:3::2]:3546")}}}
	chunk := lease.SnapshotChunk{Session: 1, Rev: 11, Index: 2, Last: true, Records: recs, Bindings: 7}
	part := binding
	part.Resource.PSIDLen, part.Resource.PSID, part.MTU = 4, 11, 0
	packed := lease.SnapshotChunk{Session: 1, Rev: 11, Records: []lease.Record{
		lease.PoolRecord(11, pool, false), lease.BindRecord(8, binding), lease.BindRecord(9, binding), lease.BindRecord(9, part),
	}}
	if n := len(FromSnapshotChunk(packed).GetSnapshot().GetPacked()); n != 2*packedLen {
		t.Errorf("%d bytes are packed, want two bindings, those behind the one of another revision", n)
	}
	batch := lease.Batch{Session: 1, From: 9, To: 11, Records: recs}
	for _, c := range []struct {
		m    *leasev1.SyncDown
		want any
	}{{FromSessionReply(reply), reply}, {FromSnapshotChunk(chunk), chunk}, {FromSnapshotChunk(packed), packed}, {FromBatch(batch), batch}} {
		var m leasev1.SyncDown
		throughBytes(t, c.m, &m)
		if got, err := SyncDown(&m); err != nil || !reflect.DeepEqual(got, c.want) {
			t.Errorf("got %+v, %v, want %+v", got, err, c.want)
		}
	}
}

// TestPackedRefused: what does not fit the layout is an error that says where.
func TestPackedRefused(t *testing.T) {
	good := pack([]lease.Record{lease.BindRecord(9, binding)})
	for _, c := range []struct {
		at   int // of the byte that is set to 1; -1 = one byte is missing
		want string
	}{
		{-1, "snapshot.packed: 99 bytes: want 50 for each binding"},
		{packedLen + 4, ""}, // a psid_len of 1
		{packedLen + 5, "snapshot.packed: binding 1: byte 5 is 1: want 0"},
		{packedLen + 6, "snapshot.packed: binding 1: psid 256 does not fit into psid_len 0"},
		{packedLen + 48, "snapshot.packed: binding 1: mtu"},
	} {
		p := append(slices.Clone(good), good...)
		if c.at < 0 {
			p = p[:len(p)-1]
		} else {
			p[c.at] = 1
		}
		_, err := SyncDown(&leasev1.SyncDown{M: &leasev1.SyncDown_Snapshot{Snapshot: &leasev1.SnapshotChunk{Packed: p}}})
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.HasPrefix(err.Error(), c.want)) {
			t.Errorf("byte %d: error %v, want %q", c.at, err, c.want)
		}
	}
}

func throughBytes(t *testing.T, from, to proto.Message) {
	t.Helper()
	b, err := proto.Marshal(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := proto.Unmarshal(b, to); err != nil {
		t.Fatal(err)
	}
}

func TestDecodeRefusals(t *testing.T) {
	_, short := Addr6("host", []byte{1, 2})
	_, mapped := Addr6("host", netip.MustParseAddr("::ffff:192.0.2.1").AsSlice())
	_, psid := Resource("res", &leasev1.Resource{PsidLen: 4, Psid: 16})
	_, length := Resource("res", &leasev1.Resource{PsidLen: 16})
	_, missing := Ref("lease", nil)
	_, mtu := MTU("mtu", 500)
	_, big := MTU("mtu", 70000)
	_, id := RequestID([]byte{1})
	_, host4 := Prefix4("prefix", 0xc0000201, 24)
	_, many := Sources("sources", make([][]byte, MaxSources+1))
	_, grant := SyncDown(&leasev1.SyncDown{M: &leasev1.SyncDown_Session{Session: &leasev1.SessionReply{GrantMs: 1 << 63}}})
	_, empty := SyncUp(&leasev1.SyncUp{})
	for _, c := range []struct {
		err  error
		want string
	}{
		{short, "host: 2 bytes: want the 16 of an IPv6 address"},
		{mapped, "host: ::ffff:192.0.2.1: want an IPv6 unicast address"},
		{psid, "res: psid 16 does not fit into psid_len 4"},
		{length, "res: psid 0 of length 16: want a length of at most 10"},
		{missing, "lease: not set"},
		{mtu, "mtu: 500: want 0 or 576 to 65535"},
		{big, "mtu: 70000: want 0 or 576 to 65535"},
		{id, "request_id: 1 bytes: want 16"},
		{host4, "prefix: prefix 192.0.2.1/24 has host bits"},
		{many, "sources: 17 addresses: want at most 16"},
		{grant, "grant_ms: 9223372036854775808: more milliseconds than a deadline can hold"},
		{empty, "sync: message of an unknown kind"},
	} {
		if c.err == nil || c.err.Error() != c.want {
			t.Errorf("error %v, want %q", c.err, c.want)
		}
	}
}

func TestStatus(t *testing.T) {
	in := &Error{Code: codes.ResourceExhausted, Reason: lease.ReasonPoolDry, Msg: "pool main is dry"}
	err := FromStatus(ToStatus(in))
	var got *Error
	if !errors.As(err, &got) || *got != *in || !got.Temporary() || ReasonOf(err) != lease.ReasonPoolDry {
		t.Errorf("got %+v, want %+v", err, in)
	}
	if plain := errors.New("x"); FromStatus(plain) != plain || ReasonOf(plain) != lease.ReasonNone {
		t.Error("a plain error must come back as it is")
	}
}

// TestEnums keeps the numbers of lease and of the protocol the same.
func TestEnums(t *testing.T) {
	for n, name := range leasev1.Reason_name {
		if got := lease.Reason(n).String(); n != 0 && got != name {
			t.Errorf("reason %d is %s here and %s on the wire", n, got, name)
		}
	}
	for n, name := range leasev1.Trigger_name {
		if got := lease.Trigger(n).String(); n != 0 && got != strings.ToLower(name) {
			t.Errorf("trigger %d is %s here and %s on the wire", n, got, name)
		}
	}
}

func FuzzSyncDown(f *testing.F) {
	b, err := proto.Marshal(FromBatch(lease.Batch{From: 1, To: 2, Records: []lease.Record{lease.BindRecord(1, binding), lease.PoolRecord(2, pool, false)}}))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	if b, err = proto.Marshal(FromSnapshotChunk(lease.SnapshotChunk{Rev: 9, Records: []lease.Record{lease.BindRecord(9, binding)}})); err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, in []byte) {
		var m leasev1.SyncDown
		if proto.Unmarshal(in, &m) != nil {
			return
		}
		got, err := SyncDown(&m)
		if err != nil {
			return
		}
		var again *leasev1.SyncDown
		switch v := got.(type) {
		case lease.SessionReply:
			again = FromSessionReply(v)
		case lease.SnapshotChunk:
			again = FromSnapshotChunk(v)
		case lease.Batch:
			again = FromBatch(v)
		case lease.Upload:
			again = FromUpload()
		}
		if twice, err := SyncDown(again); err != nil || !reflect.DeepEqual(got, twice) {
			t.Errorf("%+v came back as %+v, %v", got, twice, err)
		}
	})
}

func FuzzSyncUp(f *testing.F) {
	b, err := proto.Marshal(FromHello(lease.Hello{TEP: "tep1", Cluster: cluster}))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, in []byte) {
		var m leasev1.SyncUp
		if proto.Unmarshal(in, &m) != nil {
			return
		}
		if v, err := SyncUp(&m); err == nil && v == nil {
			t.Error("no message and no error")
		}
	})
}
