package tlsid_test

import (
	"net"
	"os"
	"testing"
	"time"

	"github.com/dstm-project/dstm/internal/pki"
	"github.com/dstm-project/dstm/internal/tlsid"
)

// ends reports whether a connection ends within a time, which one that goes on does not.
func ends(c net.Conn, within time.Duration) bool {
	_ = c.SetReadDeadline(time.Now().Add(within))
	_, err := c.Read(make([]byte, 1))
	return !os.IsTimeout(err)
}

// TestRevokedConnections: a list ends the connections of those whom it takes back, and no others.
func TestRevokedConnections(t *testing.T) {
	ca := newCA(t)
	svc := newEnd(t, ca, tlsid.RoleSvc, "lease1")
	good, bad := newEnd(t, ca, tlsid.RoleHost, "good"), newEnd(t, ca, tlsid.RoleHost, "bad")
	server := svc.src.Conns(svc.src.Server())
	links := map[*end]*link{}
	for _, e := range []*end{good, bad} {
		p := newPair(t, svc, e)
		p.server = server
		var err error
		if links[e], err = p.dial(); err != nil {
			t.Fatal(err)
		}
	}
	if n := server.Len(); n != 2 {
		t.Fatalf("%d connections, want 2", n)
	}
	if err := svc.src.Push(makeList(t, ca, 1, nil, bad.cert().SerialNumber)); err != nil {
		t.Fatal(err)
	}
	if !ends(links[bad].near, patience) {
		t.Error("the connection of a caller that was taken back goes on")
	}
	if ends(links[good].near, 2*tlsid.Linger) {
		t.Error("another caller's connection ended")
	}
	if n := svc.count("x_tls_revoked_connections_total", ""); n != 1 {
		t.Errorf("%v connections counted, want 1", n)
	}
	// The other way round: a caller leaves a server at once.
	if err := good.src.Push(makeList(t, ca, 1, nil, svc.cert().SerialNumber)); err != nil {
		t.Fatal(err)
	}
	if !ends(links[good].near, patience) {
		t.Error("the connection to a server that was taken back goes on")
	}
}

// TestLimit: a caller has so many connections, whoever else has how many; one that is more ends soon.
func TestLimit(t *testing.T) {
	ca := newCA(t)
	svc := newEnd(t, ca, tlsid.RoleSvc, "lease1")
	loud, quiet := newEnd(t, ca, tlsid.RoleHost, "loud"), newEnd(t, ca, tlsid.RoleHost, "quiet")
	over := 0
	p := newPair(t, svc, loud)
	p.server = svc.src.Conns(svc.src.Server()).Limit(2, func() { over++ })
	var all []*link
	for i := range 3 {
		k, err := p.dial()
		if err != nil {
			t.Fatal(err)
		}
		if k.farP.Excess != (i == 2) {
			t.Errorf("connection %d: excess %t", i+1, k.farP.Excess)
		}
		all = append(all, k)
	}
	if over != 1 {
		t.Errorf("called %d times for one that was too many", over)
	}
	if !ends(all[2].near, patience) {
		t.Error("the one that is too many goes on")
	}
	all[2].far.Close()
	q := newPair(t, svc, quiet)
	q.server = p.server
	if k, err := q.dial(); err != nil || k.farP.Excess {
		t.Errorf("another caller: %v, or too many", err)
	}
	all[0].far.Close()
	all[0].far.Close() // as gRPC may
	if k, err := p.dial(); err != nil || k.farP.Excess {
		t.Errorf("after one has ended: %v, or too many", err)
	}
}

// TestLimitByAddress: callers without a certificate are told apart by their address.
func TestLimitByAddress(t *testing.T) {
	ca := newCA(t)
	svc := newEnd(t, ca, tlsid.RoleSvc, "lease1")
	anonymous, err := tlsid.OpenAnonymous(svc.files, "lab", nil)
	if err != nil {
		t.Fatal(err)
	}
	p := newPair(t, svc, svc)
	p.server = svc.src.Conns(svc.src.OpenServer()).Limit(1, func() {})
	p.client = anonymous.Conns(anonymous.Client("lease1.example.net"))
	for i := range 2 {
		k, err := p.dial()
		if err != nil {
			t.Fatal(err)
		}
		if k.farP.Err != tlsid.ErrNoCert || k.farP.Excess != (i == 1) {
			t.Errorf("connection %d: %v, excess %t", i+1, k.farP.Err, k.farP.Excess)
		}
		if k.resumed(t) != (i == 1) {
			t.Errorf("connection %d: resumed %t", i+1, k.resumed(t))
		}
	}
}

// TestChange: what is to happen after a change happens, until it is taken back.
func TestChange(t *testing.T) {
	e := newEnd(t, newCA(t), tlsid.RoleTEP, "tep1")
	n := 0
	remove := e.src.OnChange(func() { n++ })
	e.src.Reload()
	if n != 0 {
		t.Error("called without a change")
	}
	e.renew()
	if err := e.src.Push(makeList(t, e.ca, 1, nil)); err != nil {
		t.Fatal(err)
	}
	if n != 2 {
		t.Errorf("called %d times for a new certificate and a list", n)
	}
	remove()
	if e.renew(); n != 2 {
		t.Error("called after it was taken back")
	}
	// A running daemon keeps its name.
	other, err := pki.Issue(e.ca, t.TempDir(), tlsid.ID{TrustDomain: "example.net", Cell: "lab", Role: tlsid.RoleTEP, Name: "tep2"}, pki.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for from, to := range map[string]string{other.Cert: e.files.Cert, other.Key: e.files.Key} {
		if err := os.Rename(from, to); err != nil {
			t.Fatal(err)
		}
	}
	if e.src.Reload(); e.src.ID() != e.id {
		t.Errorf("identity is %s now", e.src.ID())
	}
}
