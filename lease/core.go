package lease

import (
	"fmt"
	"net/netip"
	"time"
)

// State is the state of one address.
//
//	          Reserve                  Bind (commit)
//	FREE ───────────────► RESERVED ───────────────► BOUND(gen)
//	 ▲ ▲ ◄──── time-out ─────┘            ┌───────────► │ ▲ │ renew: same gen
//	 │ │        Bind (commit)             │             │ └─┘
//	 │ └──────────────────────────────────┘             │ release, expiry, revoke, move
//	 │                                                  ▼
//	HOLD ◄──────────────────────────────── REVOKING(gen, revoke_rev) ◄── revoke ── CONFLICT
//	 │        every gateway of the fence set
//	 └── Bind by the same host ──► BOUND(new gen)
//
// CONFLICT is entered only when records are loaded that contradict each other; an operator's revoke is the way out.
type State uint8

// The states; numbers as they are stored.
const (
	Free     State = 0
	Reserved State = 1 // soft, in memory only, for one host; any authenticated Bind may take it (I9)
	Bound    State = 2
	Revoking State = 3 // no longer the host's, but a gateway may still forward for it
	Hold     State = 4 // no gateway forwards for it; packets of the last holder may still be under way
	Conflict State = 5 // records contradict each other; never given out
)

var stateNames = [...]string{"FREE", "RESERVED", "BOUND", "REVOKING", "HOLD", "CONFLICT"}

// String returns the state's name as tools show it.
func (s State) String() string {
	if int(s) < len(stateNames) {
		return stateNames[s]
	}
	return fmt.Sprintf("STATE_%d", uint8(s))
}

// Now is the instant of an event. Mono counts from a start of the service's choosing and never goes back; every decision
// uses it alone. Wall is for records that outlive the process.
type Now struct {
	Mono time.Duration
	Wall time.Time
}

// Address is the durable record of one address that has been leased at least once. RESERVED is never stored.
type Address struct {
	Resource
	State     State
	Gen       Gen        // of the present or last lease
	Rev       Rev        // of the event that wrote this record
	RevokeRev Rev        // REVOKING, HOLD, FREE: revision of the revoke; gateways must have applied it
	Host      string     // identity of the present or last holder
	Source    netip.Addr // tunnel source of the lease, IPv6
	TEP       netip.Addr // gateway address of the lease, IPv6
	MTU       uint16     // inner bytes; 0 = the gateway's own
	Trigger   Trigger
	BoundAt   time.Time
	UnboundAt time.Time     // zero while bound
	FencedAt  time.Time     // zero until HOLD
	Valid     time.Duration // BOUND: the longest validity promised under this generation; 0 otherwise
	End       Reason        // why the lease ended
}

// Binding returns the lease of a BOUND address as gateways see it.
func (a Address) Binding() Binding {
	return Binding{Resource: a.Resource, Host: a.Source, TEP: a.TEP, Gen: a.Gen, MTU: a.MTU}
}

// Ref returns the name of the present or last lease.
func (a Address) Ref() Ref { return Ref{Resource: a.Resource, Gen: a.Gen} }

// Audit returns the audit record of the present or last lease.
func (a Address) Audit() Audit {
	return Audit{
		Ref: a.Ref(), Host: a.Host, Source: a.Source, TEP: a.TEP, Trigger: a.Trigger,
		Bound: a.BoundAt, Unbound: a.UnboundAt, Fenced: a.FencedAt, End: a.End,
	}
}

// Audit says who held what, when, and from when on no gateway forwarded for it any more (I14). Its key is Ref; a later
// record of the same key replaces the earlier.
type Audit struct {
	Ref
	Host    string
	Source  netip.Addr
	TEP     netip.Addr
	Trigger Trigger
	Bound   time.Time
	Unbound time.Time // zero while bound
	Fenced  time.Time // zero until every gateway is fenced
	End     Reason
}

