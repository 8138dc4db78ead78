package leasesvc

import (
	"fmt"
	"net/netip"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/dstm-project/dstm/internal/config"
	"github.com/dstm-project/dstm/leasesvc/store"
)

// StoreType is where the records are.
type StoreType string

// The store types.
const (
	StoreBolt StoreType = "bolt" // one file on one machine
	StoreEtcd StoreType = "etcd" // for several services, one of which works at a time
)

// StoreConfig says where the records are.
type StoreConfig struct {
	Type StoreType `yaml:"type"`
	Path string    `yaml:"path"` // bolt: the file

	Endpoints []string      `yaml:"endpoints"` // etcd: URL of every voting member
	TLS       StoreTLS      `yaml:"tls"`       // etcd: empty = plain text
	Prefix    string        `yaml:"prefix"`    // etcd: all keys lie below it; empty = /dstm/ and the cell
	TTL       time.Duration `yaml:"ttl"`       // etcd: after which another service takes a silent one's place

	// Copies are made while the service runs.
	Copies CopiesConfig `yaml:"copies"`
}

// StoreTLS names the PEM files with which the service shows itself to etcd, and checks etcd. They are not those of the
// cell's identities.
type StoreTLS struct {
	Cert string `yaml:"cert"`
	Key  string `yaml:"key"`
	CA   string `yaml:"ca"`
}

// CopiesConfig says how often the store is copied, and where to.
type CopiesConfig struct {
	Every time.Duration `yaml:"every"` // 0 = never
	Dir   string        `yaml:"dir"`   // empty = copies, beside the file; with etcd below /var/lib/dstm
	Keep  int           `yaml:"keep"`  // older ones go
}

func (s *StoreConfig) defaults() {
	s.Type, s.TTL = StoreBolt, 5*time.Second
	s.Copies = CopiesConfig{Every: 15 * time.Minute, Keep: 8}
}

// CopiesDir returns where copies of the store are kept.
func (c *Config) CopiesDir() string {
	switch s := c.Store; {
	case s.Copies.Dir != "":
		return s.Copies.Dir
	case s.Type == StoreEtcd:
		return "/var/lib/dstm/copies"
	default:
		return filepath.Join(filepath.Dir(s.Path), "copies")
	}
}

func (s *StoreConfig) check(r *config.Report) {
	switch s.Type {
	case StoreBolt:
		if s.Path == "" {
			r.Errorf("$.store.path", "store.path is not set: want a file such as /var/lib/dstm/lease.db")
		}
		if len(s.Endpoints) > 0 {
			r.Errorf("$.store.endpoints", "store.endpoints are of type etcd: the type is bolt")
		}
	case StoreEtcd:
		if s.Path != "" {
			r.Errorf("$.store.path", "store.path is of type bolt: the type is etcd")
		}
		s.checkEtcd(r)
	default:
		r.Errorf("$.store.type", "store type %q: want bolt or etcd", s.Type)
	}
	if every := s.Copies.Every; every != 0 && every < time.Second {
		r.Errorf("$.store.copies.every", "store.copies.every %s: want 0s (never) or at least 1s", every)
	}
	if keep := s.Copies.Keep; keep < 1 || keep > 1000 {
		r.Errorf("$.store.copies.keep", "store.copies.keep %d is outside 1..1000", keep)
	}
}

func (s *StoreConfig) checkEtcd(r *config.Report) {
	if err := store.CheckVoters(len(s.Endpoints)); err != nil {
		r.Errorf("$.store.endpoints", "store.endpoints: %v", err)
	}
	secure := false
	for i, e := range s.Endpoints {
		at := fmt.Sprintf("$.store.endpoints[%d]", i)
		if slices.Contains(s.Endpoints[:i], e) {
			r.Errorf(at, "endpoint %s is there twice", e)
		}
		if err := checkEndpoint(e); err != nil {
			r.Errorf(at, "endpoint %q: %v", e, err)
		}
		secure = secure || strings.HasPrefix(e, "https:")
	}
	if t := s.TLS; secure && (t.Cert == "" || t.Key == "" || t.CA == "") {
		r.Errorf("$.store.tls", "store.tls: want cert, key and ca, as endpoints are https")
	}
	if t := s.TLS; !secure && t != (StoreTLS{}) {
		r.Errorf("$.store.tls", "store.tls: no endpoint is https")
	}
	if s.TTL < 2*time.Second || s.TTL > time.Minute || s.TTL%time.Second != 0 {
		r.Errorf("$.store.ttl", "store.ttl %s: want whole seconds, 2s to 60s", s.TTL)
	}
}

// checkEndpoint wants TLS unless etcd runs on this machine.
func checkEndpoint(e string) error {
	u, err := url.Parse(e)
	if err != nil {
		return err
	}
	if u.Scheme != "https" && u.Scheme != "http" || u.Port() == "" || u.Hostname() == "" || u.Path != "" {
		return fmt.Errorf("want a URL such as https://[2001:db8:2::21]:2379")
	}
	if u.Scheme == "http" {
		if a, err := netip.ParseAddr(u.Hostname()); err != nil || !a.IsLoopback() {
			return fmt.Errorf("want https, plain text is for loopback only")
		}
	}
	return nil
}
