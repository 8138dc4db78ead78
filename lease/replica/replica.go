// Package replica is a gateway's side of the sync protocol, as a pure state machine: messages in, table changes,
// acknowledgements and deadlines out. It reads no clock and does no I/O; one goroutine uses it.
//
// The caller applies each Change to the packet path, then calls Applied, and sends or sets only what Applied returns:
// that order makes acknowledgements honest (I8) and keeps stale entries from living on under a new deadline (F7).
package replica

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/dstm-project/dstm/lease"
)

// Config names the gateway.
type Config struct {
	TEP      string
	Instance string // of this process
	Caps     []string
	Question netip.AddrPort // where this gateway answers others; zero = nowhere
}

// Replica is the table of one gateway process and how far it follows the service.
//
//	         Hello                SessionReply            snapshot complete
//	(none) ────────► WAITING ─────────────────► SYNCING ───────────────────► FOLLOWING ──┐
//	                    ▲                          │  ▲      or resume by revision  ▲    │ batch
//	                    └──── any error, new stream┴──┘                             └────┘
//
// The packet path forwards in every state for as long as its deadline runs.
type Replica struct {
	cfg     Config
	cluster lease.ClusterID
	epoch   lease.Epoch
	session uint64 // 0 = Hello sent, no reply yet
	newest  uint64 // the highest session there was
	hello   uint64 // send time of the Hello of this stream
	sent    uint64 // newest send time

	have    lease.Rev // the table holds everything up to here
	applied lease.Rev // and the packet path up to here
	whole   bool      // only a snapshot helps now: new process, new epoch, or doubt
	table   map[lease.Resource]lease.Binding
	pools   map[string]lease.Pool
	digest  lease.Digest
	snap    *snapshot
	refused bool // a record of this session could not be taken: nothing behind it is applied

	deadline uint64
	grants   []grant
	static   static
}

type grant struct {
	floor    lease.Rev
	deadline uint64
}

// maxGrants bounds the replies that wait for their floor; the oldest is the first to be of no use.
const maxGrants = 8

// New returns the replica of a new process. Its first session brings a whole table.
func New(cfg Config) *Replica {
	return &Replica{
		cfg: cfg, whole: true, table: map[lease.Resource]lease.Binding{}, pools: map[string]lease.Pool{},
	}
}

// Change is what the packet path must do to hold every record up to Rev.
type Change struct {
	Rev     lease.Rev
	Replace bool             // Upserts is the whole table; sweep everything else
	Upserts []lease.Binding  // in order
	Deletes []lease.Resource // never one that is also in Upserts
	Pools   bool             // the set of pools changed, see Replica.Pools
}

// Out is what follows from a message. Change must be applied to the packet path before Applied is called with its Rev.
// Ack, when there is one, may be sent and Deadline (CLOCK_BOOTTIME ns), when not 0, be set at once.
type Out struct {
	Change   *Change
	Ack      *lease.Ack
	Deadline uint64
}

// Hello opens a new stream at the boot time given; every message of earlier streams is ignored from here on.
func (r *Replica) Hello(bootNS uint64) lease.Hello {
	r.session, r.snap, r.grants, r.refused = 0, nil, nil, r.refused && seeded("refused for ever")
	r.hello, r.sent = bootNS, max(r.sent, bootNS)
	r.static.began, r.static.echo = 0, 0
	h := lease.Hello{
		TEP: r.cfg.TEP, Instance: r.cfg.Instance, Cluster: r.cluster, Epoch: r.epoch,
		Caps: r.cfg.Caps, SentBootNS: bootNS, Question: r.cfg.Question,
	}
	// What was received but not applied is received again.
	if r.applied != r.have {
		r.whole = true
	}
	if !r.whole {
		h.HaveRev = r.have
	}
	return h
}