// Timers are the times of a pool. Zero values are not filled in; start from DefaultTimers.
type Timers struct {
	Valid       time.Duration // of a lease when the host does not ask for another
	MinValid    time.Duration
	MaxValid    time.Duration
	T1, T2      uint32 // permille of the validity: when a host renews, and when it asks anyone
	Reservation time.Duration
	HoldDown    time.Duration // before another host may have the address; 0 for the same host
	Grace       time.Duration // after a restart nothing expires before max(T1 of Valid, Grace)
}

// DefaultTimers returns the times of the reference configuration.
func DefaultTimers() Timers {
	return Timers{
		Valid: 15 * time.Minute, MinValid: 2 * time.Minute, MaxValid: 24 * time.Hour, T1: 500, T2: 800,
		Reservation: 10 * time.Second, HoldDown: 2 * time.Minute, Grace: 10 * time.Minute,
	}
}

// Check says what is wrong with t. Times of seconds are allowed, for labs.
func (t Timers) Check() error {
	switch {
	case t.MinValid < time.Second:
		return fmt.Errorf("minimum validity %s is below 1s", t.MinValid)
	case t.Valid < t.MinValid || t.Valid > t.MaxValid:
		return fmt.Errorf("validity %s is outside %s..%s", t.Valid, t.MinValid, t.MaxValid)
	case t.MaxValid > 30*24*time.Hour:
		return fmt.Errorf("maximum validity %s is above 720h", t.MaxValid)
	case t.T1 < 1 || t.T1 >= t.T2 || t.T2 >= 1000:
		return fmt.Errorf("T1 %d and T2 %d permille: allowed is 0 < T1 < T2 < 1000", t.T1, t.T2)
	case t.Reservation < 0 || t.HoldDown < 0 || t.Grace < 0:
		return fmt.Errorf("reservation %s, hold-down %s and grace %s must not be negative", t.Reservation, t.HoldDown, t.Grace)
	}
	return nil
}

// T1Of returns the time after which a host renews.
func (t Timers) T1Of(valid time.Duration) time.Duration { return valid / 1000 * time.Duration(t.T1) }

// T2Of returns the time after which a host asks any server.
func (t Timers) T2Of(valid time.Duration) time.Duration { return valid / 1000 * time.Duration(t.T2) }

// Clamp returns the validity that a host gets when it asks for want; 0 asks for the default.
func (t Timers) Clamp(want time.Duration) time.Duration {
	if want <= 0 {
		want = t.Valid
	}
	return max(t.MinValid, min(want, t.MaxValid))
}

// Config is what a Core needs to know of its slice.
type Config struct {
	Pool    Pool
	Exclude []netip.Addr // never given out; a lease that is alive is left to end
	// Fixed gives identities an address of their own, which nobody else gets.
	Fixed map[string]netip.Addr
	// PSIDLen, when not 0, lets an address be leased to 1<<PSIDLen hosts at once, by port sets, to hosts that accept them
	// when addresses run short. At most MaxPSIDLen.
	PSIDLen uint8
	Timers  Timers
}

// An Event is one of Bind, Renew, Release, Revoke, Reserve, FenceTo, Tick and Adopt.
type Event interface{ event() }

// Bind asks for a lease. The caller has authenticated Host and proved Source. A holder who binds again from the same
// source renews: same address, same generation. From another source the old lease ends (MOVED) and a new one begins on the
// same address, as soon as the old one is fenced: see Actions.Wait.
type Bind struct {
	Host   string     // identity
	Source netip.Addr // tunnel source, IPv6
	// From, when set, is a lease that the host has proved to be its own, under whatever identity: it takes the address along.
	// Identities that are addresses change with them.
	From    Ref
	Want    Resource // preferred; zero = none
	Valid   time.Duration
	MTU     uint16
	Trigger Trigger
	PortSet bool // the host can do with a port set
	Hurry   bool // another address rather than Actions.Wait
}

// Renew extends a live lease. Source must be the one of the lease; a host that moved binds again.
type Renew struct {
	Host   string
	Ref    Ref
	Source netip.Addr
	Valid  time.Duration
	MTU    uint16
}

