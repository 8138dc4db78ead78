// Package pki is the built-in certificate authority for labs and closed networks: one root, ECDSA P-256, files in PEM.
package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/google/renameio/v2"

	"github.com/dstm-project/dstm/internal/tlsid"
)

const (
	caCert  = "ca.pem"
	caKey   = "ca.key"
	crlFile = "crl.pem"
	// backdate lets a machine whose clock is a little behind use a certificate at once.
	backdate = 5 * time.Minute
)

// DefaultValid is the validity of an issued certificate when none is asked for.
const DefaultValid = 90 * 24 * time.Hour

// Init makes a new root in dir (ca.pem, ca.key). It refuses to replace one: every certificate out there would die.
func Init(dir, trustDomain string, valid time.Duration) error {
	if err := (tlsid.ID{TrustDomain: trustDomain, Cell: "x", Role: tlsid.RoleSvc, Name: "x"}).Check(); err != nil {
		return fmt.Errorf("pki init: %w", err)
	}
	if valid <= 0 {
		return fmt.Errorf("pki init: validity %s: want more than 0", valid)
	}
	for _, f := range []string{caCert, caKey} {
		if _, err := os.Lstat(filepath.Join(dir, f)); !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("pki init: %s exists: choose another directory or remove it yourself", filepath.Join(dir, f))
		}
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("pki init: %w", err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("pki init: %w", err)
	}
	serial, err := newSerial()
	if err != nil {
		return fmt.Errorf("pki init: %w", err)
	}
	now := time.Now()
	tmpl := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: "DSTM root " + trustDomain},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(valid),
		IsCA:                  true,
		BasicConstraintsValid: true,
		MaxPathLenZero:        true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		URIs:                  []*url.URL{{Scheme: "spiffe", Host: trustDomain}},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		return fmt.Errorf("pki init: %w", err)
	}
	// The key first: a certificate without its key would make the next init refuse.
	if err := writeKey(filepath.Join(dir, caKey), key); err != nil {
		return fmt.Errorf("pki init: %w", err)
	}
	if err := writePEM(filepath.Join(dir, caCert), "CERTIFICATE", der, 0o644); err != nil {
		return fmt.Errorf("pki init: %w", err)
	}
	return nil
}

// DefaultCRLValid is how long a revocation list is good for before a newer one is due.
const DefaultCRLValid = 30 * 24 * time.Hour

// Revoke takes certificates back: it adds their serial numbers to the revocation list dir/crl.pem (RFC 5280 section 5), whose
// number grows by one, and which is due again after valid. Without serials it renews the list.
func Revoke(dir string, valid time.Duration, serials ...*big.Int) (string, error) {
	path := filepath.Join(dir, crlFile)
	if err := revoke(dir, path, valid, serials); err != nil {
		return "", fmt.Errorf("pki revoke: %w", err)
	}
	return path, nil
}

func revoke(dir, path string, valid time.Duration, serials []*big.Int) error {
	root, key, err := readRoot(dir)
	if err != nil {
		return err
	}
	if valid <= 0 {
		return fmt.Errorf("validity %s: want more than 0", valid)
	}
	now := time.Now()
	list := &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: now.Add(-backdate), NextUpdate: now.Add(valid)}
	b, err := readPEM(path, "X509 CRL")
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return err
	default:
		old, err := x509.ParseRevocationList(b)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		list.RevokedCertificateEntries = old.RevokedCertificateEntries
		list.Number.Add(old.Number, list.Number)
	}
	for _, n := range serials {
		known := slices.ContainsFunc(list.RevokedCertificateEntries, func(e x509.RevocationListEntry) bool { return e.SerialNumber.Cmp(n) == 0 })
		if !known {
			list.RevokedCertificateEntries = append(list.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: n, RevocationTime: now})
		}
	}
	der, err := x509.CreateRevocationList(rand.Reader, list, root, key)
	if err != nil {
		return err
	}
	return writePEM(path, "X509 CRL", der, 0o644)
}

// Options are what a certificate carries beside its identity.
type Options struct {
	DNS       []string      // DNS SANs; the lease service needs the name that callers verify
	IPs       []netip.Addr  // IP SANs
	Valid     time.Duration // 0 = DefaultValid; cut to the root's own end
	NotBefore time.Time     // zero = now, a little back-dated
}

// Issue makes a key and a certificate for id, signed by the root in dir, as out/<name>.pem and out/<name>.key. It
// replaces earlier files of that name atomically, which is how certificates are renewed under running daemons.
func Issue(dir, out string, id tlsid.ID, o Options) (tlsid.Files, error) {
	f := tlsid.Files{
		Cert: filepath.Join(out, id.Name+".pem"), Key: filepath.Join(out, id.Name+".key"), CA: filepath.Join(dir, caCert),
	}
	if err := issue(dir, f, id, o); err != nil {
		return tlsid.Files{}, fmt.Errorf("pki issue %s: %w", id.Name, err)
	}
	return f, nil
}

// Renew replaces a certificate of the root in dir, and the key beside it, by a new certificate and key for the same identity,
// names and addresses. Running daemons take them without losing a stream. valid 0 = DefaultValid. One that was revoked is not
// renewed.
func Renew(dir, cert string, valid time.Duration) (tlsid.Files, error) {
	stem, ok := strings.CutSuffix(cert, ".pem")
	f := tlsid.Files{Cert: cert, Key: stem + ".key", CA: filepath.Join(dir, caCert)}
	if !ok {
		return tlsid.Files{}, fmt.Errorf("pki renew %s: want NAME.pem, with NAME.key beside it", cert)
	}
	if err := renew(dir, f, valid); err != nil {
		return tlsid.Files{}, fmt.Errorf("pki renew %s: %w", cert, err)
	}
	return f, nil
}

