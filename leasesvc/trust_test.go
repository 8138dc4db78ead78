package leasesvc_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/grpc/codes"

	"github.com/dstm-project/dstm/internal/pki"
	"github.com/dstm-project/dstm/internal/tlsid"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/lease/replica"
	"github.com/dstm-project/dstm/leasesvc"
	"github.com/dstm-project/dstm/leasesvc/leaseclient"
)

// untilEnd reads a stream until it ends.
func untilEnd(recv func() (any, error)) (ended chan error) {
	ended = make(chan error, 1)
	go func() {
		for {
			if _, err := recv(); err != nil {
				ended <- err
				return
			}
		}
	}()
	return ended
}

// TestListsPushed: a new revocation list reaches hosts, gateways and resolvers on the streams that they have, and those that
// come later with their first messages. Those who have it do not get it again.
func TestListsPushed(t *testing.T) {
	w := newWorld(t, onePool)
	crl, err := pki.Revoke(w.ca, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	w.stop()
	w.crl = crl
	w.up()
	type party struct {
		name string
		id   *tlsid.Source
		reg  *prometheus.Registry
		end  chan error
	}
	begin := func(role tlsid.Role, name string) *party {
		t.Helper()
		p := &party{name: name, id: w.identity(role, name), reg: prometheus.NewRegistry()}
		p.id.Register(p.reg, "x")
		return p
	}
	open := func(p *party) {
		t.Helper()
		c := w.clientOf(p.id)
		switch p.id.ID().Role {
		case tlsid.RoleHost:
			a, _, err := c.Attend(t.Context(), leaseclient.Hello{Instance: "1", Sources: []netip.Addr{loopback}})
			if err != nil {
				t.Fatal(err)
			}
			p.end = untilEnd(a.Recv)
		case tlsid.RoleResolver:
			r, err := c.WatchHosts(t.Context(), []netip.Prefix{netip.MustParsePrefix("::/0")})
			if err != nil {
				t.Fatal(err)
			}
			p.end = untilEnd(r.Recv)
		default:
			r := replica.New(replica.Config{TEP: p.name, Instance: "1"})
			s, err := c.Sync(t.Context(), func() lease.Hello { return r.Hello(bootNS()) })
			if err != nil {
				t.Fatal(err)
			}
			p.end = untilEnd(s.Recv)
		}
	}
	all := []*party{begin(tlsid.RoleHost, "host1"), begin(tlsid.RoleResolver, "dns1"), begin(tlsid.RoleTEP, "tep1")}
	for _, p := range all {
		open(p)
	}
	victim, err := pki.Issue(w.ca, t.TempDir(), tlsid.ID{TrustDomain: "example.net", Cell: "lab", Role: tlsid.RoleTEP, Name: "tep2"}, pki.Options{})
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.LoadX509KeyPair(victim.Cert, victim.Key)
	if err != nil {
		t.Fatal(err)
	}
	knows := func(p *party) bool { return p.id.Revoked(pair.Leaf) != nil }
	for _, p := range all {
		eventually(t, p.name+" has the first list", func() bool { return len(p.id.Lists()) == 1 })
	}
	if _, err := pki.Revoke(w.ca, time.Hour, pair.Leaf.SerialNumber); err != nil {
		t.Fatal(err)
	}
	w.id.Reload() // as every ten seconds
	late := begin(tlsid.RoleHost, "host2")
	open(late)
	for _, p := range append(all, late) {
		eventually(t, p.name+" has the list", func() bool { return knows(p) })
		select {
		case err := <-p.end:
			t.Errorf("%s: its stream ended: %v", p.name, err)
		default:
		}
	}
	// On a new stream nothing comes that is there already.
	for _, p := range all {
		open(p)
	}
	time.Sleep(100 * time.Millisecond)
	for _, p := range all {
		want := `
			# HELP x_tls_pushed_lists_total Revocation lists that the lease service sent, by result: applied, known, older, signature, garbage, large.
			# TYPE x_tls_pushed_lists_total counter
			x_tls_pushed_lists_total{result="applied"} 2
			x_tls_pushed_lists_total{result="garbage"} 0
			x_tls_pushed_lists_total{result="known"} 0
			x_tls_pushed_lists_total{result="large"} 0
			x_tls_pushed_lists_total{result="older"} 0
			x_tls_pushed_lists_total{result="signature"} 0
		`
		if err := testutil.GatherAndCompare(p.reg, strings.NewReader(want), "x_tls_pushed_lists_total"); err != nil {
			t.Errorf("%s: %v", p.name, err)
		}
	}
}

// TestServiceRevoked: when the list takes back the service's own certificate, those who have it leave at once and come back
// when it has another one.
func TestServiceRevoked(t *testing.T) {
	w := newWorld(t, onePool)
	crl, err := pki.Revoke(w.ca, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	w.stop()
	w.crl = crl
	w.up()
	id := w.identity(tlsid.RoleHost, "host1")
	c := w.clientOf(id)
	a, _, err := c.Attend(t.Context(), leaseclient.Hello{Instance: "1"})
	if err != nil {
		t.Fatal(err)
	}
	end := untilEnd(a.Recv)
	leaf, err := tls.LoadX509KeyPair(w.files.Cert, w.files.Key)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pki.Revoke(w.ca, time.Hour, leaf.Leaf.SerialNumber); err != nil {
		t.Fatal(err)
	}
	w.id.Reload()
	select {
	case <-end:
	case <-time.After(patience):
		t.Fatal("the stream to a service that was taken back goes on")
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if _, _, err := c.Attend(ctx, leaseclient.Hello{Instance: "1"}); err == nil {
		t.Fatal("a service that was taken back is used")
	}
	w.renew()
	eventually(t, "the host is back", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, _, err := c.Attend(ctx, leaseclient.Hello{Instance: "1"})
		return err == nil
	})
}

// renew gives the service a new certificate, as dstm pki issue and the next look at the files do.
func (w *world) renew() *x509.Certificate {
	w.t.Helper()
	f, err := pki.Issue(w.ca, filepath.Dir(w.files.Cert), w.id.ID(), pki.Options{DNS: []string{"lease1.example.net"}})
	if err != nil {
		w.t.Fatal(err)
	}
	w.id.Reload()
	pair, err := tls.LoadX509KeyPair(f.Cert, f.Key)
	if err != nil {
		w.t.Fatal(err)
	}
	return pair.Leaf
}

// TestRotation: certificates of both sides are replaced every 100 ms, again and again. No stream notices; each new connection
// shows the newest certificates.
func TestRotation(t *testing.T) {
	const rotations = 50
	w := newWorld(t, onePool)
	w.gateway("tep1")
	type host struct {
		files tlsid.Files
		id    *tlsid.Source
		conn  *leaseclient.Conn
		end   chan error
	}
	var hosts []*host
	for i := range 8 {
		h := &host{}
		var err error
		hid := tlsid.ID{TrustDomain: "example.net", Cell: "lab", Role: tlsid.RoleHost, Name: fmt.Sprint("host", i)}
		if h.files, err = pki.Issue(w.ca, t.TempDir(), hid, pki.Options{}); err != nil {
			t.Fatal(err)
		}
		if h.id, err = tlsid.Open(h.files, tlsid.RoleHost, slog.New(slog.DiscardHandler)); err != nil {
			t.Fatal(err)
		}
		h.conn = w.clientOf(h.id)
		a, _, err := h.conn.Attend(t.Context(), leaseclient.Hello{Instance: "1", Sources: []netip.Addr{loopback}})
		if err != nil {
			t.Fatal(err)
		}
		h.end = untilEnd(a.Recv)
		hosts = append(hosts, h)
	}
	for i := range rotations {
		next := time.After(100 * time.Millisecond)
		h := hosts[i%len(hosts)]
		if _, err := pki.Issue(w.ca, filepath.Dir(h.files.Cert), h.id.ID(), pki.Options{}); err != nil {
			t.Fatal(err)
		}
		h.id.Reload()
		now := w.renew()
		conf := h.id.Client("lease1.example.net")
		c, err := tls.Dial("tcp", w.addr.String(), conf)
		if err != nil {
			t.Fatal(err)
		}
		if got := c.ConnectionState().PeerCertificates[0]; !got.Equal(now) {
			t.Errorf("rotation %d: a new connection shows certificate %x, not %x", i, got.SerialNumber, now.SerialNumber)
		}
		c.Close()
		<-next
	}
	for _, h := range hosts {
		select {
		case err := <-h.end:
			t.Errorf("a stream ended: %v", err)
		default:
		}
		if l := bind(t, h.conn); !l.Installed { // on the connection of the first certificate
			t.Error("a lease is not installed")
		}
	}
}

// TestPeerLimits: one caller has so many streams and connections; what is more is refused with a reason, and counted.
func TestPeerLimits(t *testing.T) {
	w := newWorld(t, onePool)
	w.config = strings.Replace(w.config, "connections: 0, streams: 0", "connections: 2, streams: 3", 1)
	w.stop()
	reg := prometheus.NewRegistry()
	w.upWith(leasesvc.Deps{Registry: reg})
	dns, host := w.identity(tlsid.RoleResolver, "dns1"), w.identity(tlsid.RoleHost, "host1")
	r := w.clientOf(dns)
	watch := func(c *leaseclient.Conn) error {
		s, err := c.WatchHosts(t.Context(), []netip.Prefix{netip.MustParsePrefix("::/0")})
		if err == nil {
			_, err = s.Recv()
		}
		return err
	}
	for range 3 {
		if err := watch(r); err != nil {
			t.Fatal(err)
		}
	}
	refused := func(err error, want string) {
		t.Helper()
		var e *leaseclient.Error
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want %q", err, want)
		} else if !errors.As(err, &e) || e.Code != codes.ResourceExhausted {
			t.Errorf("%v: want RESOURCE_EXHAUSTED", err)
		}
	}
	refused(watch(r), "dns1 has 3 streams open already, which is all that limits.streams allows")
	attend := func(c *leaseclient.Conn) error {
		_, _, err := c.Attend(t.Context(), leaseclient.Hello{Instance: "1"})
		return err
	}
	for range 2 {
		if err := attend(w.clientOf(host)); err != nil {
			t.Fatal(err)
		}
	}
	third := w.clientOf(host)
	refused(attend(third), "host1 has 2 connections already, which is all that limits.connections allows")
	if err := watch(w.clientOf(w.identity(tlsid.RoleResolver, "dns2"))); err != nil {
		t.Errorf("another caller: %v", err)
	}
	for cause, want := range map[string]float64{"streams": 1, "connections": 1} {
		if got := refusals(t, reg, cause); got < want { // a caller may have tried again
			t.Errorf("%v refusals counted because of %s", got, cause)
		}
	}
}

func refusals(t *testing.T, reg *prometheus.Registry, cause string) float64 {
	t.Helper()
	fs, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range fs {
		for _, m := range f.GetMetric() {
			if f.GetName() == "dstm_leasesvc_refused_total" && m.GetLabel()[0].GetValue() == cause {
				return m.GetCounter().GetValue()
			}
		}
	}
	return 0
}

// TestMeddling: a list that the authority did not sign, sent by a service that is not to be trusted that far, changes nothing.
func TestMeddling(t *testing.T) {
	w := newWorld(t, onePool)
	foreign := t.TempDir()
	if err := pki.Init(foreign, "example.net", time.Hour); err != nil {
		t.Fatal(err)
	}
	// The service trusts another authority as well, which its hosts do not.
	w.stop()
	crl, err := pki.Revoke(foreign, time.Hour, big.NewInt(1))
	if err != nil {
		t.Fatal(err)
	}
	w.crl, w.roots = crl, []string{w.ca, foreign}
	w.up()
	host := w.identity(tlsid.RoleHost, "host1")
	reg := prometheus.NewRegistry()
	host.Register(reg, "x")
	a, _, err := w.clientOf(host).Attend(t.Context(), leaseclient.Hello{Instance: "1"})
	if err != nil {
		t.Fatal(err)
	}
	end := untilEnd(a.Recv)
	eventually(t, "the list is refused", func() bool {
		fs, err := reg.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range fs {
			for _, m := range f.GetMetric() {
				if f.GetName() == "x_tls_pushed_lists_total" && m.GetLabel()[0].GetValue() == "signature" {
					return m.GetCounter().GetValue() == 1
				}
			}
		}
		return false
	})
	if len(host.Lists()) != 0 {
		t.Error("it is in force")
	}
	select {
	case err := <-end:
		t.Errorf("the stream ended: %v", err)
	default:
	}
}
