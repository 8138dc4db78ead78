package tepd

import (
	"fmt"
	"math"
	"net/netip"
	"path/filepath"
	"time"

	"github.com/dstm-project/dstm/bgp"
	"github.com/dstm-project/dstm/internal/config"
	"github.com/dstm-project/dstm/internal/daemon"
)

// LoadConfig reads and checks the file at path. Errors name file, line and column.
func LoadConfig(path string) (*Config, error) { return config.Load(path, check) }

// ParseConfig is LoadConfig for data at hand.
func ParseConfig(name string, data []byte) (*Config, error) { return config.Parse(name, data, check) }

func check(c *Config, r *config.Report) {
	if c.Cell == "" {
		r.Errorf("$.cell", "cell is missing: want the name of the lease service's cell")
	}
	if c.ID == "" {
		r.Errorf("$.id", "id is missing: want the name under which the lease service knows this gateway")
	}
	checkService(&c.LeaseService, r)
	checkTunnel(&c.Tunnel, r)
	checkPeers(c, r)
	if c.BGP.Enabled() {
		checkBGP(c, r)
	}
	checkHealth(&c.Health, r)
	if !filepath.IsAbs(c.Paths.Run) {
		r.Errorf("$.paths.run", "run %q: want an absolute path", c.Paths.Run)
	}
	if !filepath.IsAbs(c.Paths.BPF) {
		r.Errorf("$.paths.bpf", "bpf %q: want an absolute path", c.Paths.BPF)
	}
	if err := daemon.CheckAdmin(c.Admin); err != nil {
		r.Errorf("$.admin", "%v", err)
	}
	if err := c.Log.Check(); err != nil {
		r.Errorf("$.log", "%v", err)
	}
}

func checkService(s *LeaseService, r *config.Report) {
	if len(s.Servers) == 0 {
		r.Errorf("$.lease_service.servers", "servers is missing: want one or more of the form \"[2001:db8::1]:3545\"")
	}
	for i, ap := range s.Servers {
		if !isIPv6(ap.Addr()) && !ap.Addr().IsLoopback() || ap.Port() == 0 {
			r.Errorf(fmt.Sprintf("$.lease_service.servers[%d]", i), "server %s: want an IPv6 address and a port", ap)
		}
	}
	if s.Name == "" {
		r.Errorf("$.lease_service.name", "name is missing: want the name in the lease service's certificate")
	}
	for _, f := range []struct{ key, value string }{{"cert", s.TLS.Cert}, {"key", s.TLS.Key}, {"ca", s.TLS.CA}} {
		if f.value == "" {
			r.Errorf("$.lease_service.tls."+f.key, "%s is missing: want the path of a PEM file", f.key)
		}
	}
}

func checkPeers(c *Config, r *config.Report) {
	l := c.Peers.Listen
	switch {
	case !l.IsValid():
	case !isIPv6(l.Addr()) || l.Addr().IsUnspecified() || l.Port() == 0:
		r.Errorf("$.peers.listen", "listen %s: want an IPv6 address of this gateway's own, at which the others reach it, and a port", l)
	case l.Addr() == c.Tunnel.Address:
		r.Errorf("$.peers.listen", "listen %s is the tunnel address: a question would reach any gateway; want an address of this one", l)
	}
}

func checkTunnel(t *Tunnel, r *config.Report) {
	if !isIPv6(t.Address) || !t.Address.IsGlobalUnicast() {
		r.Errorf("$.tunnel.address", "address %s: want the global IPv6 address at which tunnels end", show(t.Address))
	}
	if !t.IPv4Address.Is4() || !t.IPv4Address.IsGlobalUnicast() {
		r.Errorf("$.tunnel.ipv4_address", "ipv4_address %s: want an IPv4 address of this gateway's own", show(t.IPv4Address))
	}
	if !interfaceName(t.Device) || t.Device == "lo" {
		r.Errorf("$.tunnel.device", "device %q: want an interface name of 1 to 15 characters", t.Device)
	}
	for i, u := range t.Uplinks {
		if !interfaceName(u) || u == t.Device {
			r.Errorf(fmt.Sprintf("$.tunnel.uplinks[%d]", i), "uplink %q: want an interface name of 1 to 15 characters, other than tunnel.device", u)
		}
	}
	if t.Engine != "auto" && t.Engine != "tc" {
		r.Errorf("$.tunnel.engine", "engine %q: want auto or tc", t.Engine)
	}
	if t.HopLimit == 0 {
		r.Errorf("$.tunnel.hop_limit", "hop_limit 0: want 1 to 255")
	}
	if t.MTU != 0 && t.MTU < 1240 {
		r.Errorf("$.tunnel.mtu", "mtu %d: want 1240 (what fits through every IPv6 link) or more, or 0 for the smallest uplink's - 40", t.MTU)
	}
}

