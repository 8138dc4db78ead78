package tepd

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	leasev1 "github.com/dstm-project/dstm/api/lease/v1"
	"github.com/dstm-project/dstm/internal/netcfg"
	"github.com/dstm-project/dstm/internal/pki"
	"github.com/dstm-project/dstm/internal/tlsid"
	"github.com/dstm-project/dstm/internal/wire"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/leaseclient"
)

// syncServer is a lease service with one pool and one binding.
type syncServer struct {
	leasev1.UnimplementedTepsServer
	acks chan lease.Ack
	peer chan tlsid.ID
}

func (s *syncServer) Sync(st grpc.BidiStreamingServer[leasev1.SyncUp, leasev1.SyncDown]) error {
	id, err := tlsid.PeerID(st.Context())
	if err != nil {
		return err
	}
	s.peer <- id
	for {
		m, err := st.Recv()
		if err != nil {
			return err
		}
		up, err := wire.SyncUp(m)
		if err != nil {
			return err
		}
		switch m := up.(type) {
		case lease.Hello:
			if m.TEP != "tep1" {
				return wire.ToStatus(&wire.Error{Code: codes.PermissionDenied, Reason: lease.ReasonNotAllowed, Msg: "gateway " + m.TEP + " is not in teps"})
			}
			err = errors.Join(
				st.Send(wire.FromSessionReply(lease.SessionReply{
					Session: 1, EchoBootNS: m.SentBootNS, GrantNS: uint64(time.Hour), Floor: 10, Cluster: cluster, Epoch: 1, NextBeatNS: uint64(time.Second),
				})),
				st.Send(wire.FromSnapshotChunk(lease.SnapshotChunk{Session: 1, Rev: 10, Last: true, Records: []lease.Record{
					lease.PoolRecord(1, pool, false), lease.BindRecord(3, binding(1, 3)),
				}})))
		case lease.Ack:
			s.acks <- m
		}
		if err != nil {
			return err
		}
	}
}

// serveTLS starts the server on loopback and returns it with a gateway's connection to it.
func serveTLS(t *testing.T) (*syncServer, *leaseclient.Conn) {
	t.Helper()
	dir := t.TempDir()
	if err := pki.Init(dir, "example.net", time.Hour); err != nil {
		t.Fatal(err)
	}
	open := func(role tlsid.Role, name string) *tlsid.Source {
		t.Helper()
		files, err := pki.Issue(dir, filepath.Join(dir, name), tlsid.ID{TrustDomain: "example.net", Cell: "lab", Role: role, Name: name},
			pki.Options{Valid: time.Hour, DNS: []string{"lease1.example.net"}})
		if err != nil {
			t.Fatal(err)
		}
		s, err := tlsid.Open(files, role, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	l, err := net.Listen("tcp", "[::1]:0")
	if err != nil {
		t.Fatal(err)
	}
	svc := &syncServer{acks: make(chan lease.Ack, 16), peer: make(chan tlsid.ID, 16)}
	id := open(tlsid.RoleSvc, "lease1")
	conns := id.Conns(id.Server())
	t.Cleanup(conns.Close)
	srv := grpc.NewServer(grpc.Creds(conns))
	leasev1.RegisterTepsServer(srv, svc)
	go func() { _ = srv.Serve(l) }() // until Stop
	t.Cleanup(srv.Stop)
	conn, err := leaseclient.New(leaseclient.Options{
		Servers: []netip.AddrPort{netip.MustParseAddrPort(l.Addr().String())}, TLS: open(tlsid.RoleTEP, "tep1").Client("lease1.example.net"),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return svc, conn
}

// TestOverTLS runs a gateway against a server of the real protocol with certificates of the built-in CA.
func TestOverTLS(t *testing.T) {
	svc, conn := serveTLS(t)
	w := newWorld(t, testConfig)
	w.g.Service = Client{conn}
	w.start()
	if id := <-svc.peer; id.String() != "spiffe://example.net/dstm/lab/tep/tep1" {
		t.Errorf("the service sees %s", id)
	}
	if d := cmp.Diff(lease.Ack{Session: 1, Applied: 10}, <-svc.acks); d != "" {
		t.Errorf("acknowledgement (-want +got):\n%s", d)
	}
	eventually(t, "the gateway is up", func() bool { return w.g.Ready() == nil })
	if es, err := w.g.Table(t.Context()); err != nil || len(es.Bindings) != 1 || es.Bindings[0].Addr != "198.51.100.1" {
		t.Errorf("table %+v, error %v", es, err)
	}
	w.end()

	// A gateway that the service does not know gets its sentence.
	w = newWorld(t, strings.Replace(testConfig, "id: tep1", "id: tep9", 1))
	w.kernel.links = map[string]netcfg.Link{}
	w.g.Service = Client{conn}
	w.start()
	eventually(t, "the refusal is shown", func() bool {
		return w.g.Status().Problem == "sync: gateway tep9 is not in teps (NOT_ALLOWED)"
	})
	w.end()
}

// TestNoService: a lease service that cannot be reached is no error of the start; status says what is wrong.
func TestNoService(t *testing.T) {
	dir := t.TempDir()
	if err := pki.Init(dir, "example.net", time.Hour); err != nil {
		t.Fatal(err)
	}
	files, err := pki.Issue(dir, dir, tlsid.ID{TrustDomain: "example.net", Cell: "lab", Role: tlsid.RoleTEP, Name: "tep1"}, pki.Options{Valid: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	id, err := tlsid.Open(files, tlsid.RoleTEP, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "[::1]:0")
	if err != nil {
		t.Fatal(err)
	}
	gone := netip.MustParseAddrPort(l.Addr().String())
	l.Close()
	conn, err := leaseclient.New(leaseclient.Options{Servers: []netip.AddrPort{gone}, TLS: id.Client("lease1.example.net")})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	w := newWorld(t, testConfig)
	w.g.Service = Client{conn}
	ready := make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.g.Run(ctx, func() { close(ready) }) }()
	<-ready
	eventually(t, "the problem is shown", func() bool { return w.g.Status().Problem != "" })
	t.Log(w.g.Status().Problem)
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Run: %v", err)
	}
}
