package tlsid_test

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dstm-project/dstm/internal/pki"
	"github.com/dstm-project/dstm/internal/tlsid"
)

// number is a serial number, which nobody has.
var number = big.NewInt(4711)

// critical says that a list is a part of one (RFC 5280 section 5.2.5), which must not pass for a whole.
func critical(l *x509.RevocationList) {
	l.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 28}, Critical: true, Value: []byte{0x30, 0}}}
}

// TestPush: what is sent is used only when one of our authorities has signed it and it is newer; all else is counted and
// changes nothing.
func TestPush(t *testing.T) {
	ca, foreign := newCA(t), newCA(t)
	tep := newEnd(t, ca, tlsid.RoleTEP, "tep1")
	victim := newEnd(t, ca, tlsid.RoleHost, "host1").cert()
	other := newEnd(t, ca, tlsid.RoleHost, "host2").cert()
	current := makeList(t, ca, 5, nil, victim.SerialNumber)
	if err := tep.src.Push(current); err != nil {
		t.Fatal(err)
	}
	forged := append([]byte(nil), makeList(t, ca, 9, nil, number)...)
	forged[len(forged)-1] ^= 1
	for _, c := range []struct {
		name   string
		der    []byte
		result string
		is     error
	}{
		{"the same again", current, "known", nil},
		{"the same number", makeList(t, ca, 5, nil, number), "older", tlsid.ErrListOlder},
		{"a lower number", makeList(t, ca, 4, nil, number), "older", tlsid.ErrListOlder},
		{"another authority of the same name", makeList(t, foreign, 9, nil, number), "signature", tlsid.ErrListSignature},
		{"a bit of the signature", forged, "signature", tlsid.ErrListSignature},
		{"garbage", []byte("no list"), "garbage", tlsid.ErrListGarbage},
		{"nothing", nil, "garbage", tlsid.ErrListGarbage},
		{"half of it", current[:len(current)/2], "garbage", tlsid.ErrListGarbage},
		{"a part of a list", makeList(t, ca, 9, critical, number), "garbage", tlsid.ErrListGarbage},
		{"PEM", pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: makeList(t, ca, 9, nil, number)}), "garbage", tlsid.ErrListGarbage},
		{"too large", make([]byte, tlsid.MaxList+1), "large", tlsid.ErrListLarge},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := tep.count("x_tls_pushed_lists_total", c.result)
			if err := tep.src.Push(c.der); !errors.Is(err, c.is) {
				t.Errorf("error %v, want %v", err, c.is)
			}
			if n := tep.count("x_tls_pushed_lists_total", c.result) - before; n != 1 {
				t.Errorf("counted %v times as %s, want once", n, c.result)
			}
			if tep.src.Revoked(victim) == nil || tep.src.Revoked(other) != nil || len(tep.src.Lists()) != 1 {
				t.Error("the list in force is another one")
			}
		})
	}
	due := time.Now().Add(-time.Hour).Truncate(time.Second)
	overdue := makeList(t, ca, 6, func(l *x509.RevocationList) { l.ThisUpdate, l.NextUpdate = due.Add(-time.Hour), due }, victim.SerialNumber, other.SerialNumber)
	if err := tep.src.Push(overdue); err != nil || tep.src.Revoked(other) == nil {
		t.Errorf("a newer list that is overdue: %v, or not used: the one before knows less", err)
	}
	if !strings.Contains(tep.log.String(), "a revocation list is overdue") {
		t.Error("nothing is said about the overdue list")
	}
	if at := tep.count("x_tls_list_due_timestamp_seconds", ""); at != float64(due.Unix()) {
		t.Errorf("due at %v, want %d", at, due.Unix())
	}
}

// TestCrossSigned: one authority in ca cannot take back what another has issued.
func TestCrossSigned(t *testing.T) {
	ca, second := newCA(t), t.TempDir()
	if err := pki.Init(second, "example.org", time.Hour); err != nil {
		t.Fatal(err)
	}
	tep := newEnd(t, ca, tlsid.RoleTEP, "tep1")
	var both []byte
	for _, dir := range []string{ca, second} {
		b, err := os.ReadFile(filepath.Join(dir, "ca.pem"))
		if err != nil {
			t.Fatal(err)
		}
		both = append(both, b...)
	}
	if err := os.WriteFile(tep.files.CA, both, 0o600); err != nil {
		t.Fatal(err)
	}
	tep.src.Reload()
	cert := tep.cert()
	if err := tep.src.Push(makeList(t, second, 1, nil, cert.SerialNumber)); err != nil {
		t.Fatal(err)
	}
	if err := tep.src.Revoked(cert); err != nil {
		t.Errorf("another authority took it back: %v", err)
	}
	if err := tep.src.Push(makeList(t, ca, 1, nil, cert.SerialNumber)); err != nil || tep.src.Revoked(cert) == nil {
		t.Errorf("its own did not: %v", err)
	}
	if n := len(tep.src.Lists()); n != 2 {
		t.Errorf("%d lists, want one of each authority", n)
	}
}

