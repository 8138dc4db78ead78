package tlsid

import (
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"strconv"
	"sync/atomic"
	"time"
)

// Certificate returns the certificate for a handshake, as tls.Config wants it.
type Certificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)

// Server returns the configuration of a listener: TLS 1.3, a client certificate of this CA required.
func (s *Source) Server() *tls.Config { return s.server(tls.RequireAndVerifyClientCert, nil) }

// ServerShowing is Server with a certificate to show that comes from elsewhere (ACME).
func (s *Source) ServerShowing(c Certificate) *tls.Config {
	return s.server(tls.RequireAndVerifyClientCert, c)
}

// OpenServer is Server for a service that also takes callers without a certificate. One that is shown must still be of this
// CA.
func (s *Source) OpenServer() *tls.Config { return s.server(tls.VerifyClientCertIfGiven, nil) }

// serving is the configuration of the connections that begin while material and period are the same.
type serving struct {
	m      *material
	period int64
	conf   *tls.Config
}

func (s *Source) server(auth tls.ClientAuthType, show Certificate) *tls.Config {
	var last atomic.Pointer[serving]
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		NextProtos: []string{"h2"},
		// So that a reload reaches the next handshake. Connections share what it returns: of its own for each it would cost
		// memory for as long as the connection lives.
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			m, period := s.cur.Load(), s.now().Unix()/int64(ticketPeriod/time.Second)
			if l := last.Load(); l != nil && l.m == m && l.period == period {
				return l.conf, nil
			}
			keys, err := m.ticketKeys(period)
			if err != nil {
				return nil, err
			}
			conf := &tls.Config{
				MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, Time: s.now,
				ClientAuth: auth, ClientCAs: m.roots, VerifyConnection: s.verifyCaller,
			}
			if conf.GetCertificate = show; show == nil {
				conf.Certificates = []tls.Certificate{m.cert}
			}
			conf.SetSessionTicketKeys(keys)
			last.Store(&serving{m, period, conf})
			return conf, nil
		},
	}
}

// ticketPeriod is how long tickets are sealed with one key. They can be opened for one more period.
const ticketPeriod = 24 * time.Hour

// ticketKeys returns the keys of a period and of the one before. They are made of the certificate's private key: tickets
// outlive a restart without anything secret on disk, and end with the key. A ticket says which certificate its holder has
// shown, so these keys are as secret as that of the authority.
func (m *material) ticketKeys(period int64) ([][32]byte, error) {
	keys := make([][32]byte, 2)
	for i := range keys {
		k, err := hkdf.Key(sha256.New, m.tickets, nil, "dstm session tickets "+strconv.FormatInt(period-int64(i), 10), len(keys[i]))
		if err != nil {
			return nil, fmt.Errorf("tls: session tickets: %w", err)
		}
		keys[i] = [32]byte(k)
	}
	return keys, nil
}

// verifyCaller looks at what a resumed session does not bring up again by itself: a list or a time that has come since the
// certificate was shown. The chain was verified then, and crypto/tls wants its root to be among those of now.
func (s *Source) verifyCaller(cs tls.ConnectionState) error {
	if err := s.checkRevoked(cs); err != nil {
		return err
	}
	if cs.DidResume {
		for _, c := range cs.PeerCertificates {
			if err := inForce(c, s.now()); err != nil {
				return fmt.Errorf("tls: certificate of %s: %w", c.Subject.CommonName, err)
			}
		}
	}
	return nil
}

// Client returns the configuration of a caller: TLS 1.3, the server's name verified against this CA. A server
// certificate that carries an identity of DSTM must be of role svc and of this cell; one without (ACME) passes by name.
// Callers that share a configuration share one session to resume.
func (s *Source) Client(serverName string) *tls.Config {
	return s.client(serverName, func(cs tls.ConnectionState) error { return s.verifyServer(cs, serverName) })
}

// Peer returns the configuration of a caller of another daemon of this cell, which must show the identity of that role
// and name. The certificate's names and addresses do not matter: the identity is what was issued.
func (s *Source) Peer(role Role, name string) *tls.Config {
	return s.client("", func(cs tls.ConnectionState) error { return s.verifyPeer(cs, role, name) })
}

func (s *Source) client(serverName string, verify func(tls.ConnectionState) error) *tls.Config {
	last := &session{s: s}
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		NextProtos: []string{"h2"},
		ServerName: serverName,
		Time:       s.now,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return &s.cur.Load().cert, nil
		},
		ClientSessionCache: last,
		// The standard verification has fixed roots; ours follow the file, so the chain is verified below instead, of resumed
		// sessions too.
		InsecureSkipVerify: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			err := errors.Join(s.checkRevoked(cs), verify(cs))
			if err != nil {
				last.forget() // what it has may be better by now, and only a full handshake shows it
			}
			return err
		},
	}
}

// verifyChain verifies what the other side, a server, showed. name is its DNS name; empty = any.
func (s *Source) verifyChain(cs tls.ConnectionState, name string) (*x509.Certificate, error) {
	if len(cs.PeerCertificates) == 0 {
		return nil, errors.New("no certificate was sent")
	}
	opts := x509.VerifyOptions{
		Roots: s.cur.Load().roots, DNSName: name, CurrentTime: s.now(), Intermediates: x509.NewCertPool(),
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, c := range cs.PeerCertificates[1:] {
		opts.Intermediates.AddCert(c)
	}
	leaf := cs.PeerCertificates[0]
	_, err := leaf.Verify(opts)
	return leaf, err
}

func (s *Source) verifyServer(cs tls.ConnectionState, name string) error {
	leaf, err := s.verifyChain(cs, name)
	if err != nil {
		return fmt.Errorf("tls: server certificate for %q: %w", name, err)
	}
	own := s.ID()
	id, err := FromCert(leaf)
	switch {
	case errors.Is(err, ErrNoID):
		return nil
	case err != nil:
		return fmt.Errorf("tls: server certificate for %q: %w", name, err)
	case id.Role != RoleSvc || id.Cell != own.Cell || own.TrustDomain != "" && id.TrustDomain != own.TrustDomain:
		return fmt.Errorf("tls: server is %s: want role svc of cell %q in trust domain %q", id, own.Cell, own.TrustDomain)
	}
	return nil
}

func (s *Source) verifyPeer(cs tls.ConnectionState, role Role, name string) error {
	leaf, err := s.verifyChain(cs, "")
	if err != nil {
		return fmt.Errorf("tls: certificate of %s %q: %w", role, name, err)
	}
	id, err := FromCert(leaf)
	if err != nil {
		return fmt.Errorf("tls: certificate of %s %q: %w", role, name, err)
	}
	own := s.ID()
	if want := (ID{TrustDomain: own.TrustDomain, Cell: own.Cell, Role: role, Name: name}); id != want {
		return fmt.Errorf("tls: peer is %s: want %s", id, want)
	}
	return nil
}
