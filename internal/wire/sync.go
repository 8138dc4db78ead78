package wire

import (
	"fmt"
	"math"
	"net/netip"
	"time"

	leasev1 "github.com/dstm-project/dstm/api/lease/v1"
	"github.com/dstm-project/dstm/lease"
)

func clusterID(b []byte) (lease.ClusterID, error) {
	switch len(b) {
	case 0:
		return lease.ClusterID{}, nil
	case len(lease.ClusterID{}):
		return lease.ClusterID(b), nil
	}
	return lease.ClusterID{}, fmt.Errorf("cluster_id: %d bytes: want 16", len(b))
}

func fromClusterID(c lease.ClusterID) []byte {
	if c == (lease.ClusterID{}) {
		return nil
	}
	return c[:]
}

func epoch(v uint32) (lease.Epoch, error) {
	if v > math.MaxUint16 {
		return 0, fmt.Errorf("epoch: %d: want at most 65535", v)
	}
	return lease.Epoch(v), nil
}

// SyncUp decodes a message of a gateway: a lease.Hello, lease.Heartbeat, lease.Ack or lease.TableChunk.
func SyncUp(m *leasev1.SyncUp) (any, error) {
	switch k := m.GetM().(type) {
	case *leasev1.SyncUp_Hello:
		return hello(k.Hello)
	case *leasev1.SyncUp_Beat:
		return lease.Heartbeat{
			Session: k.Beat.GetSession(), SentBootNS: k.Beat.GetSentBootNs(),
			Applied: lease.Rev(k.Beat.GetAppliedRev()), Digest: lease.Digest(k.Beat.GetDigest()),
			EchoServiceNS: k.Beat.GetEchoServiceNs(), ContinuousNS: k.Beat.GetContinuousNs(),
		}, nil
	case *leasev1.SyncUp_Ack:
		return ack(k.Ack)
	case *leasev1.SyncUp_Table:
		c := lease.TableChunk{Last: k.Table.GetLast()}
		for _, m := range k.Table.GetHeld() {
			b, err := Binding("table.held", m)
			if err != nil {
				return nil, err
			}
			c.Held = append(c.Held, b)
		}
		return c, nil
	}
	return nil, fmt.Errorf("sync: message of an unknown kind")
}

func hello(m *leasev1.TepHello) (lease.Hello, error) {
	cl, err := clusterID(m.GetClusterId())
	if err != nil {
		return lease.Hello{}, err
	}
	ep, err := epoch(m.GetEpoch())
	if err != nil {
		return lease.Hello{}, err
	}
	q, err := endpoint("question", m.GetQuestion())
	if err != nil {
		return lease.Hello{}, err
	}
	return lease.Hello{
		Question: q,
		TEP:      m.GetTepId(), Instance: m.GetInstance(), Cluster: cl, Epoch: ep,
		HaveRev: lease.Rev(m.GetHaveRev()), Caps: m.GetCaps(), SentBootNS: m.GetSentBootNs(),
	}, nil
}

func ack(m *leasev1.Ack) (lease.Ack, error) {
	a := lease.Ack{Session: m.GetSession(), Applied: lease.Rev(m.GetAppliedRev())}
	for _, n := range m.GetNacks() {
		var ref lease.Ref
		if n.GetRes() != nil { // a record of an unknown kind has none
			res, err := Resource("nack.res", n.GetRes())
			if err != nil {
				return lease.Ack{}, err
			}
			ref = lease.Ref{Resource: res, Gen: lease.Gen(n.GetGen())}
		}
		a.Nacks = append(a.Nacks, lease.Nack{Ref: ref, Reason: n.GetReason()})
	}
	return a, nil
}

// FromHello encodes the first message of a gateway.
func FromHello(h lease.Hello) *leasev1.SyncUp {
	return &leasev1.SyncUp{M: &leasev1.SyncUp_Hello{Hello: &leasev1.TepHello{
		TepId: h.TEP, Instance: h.Instance, ClusterId: fromClusterID(h.Cluster), Epoch: uint32(h.Epoch),
		HaveRev: uint64(h.HaveRev), Caps: h.Caps, SentBootNs: h.SentBootNS, Question: fromEndpoint(h.Question),
	}}}
}

