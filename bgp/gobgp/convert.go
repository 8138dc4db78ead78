package gobgp

import (
	"fmt"
	"net/netip"
	"time"

	api "github.com/osrg/gobgp/v3/api"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/dstm-project/dstm/bgp"
)

// Timers of a session, in seconds. GoBGP's own defaults (120 and 30) leave a gateway unannounced for minutes after a short
// outage of its router.
const (
	connectRetry = 5
	idleHold     = 5
	// After a restart GoBGP announces when all peers have sent their End-of-RIB, or after this (RFC 4724 section 4.1). What
	// peers send does not matter to us, so it is as short as can be.
	deferRestarted = 1
)

var (
	ipv4Unicast = &api.Family{Afi: api.Family_AFI_IP, Safi: api.Family_SAFI_UNICAST}
	ipv6Unicast = &api.Family{Afi: api.Family_AFI_IP6, Safi: api.Family_SAFI_UNICAST}
)

// apiPeer returns a neighbour as GoBGP has it. IPv6 sessions carry both families, IPv4 ones with an IPv6 next hop (RFC
// 8950); IPv4 sessions carry IPv4 only.
func apiPeer(p bgp.Peer) *api.Peer {
	out := &api.Peer{
		Conf: &api.PeerConf{NeighborAddress: p.Address.String(), PeerAsn: p.ASN, AuthPassword: p.Password},
		Timers: &api.Timers{Config: &api.TimersConfig{
			HoldTime: uint64(p.HoldTime / time.Second), KeepaliveInterval: uint64(p.HoldTime / time.Second / 3),
			ConnectRetry: connectRetry, IdleHoldTimeAfterReset: idleHold,
		}},
		Transport: &api.Transport{RemotePort: uint32(p.Port)},
	}
	if p.LocalAddress.IsValid() {
		out.Transport.LocalAddress = p.LocalAddress.String()
	}
	families := []*api.Family{ipv4Unicast}
	if p.Address.Is6() {
		families = append(families, ipv6Unicast)
	}
	for _, f := range families {
		out.AfiSafis = append(out.AfiSafis, &api.AfiSafi{
			Config:            &api.AfiSafiConfig{Family: f, Enabled: true},
			MpGracefulRestart: &api.MpGracefulRestart{Config: &api.MpGracefulRestartConfig{Enabled: p.GracefulRestart}},
		})
	}
	if p.GracefulRestart {
		// A new process always has restarted as far as peers can tell: one that kept our routes goes on with them, and
		// to one that did not it makes no difference.
		out.GracefulRestart = &api.GracefulRestart{
			Enabled: true, RestartTime: uint32(p.RestartTime / time.Second), DeferralTime: deferRestarted, LocalRestarting: true,
		}
	}
	return out
}

// apiPath returns an announcement as GoBGP has it. An unspecified next hop becomes the session's own address.
func apiPath(r bgp.Route) (*api.Path, error) {
	family, nextHop := ipv4Unicast, "0.0.0.0"
	if r.Prefix.Addr().Is6() {
		family, nextHop = ipv6Unicast, "::"
	}
	if r.NextHop.IsValid() {
		nextHop = r.NextHop.String()
	}
	var err error
	wrap := func(m proto.Message) *anypb.Any {
		a, e := anypb.New(m)
		if e != nil && err == nil {
			err = e
		}
		return a
	}
	nlri := wrap(&api.IPAddressPrefix{PrefixLen: uint32(r.Prefix.Bits()), Prefix: r.Prefix.Addr().String()})
	attrs := []*anypb.Any{wrap(&api.OriginAttribute{})} // 0 = IGP
	if family == ipv6Unicast || r.NextHop.Is6() {
		attrs = append(attrs, wrap(&api.MpReachNLRIAttribute{Family: family, NextHops: []string{nextHop}, Nlris: []*anypb.Any{nlri}}))
	} else {
		attrs = append(attrs, wrap(&api.NextHopAttribute{NextHop: nextHop}))
	}
	if r.MED != 0 {
		attrs = append(attrs, wrap(&api.MultiExitDiscAttribute{Med: r.MED}))
	}
	if r.LocalPref != 0 {
		attrs = append(attrs, wrap(&api.LocalPrefAttribute{LocalPref: r.LocalPref}))
	}
	var cs []uint32
	for _, c := range r.Communities {
		v, err := bgp.ParseCommunity(c)
		if err != nil {
			return nil, err
		}
		cs = append(cs, v)
	}
	if len(cs) > 0 {
		attrs = append(attrs, wrap(&api.CommunitiesAttribute{Communities: cs}))
	}
	var ls []*api.LargeCommunity
	for _, c := range r.LargeCommunities {
		v, err := bgp.ParseLargeCommunity(c)
		if err != nil {
			return nil, err
		}
		ls = append(ls, &api.LargeCommunity{GlobalAdmin: v[0], LocalData1: v[1], LocalData2: v[2]})
	}
	if len(ls) > 0 {
		attrs = append(attrs, wrap(&api.LargeCommunitiesAttribute{Communities: ls}))
	}
	if err != nil {
		return nil, fmt.Errorf("encode %s: %w", r.Prefix, err)
	}
	return &api.Path{Family: family, Nlri: nlri, Pattrs: attrs}, nil
}

func (s *Speaker) peerState(p *api.Peer) bgp.PeerState {
	st := p.GetState()
	out := bgp.PeerState{ASN: st.GetPeerAsn(), State: st.GetSessionState().String(), UpdatesSent: st.GetMessages().GetSent().GetUpdate()}
	out.Address, _ = netip.ParseAddr(st.GetNeighborAddress())
	out.LastError = s.log.lastError(st.GetNeighborAddress())
	times := p.GetTimers().GetState()
	if st.GetSessionState() != api.PeerState_ESTABLISHED {
		if t := times.GetDowntime(); t.GetSeconds() > 0 {
			out.Since = t.AsTime()
		}
		return out
	}
	out.Since = times.GetUptime().AsTime()
	// GoBGP's own count has the End-of-RIB markers in it, and families that the peer does not speak.
	for _, f := range negotiated(st.GetRemoteCap()) {
		for prefix := range s.paths {
			if prefix.Addr().Is4() == (f == api.Family_AFI_IP) {
				out.Advertised++
			}
		}
	}
	return out
}

// negotiated returns the unicast families among the capabilities of a peer (RFC 4760).
func negotiated(caps []*anypb.Any) []api.Family_Afi {
	var out []api.Family_Afi
	for _, c := range caps {
		var mp api.MultiProtocolCapability
		if c.MessageIs(&mp) && c.UnmarshalTo(&mp) == nil && mp.GetFamily().GetSafi() == api.Family_SAFI_UNICAST {
			out = append(out, mp.GetFamily().GetAfi())
		}
	}
	return out
}
