package question

import (
	"context"
	"encoding/pem"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/dstm-project/dstm/internal/pki"
	"github.com/dstm-project/dstm/internal/tlsid"
	"github.com/dstm-project/dstm/lease"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 20 * time.Second

// identity issues a certificate of the authority in dir.
func identity(t *testing.T, dir, cell string, role tlsid.Role, name string) *tlsid.Source {
	t.Helper()
	files, err := pki.Issue(dir, filepath.Join(t.TempDir(), name), tlsid.ID{TrustDomain: "example.net", Cell: cell, Role: role, Name: name},
		pki.Options{Valid: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	s, err := tlsid.Open(files, role, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func authority(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := pki.Init(dir, "example.net", time.Hour); err != nil {
		t.Fatal(err)
	}
	return dir
}

// free returns a loopback address that nobody listens on.
func free(t *testing.T) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", "[::1]:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return netip.MustParseAddrPort(l.Addr().String())
}

// serve starts gateway tep2, which is quiet when told so, and returns how to ask it.
func serve(t *testing.T, ca string, quiet *atomic.Bool) lease.Peer {
	t.Helper()
	return serveAs(t, identity(t, ca, "lab", tlsid.RoleTEP, "tep2"), quiet)
}

func serveAs(t *testing.T, id *tlsid.Source, quiet *atomic.Bool) lease.Peer {
	t.Helper()
	to := lease.Peer{TEP: "tep2", Question: free(t)}
	p := &Peers{ID: id, Listen: to.Question, Log: slog.New(slog.DiscardHandler)}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- p.Serve(ctx, quiet.Load) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return to
}

func ask(t *testing.T, id *tlsid.Source, to lease.Peer) (bool, error) {
	t.Helper()
	p := &Peers{ID: id}
	t.Cleanup(p.close)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for {
		quiet, err := p.Ask(ctx, to)
		if err == nil || !strings.Contains(err.Error(), "connection refused") || ctx.Err() != nil {
			return quiet, err
		}
	}
}

func TestQuestion(t *testing.T) {
	ca := authority(t)
	var quiet atomic.Bool
	to := serve(t, ca, &quiet)
	id := identity(t, ca, "lab", tlsid.RoleTEP, "tep1")
	for _, want := range []bool{false, true} {
		quiet.Store(want)
		if got, err := ask(t, id, to); err != nil || got != want {
			t.Errorf("answer %t, %v: want %t", got, err, want)
		}
	}
}

// TestStrangers: only gateways of the same cell get an answer, and only from the gateway that they mean.
func TestStrangers(t *testing.T) {
	ca := authority(t)
	var quiet atomic.Bool
	quiet.Store(true)
	to := serve(t, ca, &quiet)
	other := to
	other.TEP = "tep3"
	for _, c := range []struct {
		name string
		id   *tlsid.Source
		to   lease.Peer
		want string
	}{
		{"a host", identity(t, ca, "lab", tlsid.RoleHost, "host1"), to, `want role "tep" of cell "lab"`},
		{"another cell", identity(t, ca, "far", tlsid.RoleTEP, "tep1"), to, "want spiffe://example.net/dstm/far/tep/tep2"},
		{"another authority", identity(t, authority(t), "lab", tlsid.RoleTEP, "tep1"), to, "unknown authority"},
		{"not the one meant", identity(t, ca, "lab", tlsid.RoleTEP, "tep1"), other, "want spiffe://example.net/dstm/lab/tep/tep3"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if q, err := ask(t, c.id, c.to); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("answer %t, error %v: want %q", q, err, c.want)
			}
		})
	}
}

// TestRevoked: a gateway whose certificate is taken back is asked no more and answered no more, on connections that are there
// as well: its word could keep another one forwarding.
func TestRevoked(t *testing.T) {
	for _, c := range []struct{ name, revoked, knows string }{
		{"the one that is asked", "tep2", "tep1"},
		{"the one that asks", "tep1", "tep2"},
	} {
		t.Run(c.name, func(t *testing.T) {
			ca := authority(t)
			var quiet atomic.Bool
			quiet.Store(true)
			ids := map[string]*tlsid.Source{}
			for _, name := range []string{"tep1", "tep2"} {
				ids[name] = identity(t, ca, "lab", tlsid.RoleTEP, name)
			}
			to := serveAs(t, ids["tep2"], &quiet)
			p := &Peers{ID: ids["tep1"]}
			defer p.close()
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			for {
				if _, err := p.Ask(ctx, to); err == nil {
					break
				} else if ctx.Err() != nil {
					t.Fatal(err)
				}
			}
			leaf, err := ids[c.revoked].Client("x").GetClientCertificate(nil)
			if err != nil {
				t.Fatal(err)
			}
			path, err := pki.Revoke(ca, time.Hour, leaf.Leaf.SerialNumber)
			if err != nil {
				t.Fatal(err)
			}
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			blk, _ := pem.Decode(b)
			if err := ids[c.knows].Push(blk.Bytes); err != nil {
				t.Fatal(err)
			}
			var said strings.Builder
			for range 3 { // over the old connection, and over a new one
				q, err := p.Ask(ctx, to)
				if err == nil {
					t.Fatalf("answer %t", q)
				}
				fmt.Fprintln(&said, err)
				time.Sleep(600 * time.Millisecond)
			}
			if !strings.Contains(said.String(), "of "+c.revoked+" is revoked") {
				t.Errorf("no word of why: %s", said.String())
			}
		})
	}
}

func TestNobodyThere(t *testing.T) {
	p := &Peers{ID: identity(t, authority(t), "lab", tlsid.RoleTEP, "tep1")}
	defer p.close()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	to := lease.Peer{TEP: "tep2", Question: free(t)}
	if _, err := p.Ask(ctx, to); err == nil || !strings.Contains(err.Error(), "gateway tep2 at "+to.Question.String()) {
		t.Errorf("error %v: want one that names the gateway", err)
	}
	p.Listen, p.Log = netip.MustParseAddrPort("[2001:db8::1]:3546"), slog.New(slog.DiscardHandler)
	if err := p.Serve(ctx, func() bool { return true }); err == nil || !strings.Contains(err.Error(), "2001:db8::1") {
		t.Errorf("listening on an address of another machine: %v", err)
	}
}