// FromHeartbeat encodes a heartbeat.
func FromHeartbeat(h lease.Heartbeat) *leasev1.SyncUp {
	return &leasev1.SyncUp{M: &leasev1.SyncUp_Beat{Beat: &leasev1.Heartbeat{
		Session: h.Session, SentBootNs: h.SentBootNS, AppliedRev: uint64(h.Applied), Digest: uint64(h.Digest),
		EchoServiceNs: h.EchoServiceNS, ContinuousNs: h.ContinuousNS,
	}}}
}

// FromAck encodes an acknowledgement.
func FromAck(a lease.Ack) *leasev1.SyncUp {
	m := &leasev1.Ack{Session: a.Session, AppliedRev: uint64(a.Applied)}
	for _, n := range a.Nacks {
		nm := &leasev1.Nack{Gen: uint64(n.Gen), Reason: n.Reason}
		if n.Addr.IsValid() {
			nm.Res = FromResource(n.Resource)
		}
		m.Nacks = append(m.Nacks, nm)
	}
	return &leasev1.SyncUp{M: &leasev1.SyncUp_Ack{Ack: m}}
}

// FromTableChunk encodes a part of a gateway's table.
func FromTableChunk(c lease.TableChunk) *leasev1.SyncUp {
	m := &leasev1.TableChunk{Last: c.Last}
	for _, b := range c.Held {
		m.Held = append(m.Held, FromBinding(b))
	}
	return &leasev1.SyncUp{M: &leasev1.SyncUp_Table{Table: m}}
}

// FromUpload encodes the question for a table.
func FromUpload() *leasev1.SyncDown {
	return &leasev1.SyncDown{M: &leasev1.SyncDown_Upload{Upload: &leasev1.UploadTable{}}}
}

// SyncDown decodes a message of the service: a lease.SessionReply, lease.SnapshotChunk, lease.Batch or lease.Upload.
func SyncDown(m *leasev1.SyncDown) (any, error) {
	switch k := m.GetM().(type) {
	case *leasev1.SyncDown_Session:
		return sessionReply(k.Session)
	case *leasev1.SyncDown_Snapshot:
		recs, err := records(k.Snapshot.GetRecords())
		if err != nil {
			return nil, err
		}
		if recs, err = unpack(recs, k.Snapshot.GetPacked()); err != nil {
			return nil, err
		}
		return lease.SnapshotChunk{
			Session: k.Snapshot.GetSession(), Rev: lease.Rev(k.Snapshot.GetRev()), Index: k.Snapshot.GetIndex(),
			Last: k.Snapshot.GetLast(), Records: recs, Bindings: k.Snapshot.GetBindings(),
		}, nil
	case *leasev1.SyncDown_Batch:
		recs, err := records(k.Batch.GetRecords())
		if err != nil {
			return nil, err
		}
		return lease.Batch{
			Session: k.Batch.GetSession(), From: lease.Rev(k.Batch.GetRevFrom()), To: lease.Rev(k.Batch.GetRevTo()), Records: recs,
		}, nil
	case *leasev1.SyncDown_Upload:
		return lease.Upload{}, nil
	}
	return nil, fmt.Errorf("sync: message of an unknown kind")
}

func sessionReply(m *leasev1.SessionReply) (lease.SessionReply, error) {
	cl, err := clusterID(m.GetClusterId())
	if err != nil {
		return lease.SessionReply{}, err
	}
	ep, err := epoch(m.GetEpoch())
	if err != nil {
		return lease.SessionReply{}, err
	}
	grant, err := nanos("grant_ms", m.GetGrantMs())
	if err != nil {
		return lease.SessionReply{}, err
	}
	beat, err := nanos("next_beat_ms", m.GetNextBeatMs())
	if err != nil {
		return lease.SessionReply{}, err
	}
	static, err := nanos("fail_static_ms", m.GetFailStaticMs())
	if err != nil {
		return lease.SessionReply{}, err
	}
	var others []lease.Peer
	for _, p := range m.GetOthers() {
		q, err := endpoint("others.question", p.GetQuestion())
		if err != nil {
			return lease.SessionReply{}, err
		}
		others = append(others, lease.Peer{TEP: p.GetTepId(), Question: q})
	}
	return lease.SessionReply{
		ServiceNS: m.GetServiceNs(), FailStaticNS: static, Others: others,
		Session: m.GetSession(), EchoBootNS: m.GetEchoBootNs(), GrantNS: grant, Floor: lease.Rev(m.GetFloor()),
		Cluster: cl, Epoch: ep, NextBeatNS: beat, Lagging: m.GetLagging(),
	}, nil
}