// Release gives a lease back. Releasing what is gone already succeeds.
type Release struct {
	Host   string
	Ref    Ref
	Reason Reason // ReasonNone counts as ReasonIdle
}

// Revoke ends a lease by order, or takes an address out of CONFLICT. Gen 0 means whatever is there.
type Revoke struct {
	Ref    Ref
	Reason Reason // ReasonNone counts as ReasonAdmin
}

// Reserve keeps an address ready for a host that is about to bind. It is soft: it is kept in memory, it takes nothing
// from anyone, at most one per host, and any Bind that finds nothing else takes it (I9).
type Reserve struct{ Host string }

// FenceTo says that every revoke at a revision of at most Rev is fenced at this instant: FenceSet.Watermark.
type FenceTo struct{ Rev Rev }

// Tick lets time pass. The service sends it at or after Core.Next.
type Tick struct{}

func (Bind) event()    {}
func (Renew) event()   {}
func (Release) event() {}
func (Revoke) event()  {}
func (Reserve) event() {}
func (FenceTo) event() {}
func (Tick) event()    {}

// Actions is what follows from an event. Nothing of it may leave the service before every Commit is durable. A service
// whose store refuses must throw its cores away and load them again: the cores run ahead of the store.
type Actions struct {
	Commits []Commit // in order of revision; one transaction holds them all
	Grant   *Grant   // answer to Bind and Renew
	Deny    Reason   // answer to Bind, Renew, Release and Revoke; ReasonNone = not refused
	// Wait, when not 0, answers Bind: the address that the host should have is being fenced. Bind again once FenceTo has
	// reached this revision, or with Hurry.
	Wait  Rev
	Ended []Ended // leases that ended
}

// Commit is one event of one address, as the store keeps it.
type Commit struct {
	Rev     Rev
	Address Address
	Audit   Audit  // zero Ref = no audit record changes
	Record  Record // for gateways; KindNone = none, the revision is progress only
}

// Grant is a lease as the host gets it.
type Grant struct {
	Ref
	Host    string
	Source  netip.Addr
	TEP     netip.Addr
	Valid   time.Duration // from the instant of the event
	MTU     uint16
	Renewed bool // the lease was there before
	Rev     Rev  // gateways that applied it forward for this lease
}

// Ended names a lease that ended; its host is told, unless it asked for it.
type Ended struct {
	Ref
	Host   string
	Source netip.Addr
	Reason Reason
}

// Stats counts the addresses of a core by state. Size counts those that can be leased; Cut are leased by port sets, which
// are counted on their own.
type Stats struct {
	Size, Free, Reserved, Bound, Revoking, Hold, Conflict, Cut int

	SetsFree, SetsUsed int
}

// Pressure says how short of addresses a slice is.
type Pressure uint8

// The steps of pressure. Each does what those before it do. Slices of fewer than 16 addresses are small on purpose and
// know only None and Dry.
const (
	PressureNone Pressure = 0
	PressureHigh Pressure = 1 // 85 % in use: validities are halved
	PressureFull Pressure = 2 // 95 %: the shortest validity, no hints, port sets for those who accept them
	PressureDry  Pressure = 3 // nothing is left: Bind is refused
)

// smallSlice is the size below which a slice is small on purpose.
const smallSlice = 16

// Pressure returns how short of addresses the slice is.
func (c *Core) Pressure() Pressure {
	s := c.Stats()
	left := s.Free + s.Reserved
	switch {
	case left == 0 && s.SetsFree == 0:
		return PressureDry
	case s.Size < smallSlice:
		return PressureNone
	case c.short():
		return PressureFull
	case left*20 < s.Size*3+20:
		return PressureHigh
	}
	return PressureNone
}

// Info is one address that is not FREE, with what an operator wants to know.
type Info struct {
	Address
	Left time.Duration // until the state ends by itself; 0 = not by time
}
