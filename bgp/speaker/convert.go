package speaker

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"time"

	speakerv1 "github.com/dstm-project/dstm/api/speaker/v1"
	"github.com/dstm-project/dstm/bgp"
)

func configToWire(c bgp.Config) *speakerv1.ConfigureRequest {
	out := &speakerv1.ConfigureRequest{Asn: c.ASN, RouterId: addrToWire(c.RouterID), OrphanMs: millis(c.Orphan)}
	for _, p := range c.Allow {
		out.Allow = append(out.Allow, p.String())
	}
	for _, p := range c.Peers {
		out.Peers = append(out.Peers, &speakerv1.Peer{
			Address: addrToWire(p.Address), LocalAddress: addrToWire(p.LocalAddress), Port: uint32(p.Port), Asn: p.ASN,
			HoldMs: millis(p.HoldTime), Password: p.Password, GracefulRestart: p.GracefulRestart, RestartMs: millis(p.RestartTime),
		})
	}
	return out
}

func configFromWire(m *speakerv1.ConfigureRequest) (bgp.Config, error) {
	c := bgp.Config{ASN: m.GetAsn(), Orphan: duration(m.GetOrphanMs())}
	var err error
	if c.RouterID, err = netip.ParseAddr(m.GetRouterId()); err != nil || !c.RouterID.Is4() {
		return c, fmt.Errorf("router_id %q: want an IPv4 address", m.GetRouterId())
	}
	if c.ASN == 0 {
		return c, errors.New("asn 0: want an autonomous system number")
	}
	if c.Orphan <= 0 {
		return c, fmt.Errorf("orphan_ms %d: want a time", m.GetOrphanMs())
	}
	for _, s := range m.GetAllow() {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return c, fmt.Errorf("allow: %w", err)
		}
		c.Allow = append(c.Allow, p)
	}
	for _, m := range m.GetPeers() {
		p, err := peerFromWire(m)
		if err != nil {
			return c, err
		}
		c.Peers = append(c.Peers, p)
	}
	return c, nil
}

func peerFromWire(m *speakerv1.Peer) (bgp.Peer, error) {
	p := bgp.Peer{
		Port: uint16(m.GetPort()), ASN: m.GetAsn(), HoldTime: duration(m.GetHoldMs()), Password: m.GetPassword(),
		GracefulRestart: m.GetGracefulRestart(), RestartTime: duration(m.GetRestartMs()),
	}
	var err error
	if p.Address, err = netip.ParseAddr(m.GetAddress()); err != nil {
		return p, fmt.Errorf("peer address: %w", err)
	}
	if p.LocalAddress, err = addrFromWire(m.GetLocalAddress()); err != nil {
		return p, fmt.Errorf("peer %s: local_address: %w", p.Address, err)
	}
	if m.GetPort() > math.MaxUint16 {
		return p, fmt.Errorf("peer %s: port %d: want 0 to 65535", p.Address, m.GetPort())
	}
	return p, nil
}

func setToWire(s bgp.RouteSet) *speakerv1.SetRequest {
	out := &speakerv1.SetRequest{Version: s.Version, Routes: routesToWire(s.Routes)}
	if !s.NotAfter.IsZero() {
		out.NotAfterUnixMs = s.NotAfter.UnixMilli()
	}
	return out
}

func setFromWire(m *speakerv1.SetRequest) (bgp.RouteSet, error) {
	routes, err := routesFromWire(m.GetRoutes())
	s := bgp.RouteSet{Version: m.GetVersion(), Routes: routes}
	if ms := m.GetNotAfterUnixMs(); ms != 0 {
		s.NotAfter = time.UnixMilli(ms)
	}
	return s, err
}

func routesToWire(rs []bgp.Route) []*speakerv1.Route {
	out := make([]*speakerv1.Route, 0, len(rs))
	for _, r := range rs {
		out = append(out, &speakerv1.Route{
			Prefix: r.Prefix.String(), NextHop: addrToWire(r.NextHop), Communities: r.Communities,
			LargeCommunities: r.LargeCommunities, Med: r.MED, LocalPref: r.LocalPref,
		})
	}
	return out
}

func routesFromWire(ms []*speakerv1.Route) ([]bgp.Route, error) {
	var out []bgp.Route
	for _, m := range ms {
		r := bgp.Route{
			Communities: m.GetCommunities(), LargeCommunities: m.GetLargeCommunities(), MED: m.GetMed(), LocalPref: m.GetLocalPref(),
		}
		var err error
		if r.Prefix, err = netip.ParsePrefix(m.GetPrefix()); err != nil {
			return nil, fmt.Errorf("route: %w", err)
		}
		if r.NextHop, err = addrFromWire(m.GetNextHop()); err != nil {
			return nil, fmt.Errorf("route %s: next hop: %w", r.Prefix, err)
		}
		out = append(out, r)
	}
	return out, nil
}

