package tlsid_test

import (
	"crypto/tls"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/dstm-project/dstm/internal/tlsid"
)

// TestResume: the second connection is resumed, unless something came in between; and what was taken back or has run out
// since is refused although it was good when the session began.
func TestResume(t *testing.T) {
	for _, c := range []struct {
		name    string
		between func(t *testing.T, svc, host *end, p *pair)
		resumed bool
		want    string // of the error
	}{
		{"at once", func(*testing.T, *end, *end, *pair) {}, true, ""},
		{"after a restart of the server", func(t *testing.T, svc, _ *end, p *pair) {
			svc.open()
			p.server = svc.src.Conns(svc.src.Server())
		}, true, ""},
		{"a day later", func(t *testing.T, svc, _ *end, _ *pair) {
			svc.src.SetClock(func() time.Time { return time.Now().Add(tlsid.TicketPeriod) })
		}, true, ""},
		{"two days later", func(t *testing.T, svc, _ *end, _ *pair) {
			svc.src.SetClock(func() time.Time { return time.Now().Add(2 * tlsid.TicketPeriod) })
		}, false, ""},
		{"the server has a new certificate", func(_ *testing.T, svc, _ *end, _ *pair) { svc.renew() }, false, ""},
		{"the caller has a new certificate", func(_ *testing.T, _, host *end, _ *pair) { host.renew() }, false, ""},
		{"the caller's certificate was taken back", func(t *testing.T, svc, host *end, _ *pair) {
			if err := svc.src.Push(makeList(t, svc.ca, 1, nil, host.cert().SerialNumber)); err != nil {
				t.Fatal(err)
			}
		}, false, "of host1 is revoked"},
		{"the server's certificate was taken back", func(t *testing.T, svc, host *end, _ *pair) {
			if err := host.src.Push(makeList(t, svc.ca, 1, nil, svc.cert().SerialNumber)); err != nil {
				t.Fatal(err)
			}
		}, false, "of lease1 is revoked"},
		{"the server's certificate was taken back and it has a new one", func(t *testing.T, svc, host *end, _ *pair) {
			if err := host.src.Push(makeList(t, svc.ca, 1, nil, svc.cert().SerialNumber)); err != nil {
				t.Fatal(err)
			}
			svc.renew()
		}, false, ""},
		{"the caller's certificate has run out", func(_ *testing.T, svc, _ *end, _ *pair) {
			svc.src.SetClock(func() time.Time { return time.Now().Add(12 * time.Hour) })
		}, false, "expired"},
		{"the server's certificate has run out", func(_ *testing.T, _, host *end, _ *pair) {
			host.src.SetClock(func() time.Time { return time.Now().Add(12 * time.Hour) })
		}, false, "expired"},
		{"the server trusts another authority", func(t *testing.T, svc, _ *end, _ *pair) {
			replaceRoots(t, svc)
		}, false, "unknown certificate authority"},
		{"the caller trusts another authority", func(t *testing.T, _, host *end, _ *pair) {
			replaceRoots(t, host)
		}, false, "unknown authority"},
	} {
		t.Run(c.name, func(t *testing.T) {
			ca := newCA(t)
			svc, host := newEnd(t, ca, tlsid.RoleSvc, "lease1"), newEnd(t, ca, tlsid.RoleHost, "host1")
			if strings.Contains(c.name, "run out") {
				svc.o.Valid, host.o.Valid = 6*time.Hour, 6*time.Hour
				svc.renew()
				host.renew()
			}
			p := newPair(t, svc, host)
			first, err := p.dial()
			if err != nil || first.resumed(t) {
				t.Fatalf("first connection: %v, or resumed", err)
			}
			c.between(t, svc, host, p)
			again, err := p.dial()
			if c.want != "" {
				if err == nil || !strings.Contains(err.Error(), c.want) {
					t.Fatalf("error %v, want %q", err, c.want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := again.resumed(t); got != c.resumed {
				t.Errorf("resumed %t, want %t", got, c.resumed)
			}
			if id := again.farP.ID; again.farP.Err != nil || id != host.id {
				t.Errorf("the server sees %s, %v", id, again.farP.Err)
			}
			if !again.farP.Cert.Equal(host.cert()) || !again.nearP.Cert.Equal(svc.cert()) {
				t.Error("not the certificates of now")
			}
		})
	}
}

// replaceRoots makes an end trust an authority that signed none of the certificates.
func replaceRoots(t *testing.T, e *end) {
	t.Helper()
	b, err := os.ReadFile(newCA(t) + "/ca.pem")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(e.files.CA, b, 0o600); err != nil {
		t.Fatal(err)
	}
	e.src.Reload()
}

// TestHandshakesCounted: each side counts how its handshakes went.
func TestHandshakesCounted(t *testing.T) {
	ca := newCA(t)
	svc, host := newEnd(t, ca, tlsid.RoleSvc, "lease1"), newEnd(t, ca, tlsid.RoleHost, "host1")
	p := newPair(t, svc, host)
	for range 3 {
		if _, err := p.dial(); err != nil {
			t.Fatal(err)
		}
	}
	other := newEnd(t, newCA(t), tlsid.RoleHost, "host2")
	p.client = other.src.Conns(other.src.Client("lease1.example.net"))
	if _, err := p.dial(); err == nil {
		t.Fatal("a stranger is served")
	}
	for _, e := range []*end{svc, host} {
		if f, r := e.count("x_tls_handshakes_total", "full"), e.count("x_tls_handshakes_total", "resumed"); f != 1 || r != 2 {
			t.Errorf("%s: %v full and %v resumed, want 1 and 2", e.id, f, r)
		}
	}
	if n := svc.count("x_tls_handshakes_total", "failed"); n != 1 {
		t.Errorf("%v failed, want 1", n)
	}
	if at := svc.count("x_tls_certificate_end_timestamp_seconds", ""); at != float64(svc.cert().NotAfter.Unix()) {
		t.Errorf("the certificate ends at %v, want %d", at, svc.cert().NotAfter.Unix())
	}
}

// TestSessionForgotten: a server whose shown certificate comes from elsewhere goes on resuming sessions of the one before. When
// that is taken back the caller begins anew, and does not try the session for ever.
func TestSessionForgotten(t *testing.T) {
	ca := newCA(t)
	svc, host := newEnd(t, ca, tlsid.RoleSvc, "lease1"), newEnd(t, ca, tlsid.RoleHost, "host1")
	shown := newEnd(t, ca, tlsid.RoleSvc, "lease1")
	p := newPair(t, svc, host)
	p.server = svc.src.Conns(svc.src.ServerShowing(func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
		c, err := tls.LoadX509KeyPair(shown.files.Cert, shown.files.Key)
		return &c, err
	}))
	if _, err := p.dial(); err != nil {
		t.Fatal(err)
	}
	old := shown.cert()
	shown.renew()
	k, err := p.dial()
	if err != nil || !k.resumed(t) || !k.nearP.Cert.Equal(old) {
		t.Fatalf("second connection: %v, or not the session of before", err)
	}
	if err := host.src.Push(makeList(t, ca, 1, nil, old.SerialNumber)); err != nil {
		t.Fatal(err)
	}
	if _, err := p.dial(); err == nil || !strings.Contains(err.Error(), "is revoked") {
		t.Errorf("session of a certificate that was taken back: %v", err)
	}
	k, err = p.dial()
	if err != nil {
		t.Fatal(err)
	}
	if k.resumed(t) || !k.nearP.Cert.Equal(shown.cert()) {
		t.Error("not a full handshake with the new certificate")
	}
}