// TestPushAndFile: the newest list counts, wherever it comes from, as long as its authority is trusted; a bad file keeps
// nobody from getting a new certificate.
func TestPushAndFile(t *testing.T) {
	ca := newCA(t)
	e := newEnd(t, ca, tlsid.RoleTEP, "tep1")
	e.files.CRL = filepath.Join(t.TempDir(), "crl.pem")
	file := func(number int64, serials ...*big.Int) {
		t.Helper()
		b := pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: makeList(t, ca, number, nil, serials...)})
		if err := os.WriteFile(e.files.CRL, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	a, b, c := newEnd(t, ca, tlsid.RoleHost, "a").cert(), newEnd(t, ca, tlsid.RoleHost, "b").cert(), newEnd(t, ca, tlsid.RoleHost, "c").cert()
	revoked := func(want ...*x509.Certificate) {
		t.Helper()
		n := 0
		for _, x := range []*x509.Certificate{a, b, c} {
			if e.src.Revoked(x) != nil {
				n++
			}
		}
		for _, x := range want {
			if e.src.Revoked(x) == nil || n != len(want) {
				t.Fatalf("%d revoked, or not %s", n, x.Subject.CommonName)
			}
		}
	}
	file(3, a.SerialNumber)
	e.open()
	revoked(a)
	if err := e.src.Push(makeList(t, ca, 5, nil, a.SerialNumber, b.SerialNumber)); err != nil {
		t.Fatal(err)
	}
	revoked(a, b)
	e.renew() // files change, and the list of the file does not come back
	revoked(a, b)
	file(4, c.SerialNumber)
	e.renew()
	revoked(a, b)
	if !strings.Contains(e.log.String(), "number 4, in force is 5") {
		t.Error("nothing is said about the file that is behind")
	}
	if leaf, err := e.src.Client("x").GetClientCertificate(nil); err != nil || !leaf.Leaf.Equal(e.cert()) {
		t.Error("the new certificate is not used because of the list")
	}
	file(6, a.SerialNumber, b.SerialNumber, c.SerialNumber)
	e.src.Reload()
	revoked(a, b, c)
	if err := os.WriteFile(e.files.CRL, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	e.src.Reload()
	if revoked(a, b, c); !strings.Contains(e.log.String(), "not reloaded, the old ones stay") {
		t.Error("nothing is said about an empty file")
	}
	// Another authority, of the same name: what the former took back is not its business, and its numbers begin anew.
	ca = newCA(t)
	b2, err := os.ReadFile(filepath.Join(ca, "ca.pem"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(e.files.CA, b2, 0o600); err != nil {
		t.Fatal(err)
	}
	file(1, number)
	e.src.Reload()
	if n := len(e.src.Lists()); n != 1 || e.src.Revoked(a) != nil {
		t.Errorf("%d lists, or that of an authority that is gone is in force", n)
	}
}

// FuzzPush: whatever is sent, nothing breaks, and what was taken back stays taken back.
func FuzzPush(f *testing.F) {
	ca := newCA(f)
	host := newEnd(f, ca, tlsid.RoleHost, "host1")
	victim := newEnd(f, ca, tlsid.RoleHost, "host2").cert()
	list := makeList(f, ca, 7, nil, victim.SerialNumber)
	f.Add(list)
	f.Add(makeList(f, ca, 8, nil, number))
	f.Add(makeList(f, ca, 8, critical, number))
	f.Add(makeList(f, newCA(f), 8, nil, number))
	f.Add([]byte{0x30, 0x80})
	f.Add([]byte(nil))
	if err := host.src.Push(list); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, der []byte) {
		if err := host.src.Push(der); err == nil && len(host.src.Lists()) != 1 {
			t.Error("a list of nobody is in force")
		}
		// The seeds hold the only lists there are that the authority has signed.
		if host.src.Revoked(victim) == nil && host.src.Revoked(&x509.Certificate{RawIssuer: victim.RawIssuer, SerialNumber: number}) == nil {
			t.Error("what was taken back no longer is")
		}
	})
}