func checkBGP(c *Config, r *config.Report) {
	b := &c.BGP
	if b.ASN == 0 {
		r.Errorf("$.bgp.asn", "asn is missing: want this gateway's autonomous system number")
	}
	if !b.RouterID.IsValid() {
		b.RouterID = c.Tunnel.IPv4Address
	} else if !b.RouterID.Is4() {
		r.Errorf("$.bgp.router_id", "router_id %s: want an IPv4 address", b.RouterID)
	}
	if len(b.AllowAdvertise) == 0 {
		r.Errorf("$.bgp.allow_advertise", "allow_advertise is missing: want the prefixes that may be announced; nothing else ever is")
	}
	for i, p := range b.AllowAdvertise {
		if p != p.Masked() {
			r.Errorf(fmt.Sprintf("$.bgp.allow_advertise[%d]", i), "prefix %s has host bits set: want %s", p, p.Masked())
		}
	}
	if tep := hostPrefix(c.Tunnel.Address); b.Announce.TEP && isIPv6(c.Tunnel.Address) && !bgp.Covered(tep, b.AllowAdvertise) {
		r.Errorf("$.bgp.allow_advertise", "tunnel address %s is outside of allow_advertise: add it, or set announce.tep to false", tep)
	}
	if len(b.Peers) == 0 {
		r.Errorf("$.bgp.peers", "peers is missing: want one or more neighbours, or leave out bgp")
	}
	for i := range b.Peers {
		checkPeer(fmt.Sprintf("$.bgp.peers[%d]", i), &b.Peers[i], r)
	}
	checkAnnounce(&b.Announce, r)
	checkSpeaker(&b.Speaker, r)
}

func checkPeer(at string, p *Peer, r *config.Report) {
	if !p.Address.IsValid() || p.Address.IsUnspecified() {
		r.Errorf(at+".address", "address %s: want the neighbour's address", show(p.Address))
	}
	if p.ASN == 0 {
		r.Errorf(at+".asn", "asn is missing: want the neighbour's autonomous system number")
	}
	if p.HoldTime != 0 && (p.HoldTime < 3*time.Second || p.HoldTime > math.MaxUint16*time.Second || p.HoldTime%time.Second != 0) {
		r.Errorf(at+".hold_time", "hold_time %s: want whole seconds from 3s to 65535s (RFC 4271 section 4.2)", p.HoldTime)
	}
	// RFC 4724 section 3: 12 bits.
	if p.RestartTime < 0 || p.RestartTime > 4095*time.Second || p.RestartTime%time.Second != 0 {
		r.Errorf(at+".restart_time", "restart_time %s: want whole seconds up to 4095s (RFC 4724 section 3)", p.RestartTime)
	}
}

func checkAnnounce(a *Announce, r *config.Report) {
	if a.Pool != PoolAggregate && a.Pool != PoolLease {
		r.Errorf("$.bgp.announce.pool", "pool %q: want %s or %s", a.Pool, PoolAggregate, PoolLease)
	}
	if a.MaxHostRoutes < 1 || a.MaxHostRoutes > 1_000_000 {
		r.Errorf("$.bgp.announce.max_host_routes", "max_host_routes %d: want 1 to 1000000", a.MaxHostRoutes)
	}
	for i, c := range a.Community {
		if _, err := bgp.ParseCommunity(c); err != nil {
			r.Errorf(fmt.Sprintf("$.bgp.announce.community[%d]", i), "%v", err)
		}
	}
}

func checkSpeaker(s *SpeakerConfig, r *config.Report) {
	if s.Type != "gobgp" {
		r.Errorf("$.bgp.speaker.type", "type %q: want gobgp, or give the path of another speaker", s.Type)
	}
	switch {
	case s.Path == "" && s.SHA256 != "":
		r.Errorf("$.bgp.speaker.sha256", "sha256 without path: want both or neither")
	case s.Path != "" && !filepath.IsAbs(s.Path):
		r.Errorf("$.bgp.speaker.path", "path %q: want an absolute path", s.Path)
	case s.Path != "":
		if _, err := s.Digest(); err != nil {
			r.Errorf("$.bgp.speaker.sha256", "%v", err)
		}
	}
	if s.Grace < 0 || s.Grace > time.Hour {
		r.Errorf("$.bgp.speaker.grace", "grace %s: want 0s to 1h", s.Grace)
	}
	if s.Orphan < time.Second || s.Orphan > 24*time.Hour {
		r.Errorf("$.bgp.speaker.orphan", "orphan %s: want 1s to 24h", s.Orphan)
	}
}

func checkHealth(h *HealthConfig, r *config.Report) {
	if h.Interval < 10*time.Millisecond || h.Interval > time.Minute {
		r.Errorf("$.health.interval", "interval %s: want 10ms to 1m", h.Interval)
	}
	if h.Rise < 1 || h.Rise > 100 {
		r.Errorf("$.health.rise", "rise %d: want 1 to 100", h.Rise)
	}
	if h.Fall < 1 || h.Fall > 100 {
		r.Errorf("$.health.fall", "fall %d: want 1 to 100", h.Fall)
	}
	if !h.Exit.Is4() {
		r.Errorf("$.health.exit", "exit %s: want an IPv4 address", show(h.Exit))
	}
}

func isIPv6(a netip.Addr) bool { return a.Is6() && !a.Is4In6() }

func hostPrefix(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// show prints an address that may be missing.
func show(a netip.Addr) string {
	if !a.IsValid() {
		return "is missing"
	}
	return a.String()
}

// interfaceName reports whether the kernel takes s (dev_valid_name).
func interfaceName(s string) bool {
	if s == "" || len(s) > 15 || s == "." || s == ".." {
		return false
	}
	for _, c := range []byte(s) {
		if c <= ' ' || c == '/' || c == ':' || c > '~' {
			return false
		}
	}
	return true
}
