// Package bgp is the seam between the gateway and whatever speaks BGP for it: the desired set of routes, the state of
// the peers, and the interface that speakers implement. It imports no BGP library.
package bgp

import (
	"context"
	"errors"
	"net/netip"
	"time"
)

// Route is one announcement.
type Route struct {
	Prefix           netip.Prefix
	NextHop          netip.Addr // zero = the session's own local address
	Communities      []string   // "asn:value" or a well-known name (RFC 1997)
	LargeCommunities []string   // "global:local1:local2" (RFC 8092)
	MED              uint32     // 0 = not sent
	LocalPref        uint32     // 0 = not sent
}

// RouteSet is the whole desired set; what is not in it is withdrawn.
type RouteSet struct {
	Version  uint64
	Routes   []Route
	NotAfter time.Time // zero = none; the speaker withdraws everything when it passes
}

// Peer is one neighbour. The speaker dials; it listens on nothing.
type Peer struct {
	Address         netip.Addr
	LocalAddress    netip.Addr // zero = chosen by the kernel
	Port            uint16     // 0 = 179
	ASN             uint32
	HoldTime        time.Duration // 3 s .. 65535 s
	Password        string        // TCP-MD5 (RFC 2385); never logged
	GracefulRestart bool          // RFC 4724
	RestartTime     time.Duration
}

// Config is the whole configuration of a speaker.
type Config struct {
	ASN      uint32
	RouterID netip.Addr // IPv4
	Peers    []Peer
	Allow    []netip.Prefix // nothing outside ever leaves (invariant I11)
	Orphan   time.Duration  // silence of tepd after which the speaker drains, withdraws and exits
}

// Refused is a route that the guard kept back, with the sentence that says why.
type Refused struct {
	Prefix netip.Prefix
	Reason string
}

// Advertised is what is announced after a Set without error; after one with an error, Status knows.
type Advertised struct {
	Prefixes []netip.Prefix
	Refused  []Refused
}

// PeerState is one neighbour as `dstm bgp` shows it.
type PeerState struct {
	Address     netip.Addr
	ASN         uint32
	State       string // IDLE, CONNECT, ACTIVE, OPENSENT, OPENCONFIRM, ESTABLISHED
	Since       time.Time
	LastError   string
	Advertised  uint64
	UpdatesSent uint64
}

// Status is what a speaker says of itself.
type Status struct {
	Configured     bool
	Version        uint64 // of the RouteSet in force
	Routes         []Route
	Peers          []PeerState
	BeatAge        time.Duration
	Implementation string
}

// CloseMode says what happens to the routes when a speaker stops.
type CloseMode uint8

// The close modes.
const (
	Withdraw CloseMode = 1 // withdraw, Cease, exit
	Keep     CloseMode = 2 // leave without Cease: peers keep the routes for the restart time
	Drain    CloseMode = 3 // GRACEFUL_SHUTDOWN (RFC 8326), wait, withdraw, exit
)

// ErrRestart means that a Configure asks for what a running speaker cannot change, such as its autonomous system: close it
// and start another.
var ErrRestart = errors.New("the speaker must be started anew for this")

// Speaker announces routes. Every call must return within its context's deadline. Set is idempotent; the first Set
// opens the sessions, so that with graceful restart every path stands before the first OPEN.
type Speaker interface {
	Configure(ctx context.Context, c Config) error
	Set(ctx context.Context, s RouteSet) (Advertised, error)
	Status(ctx context.Context) (Status, error)
	Close(ctx context.Context, mode CloseMode) error
}

// Remote is a speaker in another process. It counts itself as an orphan when it hears nothing for Config.Orphan.
type Remote interface {
	Speaker
	Beat(ctx context.Context) error
}
