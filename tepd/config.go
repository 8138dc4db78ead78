package tepd

import (
	"encoding/hex"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"time"

	"github.com/dstm-project/dstm/bgp"
	"github.com/dstm-project/dstm/internal/daemon"
	"github.com/dstm-project/dstm/internal/tlsid"
)

// Config is tepd.yaml.
type Config struct {
	Cell         string           `yaml:"cell"`
	ID           string           `yaml:"id"` // of this gateway; the lease service's `teps` must name it
	LeaseService LeaseService     `yaml:"lease_service"`
	Peers        PeersConfig      `yaml:"peers"`
	Tunnel       Tunnel           `yaml:"tunnel"`
	BGP          BGP              `yaml:"bgp"`
	Health       HealthConfig     `yaml:"health"`
	Paths        Paths            `yaml:"paths"`
	Admin        netip.AddrPort   `yaml:"admin"`
	Log          daemon.LogConfig `yaml:"log"`
}

// PeersConfig is how the gateways of a cell ask each other whether the lease service is gone for all of them.
type PeersConfig struct {
	Listen netip.AddrPort `yaml:"listen"` // of this gateway, IPv6, never the anycast address; not set = neither asks nor answers
}

// LeaseService says where the lease service is and who we are to it.
type LeaseService struct {
	Servers []netip.AddrPort `yaml:"servers"`
	Name    string           `yaml:"name"` // in its certificate
	TLS     tlsid.Files      `yaml:"tls"`
}

// Tunnel says where tunnels end and how packets leave.
type Tunnel struct {
	Address     netip.Addr `yaml:"address"` // IPv6, anycast: every gateway of a cell has the same one
	Uplinks     []string   `yaml:"uplinks"` // empty = every interface with an IPv6 route
	Device      string     `yaml:"device"`
	IPv4Address netip.Addr `yaml:"ipv4_address"` // this gateway's own, source of its ICMP
	Engine      string     `yaml:"engine"`       // auto or tc
	HopLimit    uint8      `yaml:"hop_limit"`    // of outer packets
	MTU         uint16     `yaml:"mtu"`          // of the device; 0 = smallest uplink - 40
	Hairpin     bool       `yaml:"hairpin"`      // host to host through this gateway
}

// BGP says what is announced to whom. Without peers there is no speaker.
type BGP struct {
	ASN            uint32         `yaml:"asn"`
	RouterID       netip.Addr     `yaml:"router_id"` // IPv4
	AllowAdvertise []netip.Prefix `yaml:"allow_advertise"`
	Peers          []Peer         `yaml:"peers"`
	Announce       Announce       `yaml:"announce"`
	Speaker        SpeakerConfig  `yaml:"speaker"`
}

// Peer is one BGP neighbour.
type Peer struct {
	Address         netip.Addr    `yaml:"address"`
	LocalAddress    netip.Addr    `yaml:"local_address"` // not set = chosen by the kernel
	Port            uint16        `yaml:"port"`          // 0 = 179
	ASN             uint32        `yaml:"asn"`
	HoldTime        time.Duration `yaml:"hold_time"`     // 0 = 90s
	PasswordFile    string        `yaml:"password_file"` // TCP-MD5 (RFC 2385); first line
	GracefulRestart bool          `yaml:"graceful_restart"`
	RestartTime     time.Duration `yaml:"restart_time"` // 0 = 120s
}

// PoolMode says in what form pools are announced.
type PoolMode string

// The pool modes.
const (
	PoolAggregate PoolMode = "aggregate" // the prefixes of the pools
	PoolLease     PoolMode = "lease"     // one /32 for each live lease
)

// Announce says what is announced.
type Announce struct {
	Pool          PoolMode `yaml:"pool"`
	TEP           bool     `yaml:"tep"`       // the tunnel address as a /128
	Community     []string `yaml:"community"` // on every route
	MaxHostRoutes int      `yaml:"max_host_routes"`
}

