package tepd

import (
	"context"
	"encoding/hex"
	"fmt"
	"net/http"
	"net/netip"
	"time"

	"github.com/dstm-project/dstm/bgp"
	"github.com/dstm-project/dstm/dataplane"
	"github.com/dstm-project/dstm/internal/daemon"
	"github.com/dstm-project/dstm/lease"
)

// Status is GET /status, schema dstm.tepd/1.
type Status struct {
	ID         string         `json:"id"`
	Cell       string         `json:"cell"`
	Health     string         `json:"health"`           // down, rising, up, falling
	Reason     string         `json:"reason,omitempty"` // the failure of the last self-test
	Tunnel     netip.Addr     `json:"tunnel_address"`
	Pools      []netip.Prefix `json:"pools"`
	Bindings   int            `json:"bindings"`
	Connected  bool           `json:"connected"`         // a session with the lease service is up
	Problem    string         `json:"problem,omitempty"` // why not
	Synced     bool           `json:"synced"`            // the packet path holds a whole table
	Cluster    string         `json:"cluster,omitempty"`
	Epoch      uint16         `json:"epoch"`
	Session    uint64         `json:"session"`
	AppliedRev uint64         `json:"applied_rev"`
	Digest     string         `json:"digest"`
	DeadlineMS int64          `json:"deadline_ms"` // until the packet path stops forwarding; 0 = it has
	Lagging    bool           `json:"lagging"`     // the lease service says that acknowledgements come late
	Notes      []string       `json:"notes,omitempty"`
}

// Status returns what the gateway is doing.
func (g *Gateway) Status() Status {
	v := g.view.load()
	r := v.replica
	s := Status{
		ID: g.cfg.ID, Cell: g.cfg.Cell, Health: v.health.String(), Reason: v.why, Tunnel: g.cfg.Tunnel.Address,
		Bindings: r.Bindings, Connected: v.connected, Problem: v.problem, Synced: r.Synced,
		Epoch: uint16(r.Epoch), Session: r.Session, AppliedRev: uint64(r.Applied), Digest: fmt.Sprintf("%016x", uint64(r.Digest)),
		DeadlineMS: max(0, time.Duration(r.Deadline)-g.Now()).Milliseconds(), Lagging: v.lagging, Notes: v.notes,
	}
	if r.Cluster != (lease.ClusterID{}) {
		s.Cluster = hex.EncodeToString(r.Cluster[:])
	}
	g.mu.Lock()
	s.Pools = append([]netip.Prefix{}, g.handover.Pools...)
	s.Notes = append(append([]string{}, g.notes...), s.Notes...)
	g.mu.Unlock()
	return s
}

// Ready returns nil when the gateway serves, else why not.
func (g *Gateway) Ready() error {
	v := g.view.load()
	if v.health.announces() {
		return nil
	}
	if v.why == "" {
		return fmt.Errorf("gateway is %s", v.health)
	}
	return fmt.Errorf("gateway is %s: %s", v.health, v.why)
}

// Drops is GET /drops, schema dstm.drops/1: rx = tx + consumed + the sum of drops, in each direction.
type Drops struct {
	Up   Direction `json:"up"`   // host to IPv4
	Down Direction `json:"down"` // IPv4 to host
}

// Direction counts the packets of one direction.
type Direction struct {
	Rx       uint64            `json:"rx"`
	RxBytes  uint64            `json:"rx_bytes"`
	Tx       uint64            `json:"tx"`
	TxBytes  uint64            `json:"tx_bytes"`
	Consumed uint64            `json:"consumed"`
	Drops    map[string]uint64 `json:"drops"`
}

func direction(d dataplane.Direction) Direction {
	out := Direction{Rx: d.Rx, RxBytes: d.RxBytes, Tx: d.Tx, TxBytes: d.TxBytes, Consumed: d.Consumed, Drops: map[string]uint64{}}
	for reason, n := range d.Drops {
		if n > 0 {
			out.Drops[reason.String()] = n
		}
	}
	return out
}

// Drops reads the counters of the packet path.
func (g *Gateway) Drops(ctx context.Context) (Drops, error) {
	c, err := g.Path.Counters(ctx)
	if err != nil {
		return Drops{}, err
	}
	return Drops{Up: direction(c.Up), Down: direction(c.Down)}, nil
}