func renew(dir string, f tlsid.Files, valid time.Duration) error {
	der, err := readPEM(f.Cert, "CERTIFICATE")
	if err != nil {
		return err
	}
	old, err := x509.ParseCertificate(der)
	if err != nil {
		return err
	}
	root, _, err := readRoot(dir)
	if err != nil {
		return err
	}
	if err := old.CheckSignatureFrom(root); err != nil {
		return fmt.Errorf("it is not of the root in %s: %w", dir, err)
	}
	switch der, err := readPEM(filepath.Join(dir, crlFile), "X509 CRL"); {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return err
	default:
		list, err := x509.ParseRevocationList(der)
		if err != nil {
			return fmt.Errorf("%s: %w", crlFile, err)
		}
		if slices.ContainsFunc(list.RevokedCertificateEntries, func(e x509.RevocationListEntry) bool { return e.SerialNumber.Cmp(old.SerialNumber) == 0 }) {
			return errors.New("it was revoked: issue a new one if its holder is trusted again")
		}
	}
	id, err := tlsid.FromCert(old)
	if err != nil {
		return err
	}
	o := Options{DNS: old.DNSNames, Valid: valid}
	for _, ip := range old.IPAddresses {
		a, _ := netip.AddrFromSlice(ip) // x509 takes no others
		o.IPs = append(o.IPs, a.Unmap())
	}
	return issue(dir, f, id, o)
}

func issue(dir string, f tlsid.Files, id tlsid.ID, o Options) error {
	if err := id.Check(); err != nil {
		return err
	}
	root, rootKey, err := readRoot(dir)
	if err != nil {
		return err
	}
	if want := root.URIs; len(want) != 1 || want[0].Host != id.TrustDomain {
		return fmt.Errorf("trust domain %q: the root in %s is %q", id.TrustDomain, dir, root.Subject.CommonName)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	tmpl, err := leaf(root, id, o)
	if err != nil {
		return err
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, root, key.Public(), rootKey)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(f.Cert), 0o755); err != nil {
		return err
	}
	if err := writeKey(f.Key, key); err != nil {
		return err
	}
	return writePEM(f.Cert, "CERTIFICATE", der, 0o644)
}

func leaf(root *x509.Certificate, id tlsid.ID, o Options) (*x509.Certificate, error) {
	uri, err := url.Parse(id.String())
	if err != nil {
		return nil, err
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	if o.Valid == 0 {
		o.Valid = DefaultValid
	}
	if o.Valid < 0 {
		return nil, fmt.Errorf("validity %s: want more than 0", o.Valid)
	}
	if o.NotBefore.IsZero() {
		o.NotBefore = time.Now().Add(-backdate)
		o.Valid += backdate
	}
	end := o.NotBefore.Add(o.Valid)
	if end.After(root.NotAfter) {
		end = root.NotAfter
	}
	c := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: id.Name},
		NotBefore:    o.NotBefore,
		NotAfter:     end,
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		URIs:         []*url.URL{uri},
		DNSNames:     o.DNS,
	}
	// Gateways answer each other's questions, so they serve as well as call.
	if id.Role == tlsid.RoleSvc || id.Role == tlsid.RoleTEP {
		c.ExtKeyUsage = append(c.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
	}
	for _, ip := range o.IPs {
		c.IPAddresses = append(c.IPAddresses, net.IP(ip.AsSlice()))
	}
	return c, nil
}

func readRoot(dir string) (*x509.Certificate, *ecdsa.PrivateKey, error) {
	cb, err := readPEM(filepath.Join(dir, caCert), "CERTIFICATE")
	if err != nil {
		return nil, nil, err
	}
	cert, err := x509.ParseCertificate(cb)
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", filepath.Join(dir, caCert), err)
	}
	kb, err := readPEM(filepath.Join(dir, caKey), "PRIVATE KEY")
	if err != nil {
		return nil, nil, err
	}
	k, err := x509.ParsePKCS8PrivateKey(kb)
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", filepath.Join(dir, caKey), err)
	}
	key, ok := k.(*ecdsa.PrivateKey)
	if !ok {
		return nil, nil, fmt.Errorf("%s: key is %T: want ECDSA", filepath.Join(dir, caKey), k)
	}
	if time.Now().After(cert.NotAfter) {
		return nil, nil, fmt.Errorf("%s: root expired at %s", filepath.Join(dir, caCert), cert.NotAfter.UTC().Format(time.RFC3339))
	}
	return cert, key, nil
}

func newSerial() (*big.Int, error) {
	return rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
}

func readPEM(path, kind string) ([]byte, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	blk, _ := pem.Decode(b)
	if blk == nil || blk.Type != kind {
		return nil, fmt.Errorf("%s: no PEM block %q in it", path, kind)
	}
	return blk.Bytes, nil
}

func writeKey(path string, key *ecdsa.PrivateKey) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	return writePEM(path, "PRIVATE KEY", der, 0o600)
}

func writePEM(path, kind string, der []byte, mode os.FileMode) error {
	return renameio.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), mode, renameio.IgnoreUmask())
}