// Session takes the answer to a Hello or Heartbeat, received at bootNS. After an error, here or in Batch and Snapshot, the
// caller must end the stream and say Hello again.
func (r *Replica) Session(m lease.SessionReply, bootNS uint64) (Out, error) {
	if m.EchoBootNS > r.sent {
		return Out{}, fmt.Errorf("session reply echoes boot time %d, the newest sent is %d", m.EchoBootNS, r.sent)
	}
	first := r.session == 0
	switch {
	case first && (m.EchoBootNS != r.hello || m.Session <= r.newest):
		return Out{}, nil // of an earlier stream
	case !first && m.Session != r.session:
		return Out{}, nil
	case m.Cluster == (lease.ClusterID{}):
		return Out{}, fmt.Errorf("session reply without a cluster id")
	case r.cluster != (lease.ClusterID{}) && m.Cluster != r.cluster && !seeded("any cluster"):
		return Out{}, fmt.Errorf("session reply of cluster %x, this gateway follows cluster %x", m.Cluster, r.cluster)
	case m.Epoch < r.epoch:
		return Out{}, fmt.Errorf("session reply of epoch %d, this gateway is in epoch %d", m.Epoch, r.epoch)
	case !first && m.Epoch != r.epoch:
		return Out{}, fmt.Errorf("session reply of epoch %d in a session of epoch %d", m.Epoch, r.epoch)
	}
	var out Out
	if first {
		if m.Epoch != r.epoch { // restored store: its revisions say nothing about ours
			r.whole, r.have, r.applied = true, 0, 0
		}
		r.cluster, r.epoch, r.session, r.newest = m.Cluster, m.Epoch, m.Session, m.Session
		if !r.whole {
			out.Ack = &lease.Ack{Session: r.session, Applied: r.applied}
		}
	}
	if seeded("deadline from the receipt") {
		m.EchoBootNS = bootNS
	}
	if m.EchoBootNS+m.GrantNS > m.EchoBootNS { // neither zero nor beyond what 64 bits hold
		r.grants = append(r.grants, grant{floor: m.Floor, deadline: m.EchoBootNS + m.GrantNS})
		if len(r.grants) > maxGrants {
			r.grants = slices.Delete(r.grants, 0, 1)
		}
	}
	r.static.answered(m, bootNS)
	out.Deadline = r.extend()
	return out, nil
}

// extend takes every grant whose floor the packet path has reached and returns the new deadline, 0 when it stays (F5, F7).
func (r *Replica) extend() uint64 {
	moved := uint64(0)
	r.grants = slices.DeleteFunc(r.grants, func(g grant) bool {
		// While only a snapshot helps, applied counts for a table that is in doubt.
		if r.whole || r.applied < g.floor && !seeded("floor ignored") {
			return false
		}
		if g.deadline > r.deadline {
			r.deadline, moved = g.deadline, g.deadline
		}
		return true
	})
	return moved
}

// Batch takes records that follow on what the table holds (F3).
func (r *Replica) Batch(b lease.Batch) (Out, error) {
	if b.Session != r.session || r.session == 0 || r.refused {
		return Out{}, nil
	}
	follows := b.From == r.have+1 || b.From > r.have && seeded("gap in the records")
	if r.whole || r.snap != nil || !follows || b.To < b.From || b.To > lease.MaxRev {
		return Out{}, r.doubt(fmt.Errorf("batch of revisions %d to %d, expected one from %d (whole table needed: %t)", b.From, b.To, r.have+1, r.whole || r.snap != nil))
	}
	last := b.From
	for _, rec := range b.Records {
		if rec.Rev < last || rec.Rev > b.To {
			return Out{}, r.doubt(fmt.Errorf("revision %d out of order in a batch of %d to %d", rec.Rev, b.From, b.To))
		}
		last = rec.Rev
		if nack, ok := r.check(rec); !ok {
			r.refused, r.whole = true, true
			return Out{Ack: &lease.Ack{Session: r.session, Applied: r.applied, Nacks: []lease.Nack{nack}}}, nil
		}
	}
	ch := &Change{Rev: b.To}
	touched := map[lease.Resource]bool{}
	for _, rec := range b.Records {
		if err := r.take(rec, ch, touched); err != nil {
			return Out{}, r.doubt(err)
		}
	}
	for res := range touched {
		if have, ok := r.table[res]; ok {
			ch.Upserts = append(ch.Upserts, have)
		} else {
			ch.Deletes = append(ch.Deletes, res)
		}
	}
	slices.SortFunc(ch.Upserts, func(a, b lease.Binding) int { return a.Resource.Compare(b.Resource) })
	slices.SortFunc(ch.Deletes, lease.Resource.Compare)
	r.have = b.To
	return Out{Change: ch}, nil
}

// doubt makes the next session bring a whole table. What the packet path holds goes on under its deadline.
func (r *Replica) doubt(err error) error {
	r.refused, r.whole = true, true
	return err
}

