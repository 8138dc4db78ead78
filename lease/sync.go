package lease

import "net/netip"

// Kind says what a Record does.
type Kind uint8

// The kinds of records. A receiver passes KindUnknown on as such when it does not know what it got.
const (
	KindNone    Kind = 0
	KindBind    Kind = 1
	KindUnbind  Kind = 2
	KindPool    Kind = 3
	KindUnknown Kind = 255
)

// Record is one change of the table that every gateway of a cell holds. It is comparable.
type Record struct {
	Rev      Rev
	Kind     Kind
	Critical bool       // a receiver that does not know the kind must refuse it
	Bind     Binding    // KindBind
	Unbind   Ref        // KindUnbind
	Pool     PoolChange // KindPool
}

// PoolChange adds, changes or removes a pool.
type PoolChange struct {
	Pool
	Removed bool
}

// BindRecord builds the record that adds or replaces a binding.
func BindRecord(rev Rev, b Binding) Record {
	return Record{Rev: rev, Kind: KindBind, Critical: true, Bind: b}
}

// UnbindRecord builds the record that removes a binding.
func UnbindRecord(rev Rev, r Ref) Record {
	return Record{Rev: rev, Kind: KindUnbind, Critical: true, Unbind: r}
}

// PoolRecord builds the record that adds, changes or removes a pool.
func PoolRecord(rev Rev, p Pool, removed bool) Record {
	return Record{Rev: rev, Kind: KindPool, Critical: true, Pool: PoolChange{Pool: p, Removed: removed}}
}

// ClusterID names one lease service group and its history; a gateway never mixes two (I12). Zero = none yet.
type ClusterID [16]byte

// The messages between the lease service and a gateway, as values. Boot times are CLOCK_BOOTTIME nanoseconds of the
// gateway.
type (
	// Hello opens a stream. Cluster, Epoch and HaveRev are zero for a new process.
	Hello struct {
		TEP        string
		Instance   string
		Cluster    ClusterID
		Epoch      Epoch
		HaveRev    Rev
		Caps       []string
		SentBootNS uint64
		Question   netip.AddrPort // where the gateway answers others (F9); zero = nowhere
	}
	// SessionReply answers a Hello or a Heartbeat: the deadline becomes EchoBootNS + GrantNS once Floor is applied (F5, F7).
	// Without further replies the gateway may extend it, as far as EchoBootNS + FailStaticNS, while every one of Others says
	// that it has no session either (F9).
	SessionReply struct {
		Session    uint64
		EchoBootNS uint64
		GrantNS    uint64
		Floor      Rev
		Cluster    ClusterID
		Epoch      Epoch
		NextBeatNS uint64
		Lagging    bool
		ServiceNS  uint64 // when the service made this, on a clock of its own
		// FailStaticNS is D.
		FailStaticNS uint64
		Others       []Peer // in order
	}
	// SnapshotChunk is part of a whole table at Rev; it becomes authoritative with the last chunk.
	SnapshotChunk struct {
		Session  uint64
		Rev      Rev
		Index    uint32
		Last     bool
		Records  []Record
		Bindings uint32 // of all parts together, about; 0 = not known
	}
	// Batch carries every record with From <= rev <= To in order; without records it is progress.
	Batch struct {
		Session uint64
		From    Rev
		To      Rev
		Records []Record
	}
	// Peer is another gateway of the cell that answers questions.
	Peer struct {
		TEP      string
		Question netip.AddrPort
	}
	// Heartbeat asks for a later deadline. Digest is over the table at Applied; 0 = not given.
	Heartbeat struct {
		Session    uint64
		SentBootNS uint64
		Applied    Rev
		Digest     Digest
		// EchoServiceNS is ServiceNS of the newest session reply of this session; ContinuousNS says for how long the gateway
		// has been in session without having told another one that it is not (F9).
		EchoServiceNS uint64
		ContinuousNS  uint64
	}
	// Ack says that the packet path holds every record up to Applied (I8).
	Ack struct {
		Session uint64
		Applied Rev
		Nacks   []Nack
	}
	// Upload asks for a gateway's table instead of answering its Hello.
	Upload struct{}
	// TableChunk is part of what a gateway's packet path holds.
	TableChunk struct {
		Last bool
		Held []Binding
	}
	// Nack says which record a gateway could not take.
	Nack struct {
		Ref
		Reason string
	}
)

// Digest is an order-independent sum over the table (bindings and pools). The same table gives the same digest at the
// service and at every gateway. It finds mistakes, not forgeries.
type Digest uint64

// AddBinding puts a binding into the sum, which is modulo 2^64, so that removal is subtraction.
func (d *Digest) AddBinding(b Binding) { *d += Digest(hashBinding(b)) }

// RemoveBinding takes a binding out of the sum.
func (d *Digest) RemoveBinding(b Binding) { *d -= Digest(hashBinding(b)) }

// AddPool puts a pool into the sum.
func (d *Digest) AddPool(p Pool) { *d += Digest(hashPool(p)) }

// RemovePool takes a pool out of the sum.
func (d *Digest) RemovePool(p Pool) { *d -= Digest(hashPool(p)) }

const (
	fnvOffset = 14695981039346656037
	fnvPrime  = 1099511628211
)

type hasher uint64

func (h *hasher) byte(b byte) { *h = (*h ^ hasher(b)) * fnvPrime }

func (h *hasher) uint(v uint64, bytes int) {
	for i := bytes - 1; i >= 0; i-- {
		h.byte(byte(v >> (8 * i)))
	}
}

func (h *hasher) addr(a netip.Addr) {
	b := a.As16()
	for _, v := range b {
		h.byte(v)
	}
}

// sum mixes the bits once more (the finaliser of splitmix64): plain FNV-1a sums of similar keys cancel too easily.
func (h hasher) sum() uint64 {
	v := uint64(h)
	v = (v ^ v>>30) * 0xbf58476d1ce4e5b9
	v = (v ^ v>>27) * 0x94d049bb133111eb
	return v ^ v>>31
}

func hashBinding(b Binding) uint64 {
	h := hasher(fnvOffset)
	h.byte('b')
	h.addr(b.Addr)
	h.byte(b.PSIDLen)
	h.uint(uint64(b.PSID), 2)
	h.addr(b.Host)
	h.addr(b.TEP)
	h.uint(uint64(b.Gen), 8)
	h.uint(uint64(b.MTU), 2)
	return h.sum()
}

func hashPool(p Pool) uint64 {
	h := hasher(fnvOffset)
	h.byte('p')
	for i := range len(p.Name) {
		h.byte(p.Name[i])
	}
	h.byte(0)
	h.addr(p.Prefix.Addr())
	h.byte(byte(p.Prefix.Bits()))
	h.addr(p.TEP)
	return h.sum()
}
