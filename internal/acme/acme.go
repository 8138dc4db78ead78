// Package acme obtains and renews the server certificate of the lease service from an ACME directory (RFC 8555), public or
// private, by tls-alpn-01 (RFC 8737) on an address of its own: the service's own listener demands client certificates,
// which a directory does not have. Client certificates always come from the private CA.
package acme

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"

	"github.com/caddyserver/certmagic"
	"github.com/cenkalti/backoff/v5"
)

// Config says where certificates come from and for which names.
type Config struct {
	Directory string         // https URL of the ACME directory
	Root      string         // PEM file with the roots of the directory's own certificate; empty = the system's
	Listen    netip.AddrPort // where tls-alpn-01 is answered; only open while the directory looks
	Names     []string       // DNS names or IP addresses of the service, at least one
	Dir       string         // absolute path; account, keys and certificates are kept here
	Email     string         // contact of the account; empty = none
}

// Check says what is wrong with c, without touching a file or the network.
func (c Config) Check() error {
	u, err := url.Parse(c.Directory)
	switch {
	case err != nil:
		return fmt.Errorf("acme: directory: %w", err)
	case u.Scheme != "https" || u.Host == "":
		return fmt.Errorf("acme: directory %q: want an https URL", c.Directory)
	case !c.Listen.IsValid() || c.Listen.Port() == 0:
		return fmt.Errorf("acme: listen %q: want address:port, which the directory reaches as port 443", c.Listen)
	case len(c.Names) == 0:
		return errors.New("acme: names: none given: want the names by which hosts and gateways call the lease service")
	case !filepath.IsAbs(c.Dir):
		return fmt.Errorf("acme: dir %q: want an absolute path", c.Dir)
	}
	for _, n := range c.Names {
		if n == "" || !certmagic.SubjectQualifiesForCert(n) {
			return fmt.Errorf("acme: name %q: want a DNS name or an IP address", n)
		}
	}
	return nil
}

// Manager keeps the certificates of one service. Run does the work; the other methods may be used at any time.
type Manager struct {
	cfg    Config
	roots  *x509.CertPool
	log    *slog.Logger
	live   atomic.Pointer[certmagic.Config] // set while Run runs
	timing timing
}

// timing is when certificates are renewed; zero values are the defaults of certmagic: in the last third of the validity,
// looked at every 10 minutes.
type timing struct {
	ratio float64
	every time.Duration
}

// New returns a manager. It reads the roots and contacts nobody.
func New(cfg Config, log *slog.Logger) (*Manager, error) {
	if err := cfg.Check(); err != nil {
		return nil, err
	}
	m := &Manager{cfg: cfg, log: log}
	if cfg.Root == "" {
		return m, nil
	}
	pem, err := os.ReadFile(cfg.Root)
	if err != nil {
		return nil, fmt.Errorf("acme: root: %w", err)
	}
	m.roots = x509.NewCertPool()
	if !m.roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("acme: root %s: no certificate in it: want PEM with the roots of %s", cfg.Root, cfg.Directory)
	}
	return m, nil
}

// Run obtains what is missing, calls ready once every name has a certificate, and renews until ctx ends. A directory that
// does not answer is asked again, ever more rarely; what is on disk and still valid serves meanwhile. An address that
// cannot be listened on is an error at once, not in two months at the first renewal.
func (m *Manager) Run(ctx context.Context, ready func()) error {
	ln, err := (&net.ListenConfig{}).Listen(ctx, "tcp", m.cfg.Listen.String())
	if err != nil {
		return fmt.Errorf("acme: listen for tls-alpn-01: %w", err)
	}
	if err := ln.Close(); err != nil {
		return fmt.Errorf("acme: listen for tls-alpn-01: %w", err)
	}
	magic, cache := m.start()
	defer cache.Stop()
	m.live.Store(magic)
	defer m.live.Store(nil)
	if err := m.obtain(ctx, magic, cache); err != nil {
		return nil // ctx ended
	}
	ready()
	<-ctx.Done()
	return nil
}

// obtain returns nil when every name has a certificate that is valid now, and an error only when ctx ended before.
func (m *Manager) obtain(ctx context.Context, magic *certmagic.Config, cache *certmagic.Cache) error {
	wait := backoff.NewExponentialBackOff()
	wait.InitialInterval, wait.MaxInterval = time.Second, 5*time.Minute
	for {
		// A failed renewal of a certificate that still lives is no reason to keep the service down.
		err := magic.ManageSync(ctx, m.cfg.Names)
		if missing := m.missing(cache); missing == nil {
			if err != nil {
				m.log.Warn("server certificate not renewed, the old one serves", "err", err)
			}
			return nil
		} else if err == nil {
			err = missing
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		next := wait.NextBackOff()
		m.log.Warn("no server certificate yet", "directory", m.cfg.Directory, "err", err, "again_in", next)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(next):
		}
	}
}

// missing says which name has no certificate that is valid now; nil = none.
func (m *Manager) missing(cache *certmagic.Cache) error {
	for _, n := range m.cfg.Names {
		alive := func(c certmagic.Certificate) bool { return !c.Expired() }
		if !slices.ContainsFunc(cache.AllMatchingCertificates(n), alive) {
			return fmt.Errorf("acme: %s: no certificate that is valid now", n)
		}
	}
	return nil
}

func (m *Manager) start() (*certmagic.Config, *certmagic.Cache) {
	logger := zapTo(m.log)
	var magic *certmagic.Config
	cache := certmagic.NewCache(certmagic.CacheOptions{
		GetConfigForCert:   func(certmagic.Certificate) (*certmagic.Config, error) { return magic, nil },
		RenewCheckInterval: m.timing.every,
		Logger:             logger,
	})
	magic = certmagic.New(cache, certmagic.Config{
		RenewalWindowRatio: m.timing.ratio,
		DefaultServerName:  m.cfg.Names[0], // callers by address send no server name (RFC 6066 section 3)
		Storage:            &certmagic.FileStorage{Path: m.cfg.Dir},
		OCSP:               certmagic.OCSPConfig{DisableStapling: true}, // no caller of ours looks at it
		OnEvent:            m.event,
		Logger:             logger,
	})
	magic.Issuers = []certmagic.Issuer{certmagic.NewACMEIssuer(magic, certmagic.ACMEIssuer{
		CA: m.cfg.Directory,
		// Without an address certmagic asks for one on the terminal; a space is trimmed, and it does not ask.
		Email:                     cmp.Or(m.cfg.Email, " "),
		Agreed:                    true, // configuring a directory is the agreement to its terms
		TrustedRoots:              m.roots,
		DisableHTTPChallenge:      true,
		DisableDistributedSolvers: true,
		ListenHost:                m.cfg.Listen.Addr().String(),
		AltTLSALPNPort:            int(m.cfg.Listen.Port()),
		HTTPProxy:                 func(*http.Request) (*url.URL, error) { return nil, nil }, // nothing from the environment
		Logger:                    logger,
	})}
	return magic, cache
}

func (m *Manager) event(_ context.Context, name string, data map[string]any) error {
	if name == "cert_obtained" {
		m.log.Info("server certificate obtained", "name", data["identifier"], "renewal", data["renewal"])
	}
	return nil
}

// GetCertificate returns the certificate for a handshake, as tlsid.Source.ServerShowing wants it.
func (m *Manager) GetCertificate(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	magic := m.live.Load()
	if magic == nil {
		return nil, errors.New("acme: the manager does not run")
	}
	return magic.GetCertificate(hello)
}