// take changes the table by one record.
func (r *Replica) take(rec lease.Record, ch *Change, touched map[lease.Resource]bool) error {
	switch rec.Kind {
	case lease.KindBind:
		b := rec.Bind
		old, ok := r.table[b.Resource]
		// The same lease with another MTU keeps its generation; order is by revision, so this cannot be an echo.
		same := ok && b.Gen == old.Gen && b.Host == old.Host && b.TEP == old.TEP
		if ok && b.Gen <= old.Gen && !same {
			return fmt.Errorf("binding %s@%s does not come after the one held (%s)", b.Resource, b.Gen, old.Gen)
		}
		r.put(b)
		touched[b.Resource] = true
	case lease.KindUnbind:
		old, ok := r.table[rec.Unbind.Resource]
		if !ok {
			return nil
		}
		if old.Gen > rec.Unbind.Gen {
			return fmt.Errorf("unbind of %s comes after a binding of generation %s", rec.Unbind, old.Gen)
		}
		delete(r.table, old.Resource)
		r.digest.RemoveBinding(old)
		touched[old.Resource] = true
	case lease.KindPool:
		r.setPool(rec.Pool)
		ch.Pools = true
	case lease.KindNone, lease.KindUnknown: // not critical, see check
	}
	return nil
}

func (r *Replica) put(b lease.Binding) {
	if old, ok := r.table[b.Resource]; ok {
		r.digest.RemoveBinding(old)
	}
	r.table[b.Resource] = b
	r.digest.AddBinding(b)
}

func (r *Replica) setPool(p lease.PoolChange) {
	if old, ok := r.pools[p.Name]; ok {
		r.digest.RemovePool(old)
		delete(r.pools, p.Name)
	}
	if !p.Removed {
		r.pools[p.Name] = p.Pool
		r.digest.AddPool(p.Pool)
	}
}

// Applied notes that the packet path holds every record up to the revision of a Change.
func (r *Replica) Applied(rev lease.Rev) Out {
	if rev > r.have || rev < r.applied || r.whole {
		return Out{}
	}
	r.applied = rev
	return Out{Ack: &lease.Ack{Session: r.session, Applied: rev}, Deadline: r.extend()}
}

// Failed notes that the packet path could not take a Change: the next session brings a whole table.
func (r *Replica) Failed() { _ = r.doubt(nil) }

// Heartbeat asks for a later deadline at the boot time given. It must not be sent before the session began.
func (r *Replica) Heartbeat(bootNS uint64) lease.Heartbeat {
	r.sent = max(r.sent, bootNS)
	h := lease.Heartbeat{
		Session: r.session, SentBootNS: bootNS, Applied: r.applied,
		EchoServiceNS: r.static.echo, ContinuousNS: r.static.continuous(bootNS),
	}
	if r.applied == r.have && !r.whole {
		h.Digest = r.digest
	}
	return h
}

// Status is where a replica stands, as /status shows it.
type Status struct {
	Cluster  lease.ClusterID
	Epoch    lease.Epoch
	Session  uint64 // 0 = none
	Have     lease.Rev
	Applied  lease.Rev
	Synced   bool // the table is whole and applied
	Deadline uint64
	Digest   lease.Digest
	Bindings int
}

// Status returns where the replica stands.
func (r *Replica) Status() Status {
	return Status{
		Cluster: r.cluster, Epoch: r.epoch, Session: r.session, Have: r.have, Applied: r.applied,
		Synced: !r.whole && r.snap == nil && r.applied == r.have, Deadline: r.deadline, Digest: r.digest, Bindings: len(r.table),
	}
}

// Pools returns the pools by name.
func (r *Replica) Pools() []lease.Pool {
	out := make([]lease.Pool, 0, len(r.pools))
	for _, p := range r.pools {
		out = append(out, p)
	}
	slices.SortFunc(out, func(a, b lease.Pool) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// Lookup returns the binding that the table has for a resource.
func (r *Replica) Lookup(res lease.Resource) (lease.Binding, bool) {
	b, ok := r.table[res]
	return b, ok
}

// Table returns the whole table in order.
func (r *Replica) Table() []lease.Binding {
	out := make([]lease.Binding, 0, len(r.table))
	for _, b := range r.table {
		out = append(out, b)
	}
	slices.SortFunc(out, func(a, b lease.Binding) int { return a.Resource.Compare(b.Resource) })
	return out
}
