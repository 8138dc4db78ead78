package leasesvc_test

import (
	"context"
	"log/slog"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dstm-project/dstm/internal/tlsid"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/leaseclient"
)

// stranger is a client without a certificate.
func (w *world) stranger() *leaseclient.Conn {
	w.t.Helper()
	id, err := tlsid.OpenAnonymous(tlsid.Files{CA: filepath.Join(w.ca, "ca.pem")}, "lab", slog.New(slog.DiscardHandler))
	if err != nil {
		w.t.Fatal(err)
	}
	c, err := leaseclient.New(leaseclient.Options{Servers: []netip.AddrPort{w.addr}, TLS: id.Client("lease1.example.net")})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { c.Close() })
	return c
}

// TestIdentityByAddress: where the network enforces addresses, a host needs no certificate. What changes its lease must show
// the secret that came with it.
func TestIdentityByAddress(t *testing.T) {
	w := newWorld(t, onePool)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	short, end := context.WithTimeout(ctx, time.Second)
	defer end()
	if _, err := w.stranger().Renew(short, leaseclient.RenewRequest{Source: loopback, Ref: lease.Ref{Resource: lease.Whole(netip.MustParseAddr("198.51.100.1")), Gen: 1}}); err == nil {
		t.Error("a caller without a certificate is served although identities are certificates")
	}
	w.stop()
	w.config = strings.NewReplacer("hosts: {", "hosts: {identity: address, ", "per_64: 0", "per_64: 2").Replace(w.config)
	w.up()
	g := w.gateway("tep1")
	c := w.stranger()
	l := bind(t, c)
	if again := bind(t, w.stranger()); again.Ref != l.Ref {
		t.Errorf("the same address bound %s and %s", l.Ref, again.Ref)
	}
	thief := w.stranger()
	_, err := thief.Renew(ctx, leaseclient.RenewRequest{Ref: l.Ref, Source: loopback})
	if leaseclient.ReasonOf(err) != lease.ReasonNotAllowed {
		t.Errorf("renewal without the secret: %v", err)
	}
	if err := thief.Release(ctx, l.Ref, lease.ReasonIdle); leaseclient.ReasonOf(err) != lease.ReasonNotAllowed {
		t.Errorf("release without the secret: %v", err)
	}
	w.stop()
	w.up()
	g.connect()
	if got, err := c.Renew(ctx, leaseclient.RenewRequest{Ref: l.Ref, Source: loopback}); err != nil || got.Ref != l.Ref {
		t.Errorf("renewal with the secret, after a restart: %+v, %v", got, err)
	}
	op := w.client(tlsid.RoleOperator, "noc")
	if ls, err := op.Leases(ctx, ""); err != nil || len(ls) != 1 || ls[0].HostID != "addr:::1" {
		t.Errorf("leases %+v, %v", ls, err)
	}
	if _, err := w.stranger().Leases(ctx, ""); err == nil {
		t.Error("an operator without a certificate")
	}
	release(t, c, l)
	// A host with a certificate is known by it here too.
	if got := bind(t, w.client(tlsid.RoleHost, "host1")); got.Addr == l.Addr {
		t.Errorf("got %s, in hold-down for another identity", got.Ref)
	}
}
