package main

import (
	"net/netip"

	"github.com/dstm-project/dstm/internal/config"
	"github.com/dstm-project/dstm/internal/tlsid"
)

// DefaultPath is where the tool looks for its configuration.
const DefaultPath = "/etc/dstm/dstm.yaml"

// Config is dstm.yaml.
type Config struct {
	LeaseService Service `yaml:"lease_service"`
	Admin        Admin   `yaml:"admin"`
}

// Service says where the lease service is and who the operator is.
type Service struct {
	Servers []netip.AddrPort `yaml:"servers"`
	Name    string           `yaml:"name"` // in the service's certificate
	TLS     tlsid.Files      `yaml:"tls"`
}

// Admin says where the local daemons answer.
type Admin struct {
	LeaseService netip.AddrPort `yaml:"leasesvc"`
	TEP          netip.AddrPort `yaml:"tepd"`
	Host         netip.AddrPort `yaml:"dstmd"`
}

// Defaults fills in the daemons' usual admin addresses.
func (c *Config) Defaults() {
	loopback := netip.IPv6Loopback()
	c.Admin = Admin{
		LeaseService: netip.AddrPortFrom(loopback, 9545),
		TEP:          netip.AddrPortFrom(loopback, 9546),
		Host:         netip.AddrPortFrom(loopback, 9547),
	}
}

// LoadConfig reads the file at path strictly.
func LoadConfig(path string) (*Config, error) {
	return config.Load(path, func(c *Config, r *config.Report) {
		s := c.LeaseService
		if len(s.Servers) > 0 && s.Name == "" {
			r.Errorf("$.lease_service", "name is missing: the name in the lease service's certificate")
		}
		for key, file := range map[string]string{"cert": s.TLS.Cert, "key": s.TLS.Key, "ca": s.TLS.CA} {
			if len(s.Servers) > 0 && file == "" {
				r.Errorf("$.lease_service.tls", "%s is missing", key)
			}
		}
	})
}

// override takes what the command line says.
func (c *Config) override(flags Config) {
	s, f := &c.LeaseService, flags.LeaseService
	if len(f.Servers) > 0 {
		s.Servers = f.Servers
	}
	for to, from := range map[*string]string{&s.Name: f.Name, &s.TLS.Cert: f.TLS.Cert, &s.TLS.Key: f.TLS.Key, &s.TLS.CA: f.TLS.CA} {
		if from != "" {
			*to = from
		}
	}
}
