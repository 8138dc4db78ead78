package leasesvc

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/dstm-project/dstm/internal/config"
	"github.com/dstm-project/dstm/internal/daemon"
	"github.com/dstm-project/dstm/internal/tlsid"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/policy"
)

// Config is leasesvc.yaml; deploy/leasesvc.yaml explains every key.
type Config struct {
	Cell        string           `yaml:"cell"`
	TrustDomain string           `yaml:"trust_domain"`
	Listen      netip.AddrPort   `yaml:"listen"`
	TLS         tlsid.Files      `yaml:"tls"`
	ACME        ACMEConfig       `yaml:"acme"`
	Store       StoreConfig      `yaml:"store"`
	Pools       []PoolConfig     `yaml:"pools"`
	TEPs        []string         `yaml:"teps"`
	Hosts       HostsConfig      `yaml:"hosts"`
	Timers      TimersConfig     `yaml:"timers"`
	Limits      LimitsConfig     `yaml:"limits"`
	Policy      policy.Config    `yaml:"policy"`
	Audit       AuditConfig      `yaml:"audit"`
	Admin       netip.AddrPort   `yaml:"admin"`
	Log         daemon.LogConfig `yaml:"log"`
}

// ACMEConfig gives the service a server certificate of an ACME directory (RFC 8555) beside its own identity. Empty
// Directory = none.
type ACMEConfig struct {
	Directory string         `yaml:"directory"` // URL
	Root      string         `yaml:"root"`      // PEM file with the directory's own root; empty = the system's
	Listen    netip.AddrPort `yaml:"listen"`    // for the tls-alpn-01 challenge; the world reaches it at port 443
	Names     []string       `yaml:"names"`
	Dir       string         `yaml:"dir"` // where keys and certificates are kept
	Email     string         `yaml:"email"`
}

// AuditConfig says how long it is remembered who had what.
type AuditConfig struct {
	Retention time.Duration `yaml:"retention"` // after the fence of a lease; 0 = for ever
}

// PoolConfig is one prefix that is leased out.
type PoolConfig struct {
	Name       string       `yaml:"name"`
	Prefix     netip.Prefix `yaml:"prefix"`
	TEPAddress netip.Addr   `yaml:"tep_address"`
	Exclude    []netip.Addr `yaml:"exclude"`
	// Reservations give identities an address of their own.
	Reservations map[string]netip.Addr `yaml:"reservations"`
	// PortSets k cuts an address into 1<<k port sets when addresses run short, for hosts that accept one; 0 = never.
	PortSets uint8 `yaml:"port_sets"`
}

// Identity is how hosts are told apart.
type Identity string

// The identities.
const (
	IdentityCertificate Identity = "certificate" // by their certificate
	IdentityAddress     Identity = "address"     // by the address they call from, in networks that enforce it
)

// HostsConfig says who may lease.
type HostsConfig struct {
	Identity Identity       `yaml:"identity"`
	Prefixes []netip.Prefix `yaml:"prefixes"` // tunnel sources allowed
	Same64   bool           `yaml:"same_64"`  // a source may differ from the caller's address inside its /64
	Per64    int            `yaml:"per_64"`   // leases of one /64 together; 0 = no limit
}

// TimersConfig are the times of the cell.
type TimersConfig struct {
	Valid        time.Duration `yaml:"valid"`
	MinValid     time.Duration `yaml:"min_valid"`
	MaxValid     time.Duration `yaml:"max_valid"`
	Reservation  time.Duration `yaml:"reservation"`
	Idle         time.Duration `yaml:"idle"`
	HoldDown     time.Duration `yaml:"hold_down"`
	RestartGrace time.Duration `yaml:"restart_grace"`
	SessionLease time.Duration `yaml:"session_lease"`
	FailStatic   time.Duration `yaml:"fail_static"`
	BindWait     time.Duration `yaml:"bind_wait"`
}

// Defaults implements config.Defaulter.
func (c *Config) Defaults() {
	d := lease.DefaultTimers()
	c.Timers = TimersConfig{
		Valid: d.Valid, MinValid: d.MinValid, MaxValid: d.MaxValid, Reservation: d.Reservation, Idle: 2 * time.Minute,
		HoldDown: d.HoldDown, RestartGrace: d.Grace, SessionLease: 30 * time.Second, FailStatic: 4 * time.Hour, BindWait: 500 * time.Millisecond,
	}
	c.Store.defaults()
	c.Audit.Retention = 180 * 24 * time.Hour
	c.Admin = netip.MustParseAddrPort("[::1]:9545")
	c.Hosts.Identity, c.Hosts.Per64 = IdentityCertificate, 64
	c.Policy.Defaults()
	c.Limits = defaultLimits()
}

// LoadConfig reads and checks the file at path.
func LoadConfig(path string) (*Config, error) { return config.Load(path, (*Config).check) }

// ParseConfig reads and checks data; name stands in the messages.
func ParseConfig(name string, data []byte) (*Config, error) {
	return config.Parse(name, data, (*Config).check)
}