// SpeakerConfig says which program speaks BGP and how long it and tepd wait for each other.
type SpeakerConfig struct {
	Type   string        `yaml:"type"`   // gobgp, unless path is given
	Path   string        `yaml:"path"`   // another speaker program
	SHA256 string        `yaml:"sha256"` // of that program, hexadecimal
	Grace  time.Duration `yaml:"grace"`  // a restarted tepd leaves the routes alone this long while it is not healthy
	Orphan time.Duration `yaml:"orphan"` // the speaker drains after this long without tepd
}

// HealthConfig says how the self-test runs.
type HealthConfig struct {
	Interval time.Duration `yaml:"interval"`
	Rise     int           `yaml:"rise"` // passes in a row before anything is announced
	Fall     int           `yaml:"fall"` // failures in a row before everything is withdrawn
	Exit     netip.Addr    `yaml:"exit"` // IPv4 destination that must have a route, not into the tunnel
}

// Paths are the places on disk.
type Paths struct {
	Run string `yaml:"run"`
	BPF string `yaml:"bpf"`
}

// Defaults fills in what a file may leave out.
func (c *Config) Defaults() {
	c.Tunnel = Tunnel{Device: "dstm0", Engine: "auto", HopLimit: 64, Hairpin: true}
	c.BGP.Announce = Announce{Pool: PoolAggregate, TEP: true, MaxHostRoutes: 10_000}
	c.BGP.Speaker = SpeakerConfig{Type: "gobgp", Grace: time.Minute, Orphan: 5 * time.Minute}
	// The dummy address of RFC 7600: no network routes to it but by its default route.
	c.Health = HealthConfig{Interval: time.Second, Rise: 3, Fall: 3, Exit: netip.AddrFrom4([4]byte{192, 0, 0, 8})}
	c.Paths = Paths{Run: "/run/dstm", BPF: "/sys/fs/bpf/dstm"}
}

// Enabled reports whether this gateway speaks BGP at all.
func (b *BGP) Enabled() bool {
	return b.ASN != 0 || b.RouterID.IsValid() || len(b.Peers) > 0 || len(b.AllowAdvertise) > 0
}

// SpeakerConfig returns the speaker's part of the configuration. password reads a password file.
func (b *BGP) SpeakerConfig(password func(path string) (string, error)) (bgp.Config, error) {
	out := bgp.Config{ASN: b.ASN, RouterID: b.RouterID, Allow: slices.Clone(b.AllowAdvertise), Orphan: b.Speaker.Orphan}
	for _, p := range b.Peers {
		peer := bgp.Peer{
			Address: p.Address, LocalAddress: p.LocalAddress, Port: p.Port, ASN: p.ASN,
			HoldTime: p.HoldTime, GracefulRestart: p.GracefulRestart, RestartTime: p.RestartTime,
		}
		if peer.HoldTime == 0 {
			peer.HoldTime = defaultHoldTime
		}
		if peer.GracefulRestart && peer.RestartTime == 0 {
			peer.RestartTime = defaultRestartTime
		}
		if p.PasswordFile != "" {
			var err error
			if peer.Password, err = password(p.PasswordFile); err != nil {
				return bgp.Config{}, fmt.Errorf("bgp peer %s: %w", p.Address, err)
			}
		}
		out.Peers = append(out.Peers, peer)
	}
	return out, nil
}

const (
	defaultHoldTime    = 90 * time.Second  // RFC 4271 section 10
	defaultRestartTime = 120 * time.Second // as GoBGP, FRR and BIRD have it
)

// statePath returns a file of this daemon below the run directory.
func (p Paths) statePath(name string) string { return filepath.Join(p.Run, name) }

// NetState is the file in which netcfg keeps what tepd put into the kernel.
func (p Paths) NetState() string { return p.statePath("tepd.net.json") }

// Digest decodes the digest of the program.
func (s SpeakerConfig) Digest() ([]byte, error) {
	b, err := hex.DecodeString(s.SHA256)
	if err != nil || len(b) != 32 {
		return nil, fmt.Errorf("sha256 %q: want 64 hexadecimal digits, as sha256sum prints them", s.SHA256)
	}
	return b, nil
}