func advertisedToWire(a bgp.Advertised) *speakerv1.SetReply {
	out := &speakerv1.SetReply{}
	for _, p := range a.Prefixes {
		out.Advertised = append(out.Advertised, p.String())
	}
	for _, r := range a.Refused {
		out.Refused = append(out.Refused, &speakerv1.Refused{Prefix: r.Prefix.String(), Reason: r.Reason})
	}
	return out
}

func advertisedFromWire(m *speakerv1.SetReply) (bgp.Advertised, error) {
	var out bgp.Advertised
	for _, s := range m.GetAdvertised() {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return out, fmt.Errorf("advertised: %w", err)
		}
		out.Prefixes = append(out.Prefixes, p)
	}
	for _, r := range m.GetRefused() {
		p, _ := netip.ParsePrefix(r.GetPrefix()) // what was refused may be no prefix at all
		out.Refused = append(out.Refused, bgp.Refused{Prefix: p, Reason: r.GetReason()})
	}
	return out, nil
}

func statusToWire(s bgp.Status) *speakerv1.StatusReply {
	out := &speakerv1.StatusReply{
		Routes: routesToWire(s.Routes), Version: s.Version, BeatAgeMs: millis(s.BeatAge), Implementation: s.Implementation,
		Configured: s.Configured,
	}
	for _, p := range s.Peers {
		m := &speakerv1.PeerState{
			Address: addrToWire(p.Address), Asn: p.ASN, State: p.State, LastError: p.LastError, Advertised: p.Advertised,
			UpdatesSent: p.UpdatesSent,
		}
		if !p.Since.IsZero() {
			m.SinceUnixMs = p.Since.UnixMilli()
		}
		out.Peers = append(out.Peers, m)
	}
	return out
}

func statusFromWire(m *speakerv1.StatusReply) (bgp.Status, error) {
	routes, err := routesFromWire(m.GetRoutes())
	s := bgp.Status{
		Routes: routes, Version: m.GetVersion(), BeatAge: duration(m.GetBeatAgeMs()), Implementation: m.GetImplementation(),
		Configured: m.GetConfigured(),
	}
	if err != nil {
		return s, err
	}
	for _, m := range m.GetPeers() {
		p := bgp.PeerState{
			ASN: m.GetAsn(), State: m.GetState(), LastError: m.GetLastError(), Advertised: m.GetAdvertised(), UpdatesSent: m.GetUpdatesSent(),
		}
		if p.Address, err = addrFromWire(m.GetAddress()); err != nil {
			return s, fmt.Errorf("peer: %w", err)
		}
		if ms := m.GetSinceUnixMs(); ms != 0 {
			p.Since = time.UnixMilli(ms)
		}
		s.Peers = append(s.Peers, p)
	}
	return s, nil
}

// The close modes on the wire. One that is not known is not among them.
var modes = map[bgp.CloseMode]speakerv1.CloseRequest_Mode{
	bgp.Withdraw: speakerv1.CloseRequest_WITHDRAW, bgp.Keep: speakerv1.CloseRequest_KEEP, bgp.Drain: speakerv1.CloseRequest_DRAIN,
}

func modeFromWire(m speakerv1.CloseRequest_Mode) (bgp.CloseMode, error) {
	for k, v := range modes {
		if v == m {
			return k, nil
		}
	}
	return 0, fmt.Errorf("close mode %d: want 1 (withdraw), 2 (keep) or 3 (drain)", m)
}

// addrToWire writes the zero address as nothing.
func addrToWire(a netip.Addr) string {
	if !a.IsValid() {
		return ""
	}
	return a.String()
}

func addrFromWire(s string) (netip.Addr, error) {
	if s == "" {
		return netip.Addr{}, nil
	}
	return netip.ParseAddr(s)
}

func millis(d time.Duration) uint64 {
	if d < 0 {
		return 0
	}
	return uint64(d / time.Millisecond)
}

// duration is at most a century, which no sum of durations and clocks here overflows.
func duration(ms uint64) time.Duration {
	const century = 100 * 365 * 24 * time.Hour
	return time.Duration(min(ms, uint64(century/time.Millisecond))) * time.Millisecond
}
