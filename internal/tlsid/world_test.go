package tlsid_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	"google.golang.org/grpc/credentials"

	"github.com/dstm-project/dstm/internal/pki"
	"github.com/dstm-project/dstm/internal/tlsid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 20 * time.Second

// end is one identity with its files, its log and what it counts.
type end struct {
	t     testing.TB
	ca    string
	id    tlsid.ID
	files tlsid.Files
	src   *tlsid.Source
	reg   *prometheus.Registry
	log   *logged
	o     pki.Options
}

// logged is a log to look at.
type logged struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func newCA(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	if err := pki.Init(dir, "example.net", 365*24*time.Hour); err != nil {
		t.Fatal(err)
	}
	return dir
}

func newEnd(t testing.TB, ca string, role tlsid.Role, name string) *end {
	t.Helper()
	e := &end{t: t, ca: ca, id: tlsid.ID{TrustDomain: "example.net", Cell: "lab", Role: role, Name: name}}
	e.o.DNS = []string{"lease1.example.net"}
	var err error
	if e.files, err = pki.Issue(ca, t.TempDir(), e.id, e.o); err != nil {
		t.Fatal(err)
	}
	// Of its own, so that a test may put another authority there.
	b, err := os.ReadFile(e.files.CA)
	if err != nil {
		t.Fatal(err)
	}
	e.files.CA = filepath.Join(filepath.Dir(e.files.Cert), "roots.pem")
	if err := os.WriteFile(e.files.CA, b, 0o600); err != nil {
		t.Fatal(err)
	}
	e.open()
	return e
}

// open is what a start does.
func (e *end) open() {
	e.t.Helper()
	e.log = &logged{}
	var err error
	if e.src, err = tlsid.Open(e.files, e.id.Role, slog.New(slog.NewTextHandler(e.log, nil))); err != nil {
		e.t.Fatal(err)
	}
	e.reg = prometheus.NewRegistry()
	e.src.Register(e.reg, "x")
}

// renew replaces the certificate by a new one with a new key, as dstm pki issue does.
func (e *end) renew() {
	e.t.Helper()
	if _, err := pki.Issue(e.ca, filepath.Dir(e.files.Cert), e.id, e.o); err != nil {
		e.t.Fatal(err)
	}
	e.src.Reload()
}

func (e *end) cert() *x509.Certificate {
	e.t.Helper()
	b, err := os.ReadFile(e.files.Cert)
	if err != nil {
		e.t.Fatal(err)
	}
	blk, _ := pem.Decode(b)
	c, err := x509.ParseCertificate(blk.Bytes)
	if err != nil {
		e.t.Fatal(err)
	}
	return c
}

// count returns a counter or gauge; label is the value of its only label.
func (e *end) count(name, label string) float64 {
	e.t.Helper()
	fs, err := e.reg.Gather()
	if err != nil {
		e.t.Fatal(err)
	}
	for _, f := range fs {
		for _, m := range f.GetMetric() {
			if f.GetName() == name && (label == "" || m.GetLabel()[0].GetValue() == label) {
				return m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	e.t.Fatalf("no metric %s %s", name, label)
	return 0
}

// makeList signs a list as the authority in dir. change makes it another one.
func makeList(t testing.TB, dir string, number int64, change func(*x509.RevocationList), serials ...*big.Int) []byte {
	t.Helper()
	read := func(name string) []byte {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		blk, _ := pem.Decode(b)
		return blk.Bytes
	}
	ca, err := x509.ParseCertificate(read("ca.pem"))
	if err != nil {
		t.Fatal(err)
	}
	key, err := x509.ParsePKCS8PrivateKey(read("ca.key"))
	if err != nil {
		t.Fatal(err)
	}
	l := &x509.RevocationList{Number: big.NewInt(number), ThisUpdate: time.Now().Add(-time.Minute), NextUpdate: time.Now().Add(time.Hour)}
	for _, n := range serials {
		l.RevokedCertificateEntries = append(l.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: n, RevocationTime: time.Now()})
	}
	if change != nil {
		change(l)
	}
	der, err := x509.CreateRevocationList(rand.Reader, l, ca, key.(crypto.Signer))
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// pair is a server and a caller.
type pair struct {
	t              *testing.T
	server, client *tlsid.Conns
	l              net.Listener
}

func newPair(t *testing.T, server, client *end) *pair {
	t.Helper()
	l, err := net.Listen("tcp", "[::1]:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return &pair{t, server.src.Conns(server.src.Server()), client.src.Conns(client.src.Client("lease1.example.net")), l}
}

// link is a connection seen from both sides.
type link struct {
	near, far   net.Conn // of the caller, of the server
	nearP, farP *tlsid.Peer
}

// dial makes a connection and sends a byte each way: in TLS 1.3 the caller learns of a refusal, and gets its ticket, with the
// first read.
func (p *pair) dial() (*link, error) {
	p.t.Helper()
	var k link
	served := make(chan error, 1)
	go func() {
		raw, err := p.l.Accept()
		if err != nil {
			served <- err
			return
		}
		_ = raw.SetDeadline(time.Now().Add(patience))
		c, info, err := p.server.ServerHandshake(raw)
		if err == nil {
			k.far, k.farP = c, info.(*tlsid.Peer)
			_, err = c.Write([]byte{1})
		}
		served <- err
	}()
	raw, err := net.Dial("tcp", p.l.Addr().String())
	if err != nil {
		p.t.Fatal(err)
	}
	_ = raw.SetDeadline(time.Now().Add(patience))
	ctx, cancel := context.WithTimeout(p.t.Context(), patience)
	defer cancel()
	var info credentials.AuthInfo
	if k.near, info, err = p.client.ClientHandshake(ctx, "lease-service", raw); err == nil {
		k.nearP = info.(*tlsid.Peer)
		_, err = io.ReadFull(k.near, make([]byte, 1))
	}
	if err != nil {
		raw.Close()
	}
	if err := errors.Join(err, <-served); err != nil {
		return nil, err
	}
	p.t.Cleanup(func() { k.near.Close(); k.far.Close() })
	return &k, nil
}

// resumed reports whether a connection was resumed, on which both sides agree.
func (k *link) resumed(t *testing.T) bool {
	t.Helper()
	a, b := state(k.near).DidResume, state(k.far).DidResume
	if a != b {
		t.Fatalf("resumed: the caller says %t, the server %t", a, b)
	}
	return a
}

func state(c net.Conn) tls.ConnectionState {
	return c.(interface{ ConnectionState() tls.ConnectionState }).ConnectionState()
}
