package tlsid

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"time"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
)

// revocations are the certificates that a revocation list (RFC 5280 section 5) takes back.
type revocations struct {
	issuer  string // DER of the issuer's name
	serials map[string]bool
	next    time.Time // when a newer list is due
}

// parseRevocations reads a list that one of the authorities has signed. One that is overdue still counts: what it takes back
// stays taken back.
func parseRevocations(path string, b, authorities []byte) (*revocations, error) {
	if blk, _ := pem.Decode(b); blk != nil {
		b = blk.Bytes
	}
	list, err := x509.ParseRevocationList(b)
	if err != nil {
		return nil, fmt.Errorf("tls: crl %s: %w: want a certificate revocation list, as dstm pki revoke writes it", path, err)
	}
	signed := false
	for blk, rest := pem.Decode(authorities); blk != nil; blk, rest = pem.Decode(rest) {
		ca, err := x509.ParseCertificate(blk.Bytes)
		signed = signed || err == nil && list.CheckSignatureFrom(ca) == nil
	}
	if !signed {
		return nil, fmt.Errorf("tls: crl %s: not signed by an authority in ca: it is not used", path)
	}
	r := &revocations{issuer: string(list.RawIssuer), serials: map[string]bool{}, next: list.NextUpdate}
	for _, e := range list.RevokedCertificateEntries {
		r.serials[e.SerialNumber.String()] = true
	}
	return r, nil
}

func (r *revocations) has(c *x509.Certificate) bool {
	return r != nil && string(c.RawIssuer) == r.issuer && r.serials[c.SerialNumber.String()]
}

// Revoked returns an error when the revocation list that is in force takes a certificate back.
func (s *Source) Revoked(c *x509.Certificate) error {
	if !s.cur.Load().revoked.has(c) {
		return nil
	}
	return fmt.Errorf("certificate %x of %s is revoked", c.SerialNumber, c.Subject.CommonName)
}

// checkRevoked looks at every certificate that the other side showed. It is for tls.Config.VerifyConnection, which runs for
// resumed sessions too.
func (s *Source) checkRevoked(cs tls.ConnectionState) error {
	for _, c := range cs.PeerCertificates {
		if err := s.Revoked(c); err != nil {
			return fmt.Errorf("tls: %w", err)
		}
	}
	return nil
}

// OnReload makes Watch call f after each reload of changed files. It must be called before Watch.
func (s *Source) OnReload(f func()) { s.onReload = append(s.onReload, f) }

// PeerCert returns the verified certificate of the caller of a gRPC method; nil when it showed none.
func PeerCert(ctx context.Context) *x509.Certificate {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok || len(info.State.VerifiedChains) == 0 {
		return nil
	}
	return info.State.VerifiedChains[0][0]
}
