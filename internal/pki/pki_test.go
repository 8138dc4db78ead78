package pki

import (
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dstm-project/dstm/internal/tlsid"
)

const domain = "example.net"

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

func newCA(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "ca")
	if err := Init(dir, domain, 24*time.Hour); err != nil {
		t.Fatal(err)
	}
	return dir
}

func id(role tlsid.Role, name string) tlsid.ID {
	return tlsid.ID{TrustDomain: domain, Cell: "lab", Role: role, Name: name}
}

func issueT(t *testing.T, ca string, i tlsid.ID, o Options) tlsid.Files {
	t.Helper()
	f, err := Issue(ca, t.TempDir(), i, o)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestInitRefusesToReplaceARoot(t *testing.T) {
	ca := newCA(t)
	before, err := os.ReadFile(filepath.Join(ca, "ca.key"))
	if err != nil {
		t.Fatal(err)
	}
	if err := Init(ca, domain, time.Hour); err == nil || !strings.Contains(err.Error(), "ca.pem exists") {
		t.Errorf("second init: %v, want a refusal that names the file", err)
	}
	after, err := os.ReadFile(filepath.Join(ca, "ca.key"))
	if err != nil || string(before) != string(after) {
		t.Errorf("key changed by a refused init (%v)", err)
	}
}

func TestKeysArePrivate(t *testing.T) {
	ca := newCA(t)
	f := issueT(t, ca, id(tlsid.RoleHost, "host1"), Options{})
	for _, p := range []string{filepath.Join(ca, "ca.key"), f.Key} {
		st, err := os.Stat(p)
		if err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: mode %v, %v, want 0600", p, st.Mode(), err)
		}
	}
}

func TestIssueRefusals(t *testing.T) {
	ca := newCA(t)
	for _, c := range []struct {
		name string
		id   tlsid.ID
		o    Options
		want string
	}{
		{"role", tlsid.ID{TrustDomain: domain, Cell: "lab", Role: "king", Name: "x"}, Options{}, `role "king": want one of [svc tep resolver host operator]`},
		{"name", id(tlsid.RoleHost, "a/b"), Options{}, `name "a/b": want 1 to 63 of`},
		{"domain", tlsid.ID{TrustDomain: "example.com", Cell: "lab", Role: tlsid.RoleHost, Name: "x"}, Options{}, `trust domain "example.com": the root in `},
		{"validity", id(tlsid.RoleHost, "x"), Options{Valid: -time.Second}, "validity -1s: want more than 0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, err := Issue(ca, t.TempDir(), c.id, c.o); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want %q in it", err, c.want)
			}
		})
	}
}

// TestHandshake proves the chain from file to handshake: who may talk to whom, and what the refused one is told.
func TestHandshake(t *testing.T) {
	ca, other := newCA(t), newCA(t)
	dns := Options{DNS: []string{"lease1.example.net"}, IPs: []netip.Addr{netip.MustParseAddr("::1")}}
	svc := issueT(t, ca, id(tlsid.RoleSvc, "lease1"), dns)
	host := issueT(t, ca, id(tlsid.RoleHost, "host1"), Options{})
	stranger := issueT(t, other, id(tlsid.RoleHost, "host1"), Options{})
	stranger.CA = filepath.Join(ca, "ca.pem")
	fakeSvc := issueT(t, ca, id(tlsid.RoleTEP, "tep1"), dns)
	otherCell := issueT(t, ca, tlsid.ID{TrustDomain: domain, Cell: "far", Role: tlsid.RoleSvc, Name: "lease1"}, dns)
	for _, c := range []struct {
		name           string
		server, client tlsid.Files
		role           tlsid.Role
		dial           string
		want           string
	}{
		{"good", svc, host, tlsid.RoleSvc, "lease1.example.net", ""},
		{"wrong name", svc, host, tlsid.RoleSvc, "lease2.example.net", "lease2.example.net"},
		{"client of another CA", svc, stranger, tlsid.RoleSvc, "lease1.example.net", "unknown certificate authority"},
		{"gateway poses as service", fakeSvc, host, tlsid.RoleTEP, "lease1.example.net", `want role svc of cell "lab"`},
		{"service of another cell", otherCell, host, tlsid.RoleSvc, "lease1.example.net", `want role svc of cell "lab"`},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, err := tlsid.Open(c.server, c.role, quiet())
			if err != nil {
				t.Fatal(err)
			}
			cl, err := tlsid.Open(c.client, tlsid.RoleHost, quiet())
			if err != nil {
				t.Fatal(err)
			}
			err = handshake(t, s.Server(), cl.Client(c.dial))
			switch {
			case c.want == "" && err != nil:
				t.Errorf("handshake: %v", err)
			case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
				t.Errorf("handshake: %v, want %q in it", err, c.want)
			}
		})
	}
}