func (c *Config) check(r *config.Report) {
	id := tlsid.ID{TrustDomain: c.TrustDomain, Cell: c.Cell, Role: tlsid.RoleSvc, Name: "x"}
	if err := id.Check(); err != nil {
		r.Errorf("$.cell", "%v", err)
	}
	if !c.Listen.IsValid() {
		r.Errorf("$.listen", "listen is not set: want an address and port such as \"[2001:db8:2::10]:3545\"")
	}
	for key, v := range map[string]string{"cert": c.TLS.Cert, "key": c.TLS.Key, "ca": c.TLS.CA} {
		if v == "" {
			r.Errorf("$.tls."+key, "tls.%s is not set: want the path of a PEM file", key)
		}
	}
	if a := c.ACME; a.Directory != "" && (!a.Listen.IsValid() || len(a.Names) == 0 || a.Dir == "") {
		r.Errorf("$.acme", "acme: want listen, names and dir beside directory")
	}
	c.Store.check(r)
	if keep := c.Audit.Retention; keep != 0 && keep < time.Second {
		r.Errorf("$.audit.retention", "audit.retention %s: want 0s (for ever) or at least 1s", keep)
	}
	c.checkPools(r)
	c.checkTEPs(r)
	c.checkHosts(r)
	c.checkTimers(r)
	c.checkLimits(r)
	var pools []string
	for _, p := range c.Pools {
		pools = append(pools, p.Name)
	}
	c.Policy.Check(r, "$.policy", pools)
	if err := daemon.CheckAdmin(c.Admin); err != nil {
		r.Errorf("$.admin", "%v", err)
	}
	if err := c.Log.Check(); err != nil {
		r.Errorf("$.log", "%v", err)
	}
}

func (c *Config) checkPools(r *config.Report) {
	if len(c.Pools) == 0 {
		r.Errorf("$.pools", "pools is empty: want at least one pool with name, prefix and tep_address")
	}
	names := map[string]bool{}
	for i, p := range c.Pools {
		at := fmt.Sprintf("$.pools[%d]", i)
		switch {
		case p.Name == "":
			r.Errorf(at, "pool %d has no name", i+1)
		case names[p.Name]:
			r.Errorf(at+".name", "pool name %q is used twice", p.Name)
		}
		names[p.Name] = true
		if !p.TEPAddress.Is6() || p.TEPAddress.Is4In6() {
			r.Errorf(at+".tep_address", "pool %q: tep_address is not set to an IPv6 address, the one at which tunnels of this pool end", p.Name)
		}
		if !c.checkPrefix(r, at, p) {
			continue
		}
		for j, o := range c.Pools[:i] {
			if o.Prefix.IsValid() && o.Prefix.Overlaps(p.Prefix) {
				r.Errorf(at+".prefix", "pool %q: prefix %s overlaps %s of pool %q (%d)", p.Name, p.Prefix, o.Prefix, o.Name, j+1)
			}
		}
	}
}

func (c *Config) checkPrefix(r *config.Report, at string, p PoolConfig) bool {
	const shortest = 12 // as lease.NewCore
	switch {
	case !p.Prefix.IsValid():
		r.Errorf(at, "pool %q: prefix is not set: want an IPv4 prefix such as 198.51.100.0/24", p.Name)
		return false
	case !p.Prefix.Addr().Is4() || p.Prefix.Bits() < shortest:
		r.Errorf(at+".prefix", "pool %q: prefix %s: want an IPv4 prefix of /%d to /32", p.Name, p.Prefix, shortest)
		return false
	case p.Prefix != p.Prefix.Masked():
		r.Errorf(at+".prefix", "pool %q: prefix %s has host bits: want %s", p.Name, p.Prefix, p.Prefix.Masked())
		return false
	}
	seen := map[netip.Addr]bool{}
	for j, a := range p.Exclude {
		if !p.Prefix.Contains(a) {
			r.Errorf(fmt.Sprintf("%s.exclude[%d]", at, j), "pool %q: excluded address %s is outside of %s", p.Name, a, p.Prefix)
			continue
		}
		seen[a] = true
	}
	owner := map[netip.Addr]string{}
	for host, a := range p.Reservations {
		path := at + ".reservations." + host
		switch {
		case !p.Prefix.Contains(a):
			r.Errorf(path, "pool %q: address %s of %s is outside of %s", p.Name, a, host, p.Prefix)
		case seen[a]:
			r.Errorf(path, "pool %q: address %s of %s is excluded", p.Name, a, host)
		case owner[a] != "":
			r.Errorf(path, "pool %q: address %s is reserved for both %s and %s", p.Name, a, host, owner[a])
		}
		owner[a] = host
	}
	if p.PortSets > lease.MaxPSIDLen {
		r.Errorf(at+".port_sets", "pool %q: port_sets %d: want 0 (whole addresses only) to %d, for 1<<port_sets hosts on one address", p.Name, p.PortSets, lease.MaxPSIDLen)
	}
	if len(seen) == 1<<(32-p.Prefix.Bits()) {
		r.Errorf(at+".exclude", "pool %q: every address of %s is excluded, nothing is left to lease", p.Name, p.Prefix)
	}
	return true
}

