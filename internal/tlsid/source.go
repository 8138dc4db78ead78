package tlsid

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
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

// Source is one identity with its key and roots, kept up to date from its files.
type Source struct {
	files Files
	want  Role
	cell  string // of a caller without a certificate
	log   *slog.Logger
	now   func() time.Time
	cur   atomic.Pointer[material]
	// onReload is called after a reload; set before Watch.
	onReload []func()
}

type material struct {
	pem     [4][]byte // cert, key, ca, crl as read, to see whether they changed
	cert    tls.Certificate
	roots   *x509.CertPool
	revoked *revocations
	id      ID
}

// Open reads the files and checks what a start would trip over later: role, validity, key, roots.
func Open(f Files, want Role, log *slog.Logger) (*Source, error) {
	s := &Source{files: f, want: want, log: log, now: time.Now}
	m, err := s.load()
	if err != nil {
		return nil, err
	}
	s.cur.Store(m)
	return s, nil
}

// OpenAnonymous is Open for a caller of a cell that has no certificate and is known by its address.
func OpenAnonymous(f Files, cell string, log *slog.Logger) (*Source, error) {
	s := &Source{files: f, cell: cell, log: log, now: time.Now}
	m, err := s.load()
	if err != nil {
		return nil, err
	}
	s.cur.Store(m)
	return s, nil
}

func (s *Source) load() (*material, error) {
	if s.cell != "" {
		return s.loadAnonymous()
	}
	var m material
	for i, path := range []string{s.files.Cert, s.files.Key, s.files.CA} {
		if path == "" {
			return nil, fmt.Errorf("tls: %s is not set: want the path of a PEM file", [...]string{"cert", "key", "ca"}[i])
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return nil, fmt.Errorf("tls: %w", err)
		}
		m.pem[i] = b
	}
	cert, err := tls.X509KeyPair(m.pem[0], m.pem[1])
	if err != nil {
		return nil, fmt.Errorf("tls: certificate %s with key %s: %w", s.files.Cert, s.files.Key, err)
	}
	m.cert = cert
	if m.roots, err = s.parseRoots(m.pem[2]); err != nil {
		return nil, err
	}
	if m.id, err = s.checkLeaf(cert.Leaf); err != nil {
		return nil, fmt.Errorf("tls: certificate %s: %w", s.files.Cert, err)
	}
	if err := s.loadCRL(&m); err != nil {
		return nil, err
	}
	return &m, nil
}

func (s *Source) loadCRL(m *material) error {
	path := s.files.CRL
	if path == "" {
		return nil
	}
	var err error
	if m.pem[3], err = os.ReadFile(path); err != nil {
		return fmt.Errorf("tls: %w", err)
	}
	m.revoked, err = parseRevocations(path, m.pem[3], m.pem[2])
	return err
}

func (s *Source) loadAnonymous() (*material, error) {
	m := material{id: ID{Cell: s.cell}}
	var err error
	if m.pem[2], err = os.ReadFile(s.files.CA); err != nil {
		return nil, fmt.Errorf("tls: %w", err)
	}
	if m.roots, err = s.parseRoots(m.pem[2]); err != nil {
		return nil, err
	}
	if err := s.loadCRL(&m); err != nil {
		return nil, err
	}
	return &m, nil
}

func (s *Source) parseRoots(pem []byte) (*x509.CertPool, error) {
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("tls: ca %s: no certificate in it: want PEM with the CA that signs hosts, gateways and the lease service", s.files.CA)
	}
	return roots, nil
}

