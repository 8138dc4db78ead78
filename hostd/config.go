package hostd

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"time"

	"github.com/dstm-project/dstm/internal/config"
	"github.com/dstm-project/dstm/internal/daemon"
	"github.com/dstm-project/dstm/internal/tlsid"
)

// Config is dstmd.yaml.
type Config struct {
	Cell         string           `yaml:"cell"`
	LeaseService LeaseService     `yaml:"lease_service"`
	Uplinks      Uplinks          `yaml:"uplinks"`
	Device       Device           `yaml:"device"`
	Trigger      TriggerConfig    `yaml:"trigger"`
	Idle         IdleConfig       `yaml:"idle"`
	Paths        Paths            `yaml:"paths"`
	Admin        netip.AddrPort   `yaml:"admin"`
	Log          daemon.LogConfig `yaml:"log"`
}

// LeaseService says where the lease service is and who we are to it.
type LeaseService struct {
	Servers []netip.AddrPort `yaml:"servers"`
	Name    string           `yaml:"name"` // in its certificate
	TLS     tlsid.Files      `yaml:"tls"`
}

// Uplinks are interfaces towards gateways; nil means: all with an IPv6 route (in the file: auto).
type Uplinks []string

// UnmarshalYAML accepts the word auto or a list of names.
func (u *Uplinks) UnmarshalYAML(decode func(any) error) error {
	var word string
	if decode(&word) == nil {
		if word != "auto" {
			return fmt.Errorf("uplinks %q: want auto or a list of interface names", word)
		}
		*u = nil
		return nil
	}
	return decode((*[]string)(u))
}

// Device is the host's tunnel interface.
type Device struct {
	Name        string       `yaml:"name"`
	Placeholder netip.Prefix `yaml:"placeholder"` // RFC 6333 section 5.7
	Metric      uint32       `yaml:"metric"`      // of the default route; worse than a native one
	Inbound     Inbound      `yaml:"inbound"`
	HopLimit    uint8        `yaml:"hop_limit"` // of outer packets
}

// TriggerConfig says what asks for a lease besides the lease service's offers.
type TriggerConfig struct {
	Packet      bool          `yaml:"packet"`
	HoldPackets int           `yaml:"hold_packets"`
	HoldTime    time.Duration `yaml:"hold_time"`
}

// IdleConfig says when a lease is given back.
type IdleConfig struct {
	After           time.Duration `yaml:"after"` // 0 = what the lease service says
	KeepOpenSockets bool          `yaml:"keep_open_sockets"`
}

// Paths are the places on disk.
type Paths struct {
	Run string `yaml:"run"`
	BPF string `yaml:"bpf"`
}

// Defaults fills in what a file may leave out.
func (c *Config) Defaults() {
	c.Device = Device{
		Name: "dstm0", Placeholder: netip.MustParsePrefix("192.0.0.2/29"), Metric: 4096,
		Inbound: InboundEstablished, HopLimit: 64,
	}
	c.Trigger = TriggerConfig{Packet: true, HoldPackets: 64, HoldTime: 3 * time.Second}
	c.Idle = IdleConfig{KeepOpenSockets: true}
	c.Paths = Paths{Run: "/run/dstm", BPF: "/sys/fs/bpf/dstm"}
}

// LoadConfig reads and checks the file at path. Errors name file, line and column.
func LoadConfig(path string) (*Config, error) { return config.Load(path, check) }

// ParseConfig is LoadConfig for data at hand.
func ParseConfig(name string, data []byte) (*Config, error) { return config.Parse(name, data, check) }

func check(c *Config, r *config.Report) {
	if c.Cell == "" {
		r.Errorf("$.cell", "cell is missing: want the name of the lease service's cell")
	}
	checkService(&c.LeaseService, r)
	checkDevice(&c.Device, r)
	for i, u := range c.Uplinks {
		if !interfaceName(u) || u == c.Device.Name {
			r.Errorf(fmt.Sprintf("$.uplinks[%d]", i), "uplink %q: want an interface name of 1 to 15 characters, other than device.name", u)
		}
	}
	if c.Trigger.HoldPackets < 0 || c.Trigger.HoldPackets > 4096 {
		r.Errorf("$.trigger.hold_packets", "hold_packets %d: want 0 to 4096", c.Trigger.HoldPackets)
	}
	if c.Trigger.HoldTime < 0 || c.Trigger.HoldTime > time.Minute {
		r.Errorf("$.trigger.hold_time", "hold_time %s: want 0s to 1m", c.Trigger.HoldTime)
	}
	if c.Idle.After != 0 && (c.Idle.After < time.Second || c.Idle.After > 24*time.Hour) {
		r.Errorf("$.idle.after", "after %s: want 1s to 24h, or 0s for what the lease service says", c.Idle.After)
	}
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
		r.Errorf("$.lease_service", "servers is missing: want one or more of the form \"[2001:db8::1]:3545\"")
	}
	for i, s := range s.Servers {
		if !s.Addr().Is6() || s.Addr().Is4In6() || s.Port() == 0 {
			r.Errorf(fmt.Sprintf("$.lease_service.servers[%d]", i), "server %s: want an IPv6 address and a port, IPv4 may need a lease", s)
		}
	}
	if s.Name == "" {
		r.Errorf("$.lease_service", "name is missing: want the name in the lease service's certificate")
	}
	if s.TLS.CA == "" {
		r.Errorf("$.lease_service.tls", "ca is missing: want the path of a PEM file")
	}
	if (s.TLS.Cert == "") != (s.TLS.Key == "") {
		r.Errorf("$.lease_service.tls", "cert %q with key %q: want both, or neither where the lease service knows hosts by their address", s.TLS.Cert, s.TLS.Key)
	}
}

func checkDevice(d *Device, r *config.Report) {
	if !interfaceName(d.Name) {
		r.Errorf("$.device.name", "name %q: want an interface name of 1 to 15 characters", d.Name)
	}
	if p := d.Placeholder; !p.IsValid() || !p.Addr().Is4() {
		r.Errorf("$.device.placeholder", "placeholder %s: want an IPv4 address with prefix length such as 192.0.0.2/29", p)
	}
	if d.Metric == 0 {
		r.Errorf("$.device.metric", "metric 0: want one that is worse than that of a native default route, such as 4096")
	}
	if d.Inbound != InboundEstablished && d.Inbound != InboundOpen {
		r.Errorf("$.device.inbound", "inbound %q: want %s or %s", d.Inbound, InboundEstablished, InboundOpen)
	}
	if d.HopLimit == 0 {
		r.Errorf("$.device.hop_limit", "hop_limit 0: want 1 to 255")
	}
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