func (c *Config) checkTEPs(r *config.Report) {
	if len(c.TEPs) == 0 {
		r.Errorf("$.teps", "teps is empty: want the id of at least one gateway, as in its certificate")
	}
	seen := map[string]bool{}
	for i, t := range c.TEPs {
		if seen[t] || t == "" {
			r.Errorf(fmt.Sprintf("$.teps[%d]", i), "gateway id %q is empty or used twice", t)
		}
		seen[t] = true
	}
}

func (c *Config) checkHosts(r *config.Report) {
	switch c.Hosts.Identity {
	case IdentityCertificate:
	case IdentityAddress:
		if c.Hosts.Per64 == 0 {
			r.Errorf("$.hosts.per_64", "per_64 0 (no limit) with identity: address: a host has as many addresses as it likes; want 1 or more")
		}
		if c.ACME.Directory != "" {
			r.Errorf("$.hosts.identity", "identity address with acme: not supported together; want certificate, or no acme")
		}
	default:
		r.Errorf("$.hosts.identity", "identity %q: want certificate or address", c.Hosts.Identity)
	}
	if len(c.Hosts.Prefixes) == 0 {
		r.Errorf("$.hosts.prefixes", "hosts.prefixes is empty: want the IPv6 prefixes that tunnels may come from")
	}
	for i, p := range c.Hosts.Prefixes {
		if !p.Addr().Is6() || p != p.Masked() {
			r.Errorf(fmt.Sprintf("$.hosts.prefixes[%d]", i), "prefix %s: want an IPv6 prefix without host bits", p)
		}
	}
	if c.Hosts.Per64 < 0 {
		r.Errorf("$.hosts.per_64", "per_64 %d: want 0 (no limit) or more", c.Hosts.Per64)
	}
}

func (c *Config) checkTimers(r *config.Report) {
	t := c.Timers
	if err := c.leaseTimers().Check(); err != nil {
		r.Errorf("$.timers", "%v", err)
	}
	for _, d := range []struct {
		key      string
		v        time.Duration
		min, max time.Duration
	}{
		{"idle", t.Idle, time.Second, 24 * time.Hour},
		{"session_lease", t.SessionLease, time.Second, t.FailStatic},
		{"fail_static", t.FailStatic, time.Second, 7 * 24 * time.Hour},
		{"bind_wait", t.BindWait, 0, 5 * time.Second},
	} {
		if d.v < d.min || d.v > d.max {
			r.Errorf("$.timers."+d.key, "timer %s %s is outside %s..%s", d.key, d.v, d.min, d.max)
		}
	}
}

func (c *Config) checkLimits(r *config.Report) {
	l := c.Limits
	for _, k := range []struct {
		key    string
		v, min int
	}{{"calls", l.Calls, 64}, {"per_host", l.PerHost, 0}, {"connections", l.Connections, 0}, {"streams", l.Streams, 0}, {"handshakes", l.Handshakes, 0}, {"per_64", l.Per64, 0}} {
		if k.v < k.min || k.v > 1_000_000 {
			r.Errorf("$.limits."+k.key, "limits.%s %d: want %d to 1000000", k.key, k.v, k.min)
		}
	}
}

// fence says how long gateways may go on. With one gateway nobody could witness that it has stopped, so each answer lets it
// go on for as long as it ever may.
func (c *Config) fence(epoch lease.Epoch) lease.FenceConfig {
	f := lease.FenceConfig{FailStatic: c.Timers.FailStatic, Session: c.Timers.SessionLease, Epoch: epoch}
	if len(c.TEPs) == 1 {
		f.Session = f.FailStatic
	}
	return f
}

func (c *Config) leaseTimers() lease.Timers {
	d := lease.DefaultTimers()
	d.Valid, d.MinValid, d.MaxValid = c.Timers.Valid, c.Timers.MinValid, c.Timers.MaxValid
	d.Reservation, d.HoldDown, d.Grace = c.Timers.Reservation, c.Timers.HoldDown, c.Timers.RestartGrace
	return d
}

// labTimes names the timers that are shorter than production wants.
func (c *Config) labTimes() []string {
	var out []string
	for _, t := range []struct {
		name      string
		v, usable time.Duration
	}{
		{"valid", c.Timers.Valid, 2 * time.Minute},
		{"hold_down", c.Timers.HoldDown, 2 * time.Minute},
		{"restart_grace", c.Timers.RestartGrace, time.Minute},
		{"fail_static", c.Timers.FailStatic, 10 * time.Minute},
	} {
		if t.v < t.usable {
			out = append(out, fmt.Sprintf("%s %s", t.name, t.v))
		}
	}
	return out
}
