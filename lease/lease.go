// Package lease holds the rules of DSTM's leases and nothing else: no I/O, no clock, no goroutine, standard library only.
//
// Everything that the lease service, the gateways and the host agents must agree on is a value of this package:
// what is leased (Resource), under which number (Gen), to whom (Binding), from where (Pool) and why not (Reason).
package lease

import (
	"cmp"
	"fmt"
	"net/netip"
)

// Rev is a store revision: one per event of the state machine, growing by one, starting at 1.
type Rev uint64

// Epoch counts restores of the store. It is part of every generation, so that a restore never repeats one.
type Epoch uint16

// sessions is the number after which the sessions of an epoch begin. The first epoch begins at 0; a gateway takes none for
// new that is not above those it had before a restore.
func (e Epoch) sessions() uint64 { return uint64(max(e, 1)-1) << 32 }

// Gen is a generation: epoch << 48 | revision of the bind. It grows strictly per address (invariant I3).
type Gen uint64

const revBits = 48

// MaxRev is the largest revision that fits into a generation.
const MaxRev Rev = 1<<revBits - 1

// MakeGen builds the generation of a bind committed at rev in epoch e. It panics when rev is above MaxRev:
// at a million binds a second that is nine years away, and a wrapped generation would be a double lease.
func MakeGen(e Epoch, rev Rev) Gen {
	if rev > MaxRev {
		panic(fmt.Sprintf("lease: revision %d does not fit into %d bits", rev, revBits))
	}
	return Gen(uint64(e)<<revBits | uint64(rev))
}

// Epoch returns the epoch of the generation.
func (g Gen) Epoch() Epoch { return Epoch(g >> revBits) }

// Rev returns the store revision of the bind.
func (g Gen) Rev() Rev { return Rev(g) & MaxRev }

// String returns epoch.revision, as logs and tools show it.
func (g Gen) String() string { return fmt.Sprintf("%d.%d", g.Epoch(), g.Rev()) }

// Resource is what a lease gives: a whole IPv4 address (PSIDLen 0) or one port set of it (RFC 7597 section 5.1).
type Resource struct {
	Addr    netip.Addr // IPv4
	PSIDLen uint8      // 0..MaxPSIDLen
	PSID    uint16     // < 1<<PSIDLen
}

// Whole returns the resource of a whole address.
func Whole(a netip.Addr) Resource { return Resource{Addr: a} }

// Valid reports whether r can name a resource at all; the error says what is wrong.
func (r Resource) Valid() error {
	switch {
	case !r.Addr.Is4():
		return fmt.Errorf("resource address %s is not an IPv4 address", r.Addr)
	case r.PSIDLen > MaxPSIDLen:
		return fmt.Errorf("psid_len %d is above %d", r.PSIDLen, MaxPSIDLen)
	case uint32(r.PSID) >= 1<<r.PSIDLen:
		return fmt.Errorf("psid %d does not fit into psid_len %d", r.PSID, r.PSIDLen)
	}
	return nil
}

// String returns the address, with "#psid/psid_len" behind it for a port set.
func (r Resource) String() string {
	if r.PSIDLen == 0 {
		return r.Addr.String()
	}
	return fmt.Sprintf("%s#%d/%d", r.Addr, r.PSID, r.PSIDLen)
}

// Compare orders resources by address, then port set.
func (r Resource) Compare(o Resource) int {
	return cmp.Or(r.Addr.Compare(o.Addr), cmp.Compare(r.PSIDLen, o.PSIDLen), cmp.Compare(r.PSID, o.PSID))
}

// Binding is a lease as a gateway sees it.
type Binding struct {
	Resource
	Host netip.Addr // the host's tunnel source, IPv6
	TEP  netip.Addr // the gateway address the host sends to, IPv6
	Gen  Gen
	MTU  uint16 // inner bytes that fit through this host's tunnel; 0 = the gateway's own
}

// Pool is a prefix that is leased out, as gateways learn it.
type Pool struct {
	Name   string
	Prefix netip.Prefix // IPv4
	TEP    netip.Addr   // IPv6 address of the gateways that serve it
}

// Ref names one lease.
type Ref struct {
	Resource
	Gen Gen
}

// String returns resource@generation.
func (r Ref) String() string { return r.Resource.String() + "@" + r.Gen.String() }

// Trigger says what made a host ask for a lease.
type Trigger uint8

// The triggers; numbers as in dstm.lease.v1.Trigger.
const (
	TriggerUnspecified Trigger = 0
	TriggerDNS         Trigger = 1
	TriggerPacket      Trigger = 2
	TriggerSocket      Trigger = 3
	TriggerManual      Trigger = 4
)

// String returns the trigger's metric label.
func (t Trigger) String() string {
	switch t {
	case TriggerDNS:
		return "dns"
	case TriggerPacket:
		return "packet"
	case TriggerSocket:
		return "socket"
	case TriggerManual:
		return "manual"
	}
	return "unspecified"
}

// Reason says why a lease was refused or ended.
type Reason uint8

// The reasons; numbers as in dstm.lease.v1.Reason.
const (
	ReasonNone            Reason = 0
	ReasonPoolDry         Reason = 1  // no free address
	ReasonQuota           Reason = 2  // the identity or its /64 has all it may have
	ReasonNotRegistered   Reason = 3  // no Attend stream
	ReasonNotAllowed      Reason = 4  // wrong role, or identity not allowed here
	ReasonBadSource       Reason = 5  // tunnel source not proven or outside the identity's prefixes
	ReasonStaleGeneration Reason = 6  // the lease named is not the live one
	ReasonExpired         Reason = 7  // validity ran out
	ReasonIdle            Reason = 8  // released by the host as idle
	ReasonAdmin           Reason = 9  // an operator's order
	ReasonMoved           Reason = 10 // the host went to another tunnel source
	ReasonPolicy          Reason = 11 // an admission policy said no
	ReasonNoTEP           Reason = 12 // no gateway serves the pool
	ReasonDegradedStore   Reason = 13 // the store takes no writes
)

var reasonNames = [...]string{
	"NONE", "POOL_DRY", "QUOTA", "NOT_REGISTERED", "NOT_ALLOWED", "BAD_SOURCE", "STALE_GENERATION", "EXPIRED",
	"IDLE", "ADMIN", "MOVED", "POLICY", "NO_TEP", "DEGRADED_STORE",
}

// String returns the reason's name as it stands in ErrorInfo, logs and JSON.
func (r Reason) String() string {
	if int(r) < len(reasonNames) {
		return reasonNames[r]
	}
	return fmt.Sprintf("REASON_%d", uint8(r))
}
