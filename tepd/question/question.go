// Package question is how gateways ask each other whether they have a session with the lease service (design rule F9):
// gRPC over TLS with the gateways' own certificates, at an address of each gateway's own, never the anycast one.
package question

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	leasev1 "github.com/dstm-project/dstm/api/lease/v1"
	"github.com/dstm-project/dstm/internal/tlsid"
	"github.com/dstm-project/dstm/internal/wire"
	"github.com/dstm-project/dstm/lease"
)

// Limits: a question is an empty message of one of a handful of gateways.
const (
	maxReceive    = 1 << 10
	maxStreams    = 4
	maxConns      = 4 // of one caller
	handshakeTime = 5 * time.Second
	pingEvery     = 10 * time.Second
	pingPatience  = 3 * time.Second
)

// Peers asks other gateways and answers them.
type Peers struct {
	ID     *tlsid.Source
	Listen netip.AddrPort
	Log    *slog.Logger

	mu    sync.Mutex
	conns map[lease.Peer]*peer
}

// peer is the way to another gateway.
type peer struct {
	*grpc.ClientConn
	tls *tlsid.Conns // ends the connection when the other gateway's certificate is taken back
}

func (p *peer) close() {
	p.tls.Close()
	p.ClientConn.Close()
}

// Ask asks another gateway whether it has no session. The connection stays for the next
// question, and is left by gRPC after half an hour without one.
func (p *Peers) Ask(ctx context.Context, to lease.Peer) (quiet bool, err error) {
	cc, err := p.conn(to)
	if err != nil {
		return false, err
	}
	rep, err := leasev1.NewGatewaysClient(cc).Question(ctx, &leasev1.QuestionRequest{})
	if err != nil {
		return false, fmt.Errorf("gateway %s at %s: %w", to.TEP, to.Question, wire.FromStatus(err))
	}
	return rep.GetQuiet(), nil
}

func (p *Peers) conn(to lease.Peer) (*peer, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if cc := p.conns[to]; cc != nil {
		return cc, nil
	}
	conns := p.ID.Conns(p.ID.Peer(tlsid.RoleTEP, to.TEP))
	cc, err := grpc.NewClient("passthrough:///"+to.Question.String(),
		grpc.WithTransportCredentials(conns),
		grpc.WithNoProxy(),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: pingEvery, Timeout: pingPatience}),
	)
	if err != nil {
		conns.Close()
		return nil, fmt.Errorf("gateway %s at %s: %w", to.TEP, to.Question, err)
	}
	if p.conns == nil {
		p.conns = map[lease.Peer]*peer{}
	}
	p.conns[to] = &peer{cc, conns}
	return p.conns[to], nil
}

func (p *Peers) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for to, cc := range p.conns {
		cc.close()
		delete(p.conns, to)
	}
}

type server struct {
	leasev1.UnimplementedGatewaysServer
	id    *tlsid.Source
	asked func() bool
}

// Question implements the Gateways service.
func (s server) Question(ctx context.Context, _ *leasev1.QuestionRequest) (*leasev1.QuestionReply, error) {
	id, err := tlsid.PeerID(ctx)
	if err != nil {
		return nil, status.Error(codes.Unauthenticated, err.Error())
	}
	if p, ok := tlsid.PeerOf(ctx); ok && p.Cert != nil {
		if err := s.id.Revoked(p.Cert); err != nil { // since the handshake
			return nil, status.Error(codes.Unauthenticated, err.Error())
		}
	}
	own := s.id.ID()
	if id.Role != tlsid.RoleTEP || id.Cell != own.Cell || id.TrustDomain != own.TrustDomain {
		return nil, status.Errorf(codes.PermissionDenied, "%s asks a gateway: want role %q of cell %q", id, tlsid.RoleTEP, own.Cell)
	}
	return &leasev1.QuestionReply{Quiet: s.asked()}, nil
}

// Serve answers questions with what asked returns, until ctx ends.
func (p *Peers) Serve(ctx context.Context, asked func() (quiet bool)) error {
	l, err := net.Listen("tcp", p.Listen.String())
	if err != nil {
		return fmt.Errorf("peers: %w", err)
	}
	conns := p.ID.Conns(p.ID.Server()).Limit(maxConns, func() {})
	defer conns.Close()
	g := grpc.NewServer(
		grpc.Creds(conns),
		grpc.MaxRecvMsgSize(maxReceive),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.ConnectionTimeout(handshakeTime),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: pingEvery / 2, PermitWithoutStream: true}),
	)
	leasev1.RegisterGatewaysServer(g, server{id: p.ID, asked: asked})
	stop := context.AfterFunc(ctx, g.Stop)
	defer stop()
	defer p.close()
	p.Log.Info("answering other gateways", "addr", l.Addr().String())
	if err := g.Serve(l); err != nil && ctx.Err() == nil {
		return fmt.Errorf("peers: %w", err)
	}
	return nil
}
