package tlsid

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
)

// Peer returns the configuration of a caller of another daemon of this cell, which must show the identity of that role
// and name. The certificate's names and addresses do not matter: the identity is what was issued.
func (s *Source) Peer(role Role, name string) *tls.Config {
	c := s.Client("")
	c.VerifyConnection = func(cs tls.ConnectionState) error {
		return errors.Join(s.checkRevoked(cs), s.verifyPeer(cs, role, name))
	}
	return c
}

func (s *Source) verifyPeer(cs tls.ConnectionState, role Role, name string) error {
	m := s.cur.Load()
	if len(cs.PeerCertificates) == 0 {
		return errors.New("tls: peer sent no certificate")
	}
	opts := x509.VerifyOptions{
		Roots: m.roots, CurrentTime: s.now(), Intermediates: x509.NewCertPool(),
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, c := range cs.PeerCertificates[1:] {
		opts.Intermediates.AddCert(c)
	}
	leaf := cs.PeerCertificates[0]
	if _, err := leaf.Verify(opts); err != nil {
		return fmt.Errorf("tls: certificate of %s %q: %w", role, name, err)
	}
	id, err := FromCert(leaf)
	if err != nil {
		return fmt.Errorf("tls: certificate of %s %q: %w", role, name, err)
	}
	if want := (ID{TrustDomain: m.id.TrustDomain, Cell: m.id.Cell, Role: role, Name: name}); id != want {
		return fmt.Errorf("tls: peer is %s: want %s", id, want)
	}
	return nil
}
