package tlsid

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Files names the PEM files of one identity. All three are required, but of a caller without a certificate only CA is.
type Files struct {
	Cert string `yaml:"cert"`
	Key  string `yaml:"key"`
	CA   string `yaml:"ca"`
	CRL  string `yaml:"crl"` // certificates taken back; not set = none
}

// Source is one identity with its key and roots, kept up to date from its files, and with the revocation lists of its files
// and of what is pushed to it.
type Source struct {
	files Files
	want  Role
	cell  string // of a caller without a certificate
	log   *slog.Logger
	now   func() time.Time
	m     atomic.Pointer[Metrics]
	cur   atomic.Pointer[material]

	change  sync.Mutex // one changes cur at a time
	problem string     // of the last reload, as logged
	overdue bool       // said of the lists

	mu       sync.Mutex // guards what follows
	onChange map[*func()]struct{}
}

// material is what the files hold, and the lists. It never changes.
type material struct {
	pem     [4][]byte // cert, key, ca, crl as read, to see whether they changed
	cert    tls.Certificate
	cas     []*x509.Certificate
	roots   *x509.CertPool
	lists   map[authority]*list
	id      ID
	tickets []byte // what session tickets are sealed with, see ticketKeys
}

// Open reads the files and checks what a start would trip over later: role, validity, key, roots.
func Open(f Files, want Role, log *slog.Logger) (*Source, error) {
	return open(&Source{files: f, want: want, log: log, now: time.Now})
}

// OpenAnonymous is Open for a caller of a cell that has no certificate and is known by its address.
func OpenAnonymous(f Files, cell string, log *slog.Logger) (*Source, error) {
	return open(&Source{files: f, cell: cell, log: log, now: time.Now})
}

func open(s *Source) (*Source, error) {
	s.onChange = map[*func()]struct{}{}
	m, err := s.load()
	if err != nil {
		return nil, err
	}
	s.cur.Store(m)
	return s, nil
}

func (s *Source) load() (*material, error) {
	m := &material{id: ID{Cell: s.cell}}
	names := [...]string{"cert", "key", "ca", "crl"}
	for i, path := range []string{s.files.Cert, s.files.Key, s.files.CA, s.files.CRL} {
		if i < 2 && s.cell != "" || names[i] == "crl" && path == "" {
			continue
		}
		if path == "" {
			return nil, fmt.Errorf("tls: %s is not set: want the path of a PEM file", names[i])
		}
		var err error
		if m.pem[i], err = os.ReadFile(path); err != nil {
			return nil, fmt.Errorf("tls: %w", err)
		}
	}
	if s.cell == "" {
		if err := s.parseIdentity(m); err != nil {
			return nil, err
		}
	}
	if err := s.parseRoots(m); err != nil {
		return nil, err
	}
	return m, s.parseLists(m)
}

func (s *Source) parseIdentity(m *material) error {
	var err error
	if m.cert, err = tls.X509KeyPair(m.pem[0], m.pem[1]); err != nil {
		return fmt.Errorf("tls: certificate %s with key %s: %w", s.files.Cert, s.files.Key, err)
	}
	if m.id, err = s.checkLeaf(m.cert.Leaf); err != nil {
		return fmt.Errorf("tls: certificate %s: %w", s.files.Cert, err)
	}
	m.tickets, err = x509.MarshalPKCS8PrivateKey(m.cert.PrivateKey)
	return err
}

func (s *Source) parseRoots(m *material) error {
	m.roots = x509.NewCertPool()
	for blk, rest := pem.Decode(m.pem[2]); blk != nil; blk, rest = pem.Decode(rest) {
		if ca, err := x509.ParseCertificate(blk.Bytes); err == nil && blk.Type == "CERTIFICATE" {
			m.roots.AddCert(ca)
			m.cas = append(m.cas, ca)
		}
	}
	if len(m.cas) == 0 {
		return fmt.Errorf("tls: ca %s: no certificate in it: want PEM with the CA that signs hosts, gateways and the lease service", s.files.CA)
	}
	return nil
}

func (s *Source) checkLeaf(leaf *x509.Certificate) (ID, error) {
	if err := inForce(leaf, s.now()); err != nil {
		return ID{}, err
	}
	id, err := FromCert(leaf)
	if err != nil {
		return ID{}, err
	}
	if id.Role != s.want {
		return ID{}, fmt.Errorf("identity %s has role %q: this program needs role %q", id, id.Role, s.want)
	}
	return id, nil
}

// inForce says what is wrong with the times of a certificate.
func inForce(c *x509.Certificate, now time.Time) error {
	switch {
	case now.After(c.NotAfter):
		return fmt.Errorf("expired at %s (now %s): issue a new one", c.NotAfter.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	case now.Before(c.NotBefore):
		return fmt.Errorf("not valid before %s (now %s): check the clock", c.NotBefore.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	}
	return nil
}

// ID returns the current identity.
func (s *Source) ID() ID { return s.cur.Load().id }

// OnChange makes f run after each change of files or lists. f must not block. The returned function takes it back.
func (s *Source) OnChange(f func()) (remove func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.onChange[&f] = struct{}{}
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.onChange, &f)
	}
}

func (s *Source) changed() {
	s.mu.Lock()
	fs := slices.Collect(maps.Keys(s.onChange))
	s.mu.Unlock()
	for _, f := range fs {
		(*f)()
	}
}

// reloadEvery is how often the files are looked at. Polling sees every way of replacing a file (rename, symbolic link
// swap, bind mount), which file notification does not.
const reloadEvery = 10 * time.Second

// Watch reloads changed files until ctx ends. A bad new file is logged and the old material stays in force.
func (s *Source) Watch(ctx context.Context) error {
	t := time.NewTicker(reloadEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
			s.Reload()
		}
	}
}

// Reload looks at the files now. What is wrong with them is logged once, and what was read before stays in force.
func (s *Source) Reload() {
	s.change.Lock()
	changed, err := s.reload()
	switch {
	case err != nil && err.Error() != s.problem:
		s.problem = err.Error()
		s.log.Warn("certificate files not reloaded, the old ones stay", "err", err)
	case err == nil:
		s.problem = ""
	}
	s.sayOverdue()
	s.change.Unlock()
	if changed {
		s.log.Info("certificate files reloaded", "identity", s.ID().String())
		s.changed()
	}
}

func (s *Source) reload() (changed bool, err error) {
	m, err := s.load()
	if err != nil {
		return false, err
	}
	old := s.cur.Load()
	for i := range m.pem {
		changed = changed || !bytes.Equal(m.pem[i], old.pem[i])
	}
	if !changed {
		return false, nil
	}
	if m.id != old.id {
		return false, fmt.Errorf("tls: certificate %s is now %s: a running daemon keeps its identity %s, restart it", s.files.Cert, m.id, old.id)
	}
	if err := m.keep(old); err != nil {
		s.log.Warn("revocation list of the file not used", "crl", s.files.CRL, "err", err)
	}
	s.cur.Store(m)
	return true, nil
}