// Table is GET /table, schema dstm.table/1: what the packet path holds, read from it.
type Table struct {
	Bindings []TableEntry `json:"bindings"`
}

// TableEntry is one binding.
type TableEntry struct {
	Addr   string     `json:"addr"` // with "#psid/psid_len" behind it for a port set
	Host   netip.Addr `json:"host"`
	TEP    netip.Addr `json:"tep"`
	Gen    string     `json:"gen"` // epoch.revision
	MTU    uint16     `json:"mtu"`
	IdleMS *int64     `json:"idle_ms"` // since the last packet from the host; null = none yet
}

// Table reads the packet path's table.
func (g *Gateway) Table(ctx context.Context) (Table, error) {
	es, err := g.Path.Entries(ctx)
	if err != nil {
		return Table{}, err
	}
	t := Table{Bindings: make([]TableEntry, 0, len(es))}
	now := g.Now()
	for _, e := range es {
		te := TableEntry{Addr: e.Resource.String(), Host: e.Host, TEP: e.TEP, Gen: e.Gen.String(), MTU: e.MTU}
		if e.LastSeen > 0 {
			idle := max(0, now-e.LastSeen).Milliseconds()
			te.IdleMS = &idle
		}
		t.Bindings = append(t.Bindings, te)
	}
	return t, nil
}

// BGPStatus is GET /bgp, schema dstm.bgp/1.
type BGPStatus struct {
	Enabled        bool       `json:"enabled"`
	Problem        string     `json:"problem,omitempty"` // of the speaker process
	Implementation string     `json:"implementation,omitempty"`
	Notes          []string   `json:"notes,omitempty"` // why less is announced than there is
	Peers          []BGPPeer  `json:"peers"`
	Routes         []BGPRoute `json:"routes"`
}

// BGPPeer is one neighbour.
type BGPPeer struct {
	Address    netip.Addr `json:"address"`
	ASN        uint32     `json:"asn"`
	State      string     `json:"state"`
	Since      string     `json:"since"` // RFC 3339
	Advertised uint64     `json:"advertised"`
	Updates    uint64     `json:"updates_sent"`
	LastError  string     `json:"last_error,omitempty"`
}

// BGPRoute is one announcement.
type BGPRoute struct {
	Prefix      netip.Prefix `json:"prefix"`
	Communities []string     `json:"communities"`
}

// BGP asks the speaker for its sessions and routes.
func (g *Gateway) BGP(ctx context.Context) BGPStatus {
	v := g.view.load()
	out := BGPStatus{
		Enabled: g.Speakers != nil, Problem: v.speakerErr, Notes: v.notes, Peers: []BGPPeer{}, Routes: []BGPRoute{},
	}
	if !out.Enabled || v.speaker == nil {
		return out
	}
	ctx, cancel := context.WithTimeout(ctx, speakerTimeout)
	defer cancel()
	st, err := v.speaker.Status(ctx)
	if err != nil { // the announcer finds out too, and starts another
		out.Problem = err.Error()
		return out
	}
	out.Implementation = st.Implementation
	for _, p := range st.Peers {
		out.Peers = append(out.Peers, bgpPeer(p))
	}
	for _, r := range st.Routes {
		out.Routes = append(out.Routes, BGPRoute{Prefix: r.Prefix, Communities: append([]string{}, r.Communities...)})
	}
	return out
}

func bgpPeer(p bgp.PeerState) BGPPeer {
	out := BGPPeer{Address: p.Address, ASN: p.ASN, State: p.State, Advertised: p.Advertised, Updates: p.UpdatesSent, LastError: p.LastError}
	if !p.Since.IsZero() {
		out.Since = p.Since.UTC().Format(time.RFC3339)
	}
	return out
}

// Handlers are the gateway's pages for the admin listener.
func (g *Gateway) Handlers() map[string]http.Handler {
	return map[string]http.Handler{
		"GET /status": daemon.JSON("dstm.tepd/1", func(*http.Request) (any, error) { return g.Status(), nil }),
		"GET /drops":  daemon.JSON("dstm.drops/1", func(r *http.Request) (any, error) { return g.Drops(r.Context()) }),
		"GET /table":  daemon.JSON("dstm.table/1", func(r *http.Request) (any, error) { return g.Table(r.Context()) }),
		"GET /bgp":    daemon.JSON("dstm.bgp/1", func(r *http.Request) (any, error) { return g.BGP(r.Context()), nil }),
	}
}
