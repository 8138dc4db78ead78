package tlsid

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"math/big"
	"slices"
	"time"
)

// list is a revocation list (RFC 5280 section 5) of an authority in ca: certificates that it takes back.
type list struct {
	der     []byte
	issuer  authority
	number  *big.Int
	serials map[string]struct{}
	next    time.Time // when a newer list is due
}

// authority tells authorities apart: by name, and by key, which changes while the name stays.
type authority struct {
	name string // DER
	key  string // its identifier (RFC 5280 section 4.2.1.2); empty = none is given
}

// MaxList is how many bytes a list may have that is pushed: some 27,000 certificates.
const MaxList = 1 << 20

// What can be wrong with a list.
var (
	ErrListGarbage   = errors.New("no certificate revocation list")
	ErrListLarge     = fmt.Errorf("more than %d bytes", MaxList)
	ErrListSignature = errors.New("not signed by an authority in ca")
	ErrListOlder     = errors.New("not newer than the list in force")
)

// parseList reads a list that one of the authorities has signed. One that is overdue still counts: what it takes back stays
// taken back, and the list before it knows less.
func parseList(der []byte, cas []*x509.Certificate) (*list, error) {
	crl, err := x509.ParseRevocationList(der)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrListGarbage, err)
	}
	if crl.Number == nil {
		return nil, fmt.Errorf("%w: it has no number, which says what is newer (RFC 5280 section 5.2.3)", ErrListGarbage)
	}
	if err := checkWhole(crl); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrListGarbage, err)
	}
	signer := slices.IndexFunc(cas, func(ca *x509.Certificate) bool {
		return bytes.Equal(crl.RawIssuer, ca.RawSubject) && crl.CheckSignatureFrom(ca) == nil
	})
	if signer < 0 {
		return nil, fmt.Errorf("%w: it is not used", ErrListSignature)
	}
	l := &list{
		der: der, issuer: authority{string(crl.RawIssuer), string(cas[signer].SubjectKeyId)}, number: crl.Number, next: crl.NextUpdate,
		serials: make(map[string]struct{}, len(crl.RevokedCertificateEntries)),
	}
	for _, e := range crl.RevokedCertificateEntries {
		l.serials[string(e.SerialNumber.Bytes())] = struct{}{}
	}
	return l, nil
}

// checkWhole refuses what only looks like a whole list of its issuer: a part of one, changes to one, or one of other issuers'
// certificates. Such lists say so by critical extensions (RFC 5280 sections 5.2.4, 5.2.5 and 5.3.3).
func checkWhole(crl *x509.RevocationList) error {
	all := [][]pkix.Extension{crl.Extensions}
	for _, e := range crl.RevokedCertificateEntries {
		all = append(all, e.Extensions)
	}
	for _, x := range slices.Concat(all...) {
		if x.Critical {
			return fmt.Errorf("critical extension %s: want a whole list of one authority", x.Id)
		}
	}
	return nil
}

// parseLists reads the lists of the file: PEM with one for each authority, or DER.
func (s *Source) parseLists(m *material) error {
	m.lists = map[authority]*list{}
	if s.files.CRL == "" {
		return nil
	}
	blk, rest := pem.Decode(m.pem[3])
	if blk == nil {
		blk = &pem.Block{Bytes: rest}
	}
	for ; blk != nil; blk, rest = pem.Decode(rest) {
		l, err := parseList(blk.Bytes, m.cas)
		if err == nil {
			err = m.put(l)
		}
		if err != nil {
			return fmt.Errorf("tls: crl %s: %w: want lists as dstm pki revoke writes them, one of each authority", s.files.CRL, err)
		}
	}
	return nil
}

// put takes a list that is newer than the one of its authority.
func (m *material) put(l *list) error {
	if old := m.lists[l.issuer]; old != nil && l.number.Cmp(old.number) <= 0 {
		return fmt.Errorf("%w: number %d, in force is %d", ErrListOlder, l.number, old.number)
	}
	m.lists[l.issuer] = l
	return nil
}

// keep takes over from the material before what is newer there, unless its authority is gone. A list that was pushed may be
// ahead of the file; a new file that is behind has an error, which is to be logged.
func (m *material) keep(old *material) (behind error) {
	for issuer, was := range old.lists {
		now := m.lists[issuer]
		if now != nil && (now.number.Cmp(was.number) > 0 || bytes.Equal(now.der, was.der)) {
			continue
		}
		if _, err := parseList(was.der, m.cas); err != nil {
			continue // its authority is gone
		}
		if now != nil && !bytes.Equal(m.pem[3], old.pem[3]) {
			behind = fmt.Errorf("%w: number %d, in force is %d", ErrListOlder, now.number, was.number)
		}
		m.lists[issuer] = was
	}
	return behind
}

// Push takes a list in DER that somebody sent, if one of the authorities in ca has signed it and its number is higher than
// that of the list in force. It is kept in memory until the end of the process. The same list again is no error.
func (s *Source) Push(der []byte) error {
	s.change.Lock()
	took, err := s.push(der)
	s.sayOverdue()
	s.change.Unlock()
	s.m.Load().list(took != nil, err)
	switch {
	case err != nil:
		s.log.Warn("revocation list refused", "err", err)
	case took != nil:
		s.log.Info("revocation list in force", "number", took.number.String(), "certificates", len(took.serials))
		s.changed()
	}
	return err
}

func (s *Source) push(der []byte) (*list, error) {
	old := s.cur.Load()
	for _, l := range old.lists {
		if bytes.Equal(l.der, der) {
			return nil, nil
		}
	}
	if len(der) > MaxList {
		return nil, fmt.Errorf("tls: pushed list: %d bytes: %w", len(der), ErrListLarge)
	}
	l, err := parseList(bytes.Clone(der), old.cas)
	if err != nil {
		return nil, fmt.Errorf("tls: pushed list: %w", err)
	}
	m := *old
	m.lists = maps.Clone(old.lists)
	if err := m.put(l); err != nil {
		return nil, fmt.Errorf("tls: pushed list: %w", err)
	}
	s.cur.Store(&m)
	return l, nil
}

// Lists returns the lists in force in DER, by their SHA-256. They must not be changed.
func (s *Source) Lists() map[[sha256.Size]byte][]byte {
	m := s.cur.Load()
	out := make(map[[sha256.Size]byte][]byte, len(m.lists))
	for _, l := range m.lists {
		out[sha256.Sum256(l.der)] = l.der
	}
	return out
}

// sayOverdue logs when the first of the lists becomes overdue.
func (s *Source) sayOverdue() {
	due := s.cur.Load().due()
	if now := !due.IsZero() && s.now().After(due); now != s.overdue {
		if s.overdue = now; now {
			s.log.Warn("a revocation list is overdue; what it takes back stays so", "due", due.UTC().Format(time.RFC3339))
		}
	}
}

// due returns when the first list is due; zero when there is none.
func (m *material) due() (at time.Time) {
	for _, l := range m.lists {
		if at.IsZero() || l.next.Before(at) {
			at = l.next
		}
	}
	return at
}

// Revoked returns an error when a list in force takes a certificate back.
func (s *Source) Revoked(c *x509.Certificate) error {
	serial, issuer := c.SerialNumber.Bytes(), authority{string(c.RawIssuer), string(c.AuthorityKeyId)}
	for of, l := range s.cur.Load().lists {
		if of != issuer && (of.name != issuer.name || of.key != "" && issuer.key != "") {
			continue
		}
		if _, ok := l.serials[string(serial)]; ok {
			return fmt.Errorf("certificate %x of %s is revoked", c.SerialNumber, c.Subject.CommonName)
		}
	}
	return nil
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