// handshake returns what either side has to say; with TLS 1.3 the client learns of a refusal at its first read.
func handshake(t *testing.T, s, c *tls.Config) error {
	t.Helper()
	a, b := net.Pipe()
	server, client := tls.Server(a, s), tls.Client(b, c)
	errs := make(chan error, 1)
	go func() {
		err := server.HandshakeContext(context.Background())
		if err == nil {
			_, err = server.Write([]byte("x"))
		}
		a.Close()
		errs <- err
	}()
	_, err := client.Read(make([]byte, 1))
	b.Close()
	serr := <-errs
	if err == nil {
		return nil
	}
	if errors.Is(err, io.EOF) {
		return serr
	}
	return errors.Join(err, serr)
}

func TestOpenSaysWhatIsWrong(t *testing.T) {
	ca := newCA(t)
	good := issueT(t, ca, id(tlsid.RoleHost, "host1"), Options{})
	expired := issueT(t, ca, id(tlsid.RoleHost, "old"), Options{NotBefore: time.Now().Add(-2 * time.Hour), Valid: time.Hour})
	future := issueT(t, ca, id(tlsid.RoleHost, "new"), Options{NotBefore: time.Now().Add(time.Hour), Valid: time.Hour})
	second := issueT(t, ca, id(tlsid.RoleHost, "host2"), Options{})
	for _, c := range []struct {
		name string
		f    tlsid.Files
		role tlsid.Role
		want string
	}{
		{"wrong role", good, tlsid.RoleTEP, `has role "host": this program needs role "tep"`},
		{"expired", expired, tlsid.RoleHost, "expired at "},
		{"not yet valid", future, tlsid.RoleHost, "check the clock"},
		{"unset", tlsid.Files{Cert: good.Cert, CA: good.CA}, tlsid.RoleHost, "key is not set"},
		{"missing", tlsid.Files{Cert: good.Cert + "x", Key: good.Key, CA: good.CA}, tlsid.RoleHost, "no such file"},
		{"key of another", tlsid.Files{Cert: good.Cert, Key: second.Key, CA: good.CA}, tlsid.RoleHost, "private key does not match"},
		{"root as leaf", tlsid.Files{Cert: good.CA, Key: filepath.Join(ca, "ca.key"), CA: good.CA}, tlsid.RoleHost, "want spiffe://"},
		{"ca without certificate", tlsid.Files{Cert: good.Cert, Key: good.Key, CA: good.Key}, tlsid.RoleHost, "no certificate in it"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, err := tlsid.Open(c.f, c.role, quiet()); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want %q in it", err, c.want)
			}
		})
	}
}

// TestRenew: the same identity, names and addresses, another key; nothing is renewed that this root did not issue, or that was
// taken back.
func TestRenew(t *testing.T) {
	dir, other := newCA(t), newCA(t)
	o := Options{DNS: []string{"lease1.example.net"}, IPs: []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")}}
	f, err := Issue(dir, dir, id(tlsid.RoleSvc, "lease1"), o)
	if err != nil {
		t.Fatal(err)
	}
	read := func() *x509.Certificate {
		pair, err := tls.LoadX509KeyPair(f.Cert, f.Key)
		if err != nil {
			t.Fatal(err)
		}
		return pair.Leaf
	}
	old := read()
	if got, err := Renew(dir, f.Cert, time.Hour); err != nil || got != f {
		t.Fatalf("renewed %+v, %v, want %+v", got, err, f)
	}
	now := read()
	if !reflect.DeepEqual(now.URIs, old.URIs) || !slices.Equal(now.DNSNames, old.DNSNames) || !reflect.DeepEqual(now.IPAddresses, old.IPAddresses) {
		t.Errorf("renewed for %v %v %v, want %v %v %v", now.URIs, now.DNSNames, now.IPAddresses, old.URIs, old.DNSNames, old.IPAddresses)
	}
	if now.PublicKey.(*ecdsa.PublicKey).Equal(old.PublicKey) || now.SerialNumber.Cmp(old.SerialNumber) == 0 {
		t.Error("the key or the serial number stayed")
	}
	if left := time.Until(now.NotAfter); left > time.Hour || left < time.Hour/2 {
		t.Errorf("valid for %s, want an hour", left)
	}
	if _, err := Renew(other, f.Cert, 0); err == nil || !strings.Contains(err.Error(), "it is not of the root in "+other) {
		t.Errorf("renewed by another root: %v", err)
	}
	if _, err := Renew(dir, f.Key, 0); err == nil || !strings.Contains(err.Error(), "want NAME.pem") {
		t.Errorf("a key was renewed: %v", err)
	}
	if _, err := Revoke(dir, time.Hour, now.SerialNumber); err != nil {
		t.Fatal(err)
	}
	if _, err := Renew(dir, f.Cert, 0); err == nil || !strings.Contains(err.Error(), "it was revoked") {
		t.Errorf("a revoked certificate was renewed: %v", err)
	}
	if again := read(); again.SerialNumber.Cmp(now.SerialNumber) != 0 {
		t.Error("a refusal changed the file")
	}
}
