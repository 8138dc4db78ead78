package etcdstore

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/dstm-project/dstm/leasesvc/store/etcdstore/etcdtest"
)

// authority signs certificates in files.
type authority struct {
	dir  string
	key  crypto.Signer
	cert *x509.Certificate
}

func newAuthority(t *testing.T, name string) *authority {
	a := &authority{dir: t.TempDir()}
	a.cert, a.key = a.write(t, "ca", &x509.Certificate{IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}, name)
	return a
}

// issue returns the files of a certificate for loopback.
func (a *authority) issue(t *testing.T, name string) Files {
	a.write(t, name, &x509.Certificate{
		IPAddresses: []net.IP{net.IPv6loopback}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, name)
	in := func(file string) string { return filepath.Join(a.dir, file) }
	return Files{Cert: in(name + ".pem"), Key: in(name + ".key"), CA: in("ca.pem")}
}

func (a *authority) write(t *testing.T, file string, c *x509.Certificate, name string) (*x509.Certificate, crypto.Signer) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c.SerialNumber, c.Subject = big.NewInt(time.Now().UnixNano()), pkix.Name{CommonName: name}
	c.NotBefore, c.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = c, key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for ending, b := range map[string]*pem.Block{"pem": {Type: "CERTIFICATE", Bytes: der}, "key": {Type: "PRIVATE KEY", Bytes: secret}} {
		if err := os.WriteFile(filepath.Join(a.dir, file+"."+ending), pem.EncodeToMemory(b), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	made, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return made, key
}

// TestTLS: etcd and the store know each other by certificates, and a stranger gets nowhere, in either place.
func TestTLS(t *testing.T) {
	t.Parallel()
	ours, theirs := newAuthority(t, "ours"), newAuthority(t, "theirs")
	member := ours.issue(t, "member")
	own, err := ours.issue(t, "operator").client()
	if err != nil {
		t.Fatal(err)
	}
	c, err := etcdtest.Start(etcdtest.Options{Dir: t.TempDir(), Members: 3, TLS: etcdtest.TLS(member), Client: own})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	good := ours.issue(t, "lease1")
	o := options(t, c)
	o.TLS = good
	if err := Create(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	s := open(t, o)
	if _, err := s.Load(t.Context()); err != nil {
		t.Error(err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	stranger := theirs.issue(t, "lease1")
	for _, c := range []struct {
		name, want string
		files      Files
	}{
		{"etcd does not know the store", "tls: unknown certificate authority", Files{Cert: stranger.Cert, Key: stranger.Key, CA: good.CA}},
		{"the store does not know etcd", "certificate signed by unknown authority", Files{Cert: good.Cert, Key: good.Key, CA: stranger.CA}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var said states
			o := o
			o.TLS, o.OnState = c.files, said.add
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan error, 1)
			go func() {
				s, err := Open(ctx, o)
				if err == nil {
					s.Close()
				}
				ended <- err
			}()
			said.wait(t, c.want)
			cancel()
			if err := <-ended; !errors.Is(err, context.Canceled) {
				t.Errorf("error %v, want the context's", err)
			}
		})
	}
}