func (s *Source) checkLeaf(leaf *x509.Certificate) (ID, error) {
	now := s.now()
	switch {
	case now.After(leaf.NotAfter):
		return ID{}, fmt.Errorf("expired at %s (now %s): issue a new one", leaf.NotAfter.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	case now.Before(leaf.NotBefore):
		return ID{}, fmt.Errorf("not valid before %s (now %s): check the clock", leaf.NotBefore.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
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

// ID returns the current identity.
func (s *Source) ID() ID { return s.cur.Load().id }

// Server returns the configuration of a listener: TLS 1.3, a client certificate of this CA required.
func (s *Source) Server() *tls.Config { return s.server(tls.RequireAndVerifyClientCert) }

// OpenServer is Server for a service that also takes callers without a certificate. One that is shown must still be of this
// CA.
func (s *Source) OpenServer() *tls.Config { return s.server(tls.VerifyClientCertIfGiven) }

func (s *Source) server(auth tls.ClientAuthType) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		NextProtos: []string{"h2"},
		// Built per connection, so that a reload of the roots reaches the next handshake.
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			m := s.cur.Load()
			return &tls.Config{
				MinVersion:   tls.VersionTLS13,
				NextProtos:   []string{"h2"},
				Certificates: []tls.Certificate{m.cert},
				ClientAuth:   auth,
				ClientCAs:    m.roots,
				// Runs for resumed sessions too.
				VerifyConnection: s.checkRevoked,
			}, nil
		},
	}
}

// Roots returns the current CA pool, for a listener whose own certificate comes from elsewhere.
func (s *Source) Roots() *x509.CertPool { return s.cur.Load().roots }

// Client returns the configuration of a caller: TLS 1.3, the server's name verified against this CA. A server
// certificate that carries an identity of DSTM must be of role svc and of this cell; one without (ACME) passes by name.
func (s *Source) Client(serverName string) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		NextProtos: []string{"h2"},
		ServerName: serverName,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return &s.cur.Load().cert, nil
		},
		// The standard verification has fixed roots; ours follow the file, so the chain is verified below instead.
		InsecureSkipVerify: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			return errors.Join(s.checkRevoked(cs), s.verifyServer(cs, serverName))
		},
	}
}

func (s *Source) verifyServer(cs tls.ConnectionState, name string) error {
	m := s.cur.Load()
	if len(cs.PeerCertificates) == 0 {
		return errors.New("tls: server sent no certificate")
	}
	leaf := cs.PeerCertificates[0]
	opts := x509.VerifyOptions{
		Roots: m.roots, DNSName: name, CurrentTime: s.now(), Intermediates: x509.NewCertPool(),
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, c := range cs.PeerCertificates[1:] {
		opts.Intermediates.AddCert(c)
	}
	if _, err := leaf.Verify(opts); err != nil {
		return fmt.Errorf("tls: server certificate for %q: %w", name, err)
	}
	id, err := FromCert(leaf)
	switch {
	case errors.Is(err, ErrNoID):
		return nil
	case err != nil:
		return fmt.Errorf("tls: server certificate for %q: %w", name, err)
	case id.Role != RoleSvc || id.Cell != m.id.Cell || m.id.TrustDomain != "" && id.TrustDomain != m.id.TrustDomain:
		return fmt.Errorf("tls: server is %s: want role svc of cell %q in trust domain %q", id, m.id.Cell, m.id.TrustDomain)
	}
	return nil
}

// reloadEvery is how often the files are looked at. Polling sees every way of replacing a file (rename, symbolic link
// swap, bind mount), which file notification does not.
const reloadEvery = 10 * time.Second

// Watch reloads changed files until ctx ends. A bad new file is logged and the old material stays in force.
func (s *Source) Watch(ctx context.Context) error {
	t := time.NewTicker(reloadEvery)
	defer t.Stop()
	var last string
	overdue := false
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		switch changed, err := s.reload(); {
		case err != nil && err.Error() != last:
			last = err.Error()
			s.log.Warn("certificate files not reloaded, the old ones stay", "err", err)
		case err == nil && changed:
			last = ""
			for _, f := range s.onReload {
				f()
			}
			s.log.Info("certificate files reloaded", "identity", s.ID().String())
		}
		if r := s.cur.Load().revoked; r != nil && s.now().After(r.next) != overdue {
			if overdue = !overdue; overdue {
				s.log.Warn("the revocation list is overdue; what it takes back stays so", "due", r.next.UTC().Format(time.RFC3339))
			}
		}
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
	s.cur.Store(m)
	return true, nil
}