// endpoint decodes an optional IPv6 address with a port.
func endpoint(field string, m *leasev1.Endpoint) (netip.AddrPort, error) {
	if m == nil {
		return netip.AddrPort{}, nil
	}
	a, err := Addr6(field, m.GetAddr())
	if err != nil {
		return netip.AddrPort{}, err
	}
	if m.GetPort() == 0 || m.GetPort() > math.MaxUint16 {
		return netip.AddrPort{}, fmt.Errorf("%s: port %d: want 1 to 65535", field, m.GetPort())
	}
	return netip.AddrPortFrom(a, uint16(m.GetPort())), nil
}

func fromEndpoint(p netip.AddrPort) *leasev1.Endpoint {
	if !p.IsValid() {
		return nil
	}
	return &leasev1.Endpoint{Addr: FromAddr6(p.Addr()), Port: uint32(p.Port())}
}

func nanos(field string, ms uint64) (uint64, error) {
	if ms > math.MaxInt64/uint64(time.Millisecond) {
		return 0, fmt.Errorf("%s: %d: more milliseconds than a deadline can hold", field, ms)
	}
	return ms * uint64(time.Millisecond), nil
}

func records(ms []*leasev1.Record) ([]lease.Record, error) {
	out := make([]lease.Record, 0, len(ms))
	for _, m := range ms {
		r, err := Record(m)
		if err != nil {
			return nil, err
		}
		out = append(out, r)
	}
	return out, nil
}

func fromRecords(rs []lease.Record) []*leasev1.Record {
	out := make([]*leasev1.Record, len(rs))
	for i, r := range rs {
		out[i] = FromRecord(r)
	}
	return out
}

// FromSessionReply encodes a session reply; the grant is rounded down to milliseconds, never up.
func FromSessionReply(r lease.SessionReply) *leasev1.SyncDown {
	var others []*leasev1.Peer
	for _, p := range r.Others {
		others = append(others, &leasev1.Peer{TepId: p.TEP, Question: fromEndpoint(p.Question)})
	}
	return &leasev1.SyncDown{M: &leasev1.SyncDown_Session{Session: &leasev1.SessionReply{
		Session: r.Session, EchoBootNs: r.EchoBootNS, GrantMs: r.GrantNS / uint64(time.Millisecond), Floor: uint64(r.Floor),
		ClusterId: fromClusterID(r.Cluster), Epoch: uint32(r.Epoch),
		NextBeatMs: r.NextBeatNS / uint64(time.Millisecond), Lagging: r.Lagging, ServiceNs: r.ServiceNS,
		FailStaticMs: r.FailStaticNS / uint64(time.Millisecond), Others: others,
	}}}
}

// FromSnapshotChunk encodes a part of a snapshot.
func FromSnapshotChunk(c lease.SnapshotChunk) *leasev1.SyncDown {
	n := len(c.Records)
	for n > 0 && packs(c.Records[n-1]) {
		n--
	}
	return &leasev1.SyncDown{M: &leasev1.SyncDown_Snapshot{Snapshot: &leasev1.SnapshotChunk{
		Session: c.Session, Rev: uint64(c.Rev), Index: c.Index, Last: c.Last, Records: fromRecords(c.Records[:n]), Bindings: c.Bindings,
		Packed: pack(c.Records[n:]),
	}}}
}

// FromBatch encodes a batch.
func FromBatch(b lease.Batch) *leasev1.SyncDown {
	return &leasev1.SyncDown{M: &leasev1.SyncDown_Batch{Batch: &leasev1.Batch{
		Session: b.Session, RevFrom: uint64(b.From), RevTo: uint64(b.To), Records: fromRecords(b.Records),
	}}}
}
