package leasesvc

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	leasev1 "github.com/dstm-project/dstm/api/lease/v1"
	"github.com/dstm-project/dstm/internal/failpoint"
	"github.com/dstm-project/dstm/internal/tlsid"
	"github.com/dstm-project/dstm/internal/wire"
	"github.com/dstm-project/dstm/lease"
)

// Limits of the listener: a message of a caller is small, and a caller has few calls under way.
const (
	maxReceive    = 64 << 10
	maxStreams    = 64
	minPing       = 5 * time.Second // callers ping every 10 s
	stopPatience  = 2 * time.Second
	handshakeTime = 5 * time.Second
)

// roles says who may call the services.
var roles = map[string]tlsid.Role{
	"dstm.lease.v1.Hosts":     tlsid.RoleHost,
	"dstm.lease.v1.Resolvers": tlsid.RoleResolver,
	"dstm.lease.v1.Teps":      tlsid.RoleTEP,
	"dstm.lease.v1.Operators": tlsid.RoleOperator,
}

// window is how many bytes of a connection, and of one stream, may be under way to the service.
const window = 256 << 10

func (s *Server) serve(ctx context.Context, l net.Listener, ready func()) error {
	g := grpc.NewServer(
		grpc.Creds(credentials.NewTLS(s.d.Server)),
		grpc.MaxRecvMsgSize(maxReceive),
		grpc.MaxConcurrentStreams(maxStreams),
		// A window of a fixed size needs no pings that measure the path, which would come with every call.
		grpc.InitialWindowSize(window), grpc.InitialConnWindowSize(window),
		grpc.ConnectionTimeout(handshakeTime),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 10 * time.Second, Timeout: 3 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: minPing, PermitWithoutStream: true}),
		grpc.UnaryInterceptor(s.unary),
		grpc.StreamInterceptor(s.stream),
	)
	leasev1.RegisterHostsServer(g, hostsAPI{s: s})
	leasev1.RegisterResolversServer(g, resolversAPI{s: s})
	leasev1.RegisterTepsServer(g, tepsAPI{s: s})
	leasev1.RegisterOperatorsServer(g, operatorsAPI{s: s})
	// Streams live until the other side goes, so a graceful stop alone would wait for ever.
	stop := context.AfterFunc(ctx, func() {
		t := time.AfterFunc(stopPatience, g.Stop)
		defer t.Stop()
		g.GracefulStop()
	})
	defer stop()
	s.d.Log.Info("listening", "addr", l.Addr().String())
	ready()
	if err := g.Serve(listener{l, s.limits}); err != nil && ctx.Err() == nil {
		return err
	}
	return nil
}

// caller is who calls, and from where.
type caller struct {
	id        tlsid.ID
	addr      netip.Addr
	byAddress bool // there is no certificate: id is made of addr
}

type callerKey struct{}

func callerOf(ctx context.Context) caller {
	c, _ := ctx.Value(callerKey{}).(caller)
	return c
}

// authorize checks identity, cell and role of a call.
func (s *Server) authorize(ctx context.Context, method string) (context.Context, error) {
	service, _, _ := strings.Cut(strings.TrimPrefix(method, "/"), "/")
	want, ok := roles[service]
	if !ok {
		return nil, status.Errorf(codes.Unimplemented, "no service %q", service)
	}
	c := caller{addr: callerAddr(ctx)}
	id, err := tlsid.PeerID(ctx)
	if errors.Is(err, tlsid.ErrNoCert) && s.cfg.Hosts.Identity == IdentityAddress && want == tlsid.RoleHost {
		own := s.d.TLS.ID()
		id, err = tlsid.ID{TrustDomain: own.TrustDomain, Cell: own.Cell, Role: want, Name: addressIdentity(c.addr)}, nil
		c.byAddress = true
		if !s.inPrefixes(c.addr) {
			s.m.refused.WithLabelValues("source").Inc()
			return nil, deny(lease.ReasonBadSource, "call from %s without a certificate: want one, or an address in hosts.prefixes %v", c.addr, s.cfg.Hosts.Prefixes)
		}
	}
	if err != nil {
		s.m.refused.WithLabelValues("identity").Inc()
		return nil, status.Error(codes.Unauthenticated, err.Error())
	}
	own := s.d.TLS.ID()
	if id.Role != want || id.Cell != own.Cell || id.TrustDomain != own.TrustDomain {
		s.m.refused.WithLabelValues("role").Inc()
		return nil, wire.ToStatus(&wire.Error{
			Code: codes.PermissionDenied, Reason: lease.ReasonNotAllowed,
			Msg: fmt.Sprintf("%s calls %s: want role %q of cell %q", id, service, want, own.Cell),
		})
	}
	c.id = id
	if cert := tlsid.PeerCert(ctx); cert != nil {
		if err := s.d.TLS.Revoked(cert); err != nil { // since the handshake
			s.m.refused.WithLabelValues("revoked").Inc()
			return nil, status.Error(codes.Unauthenticated, err.Error())
		}
	}
	if want == tlsid.RoleHost {
		if err := s.limits.host(id.Name); err != nil {
			return nil, err
		}
	}
	return context.WithValue(ctx, callerKey{}, c), nil
}

// callerAddr returns the address that a call comes from.
func callerAddr(ctx context.Context) netip.Addr {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return netip.Addr{}
	}
	ap, err := netip.ParseAddrPort(p.Addr.String())
	if err != nil {
		return netip.Addr{}
	}
	return ap.Addr().Unmap().WithZone("")
}

// inPrefixes reports whether hosts.prefixes holds an address.
func (s *Server) inPrefixes(a netip.Addr) bool {
	return slices.ContainsFunc(s.cfg.Hosts.Prefixes, func(p netip.Prefix) bool { return p.Contains(a) })
}

func (s *Server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	ctx, err := s.authorize(ctx, info.FullMethod)
	if err != nil {
		return nil, err
	}
	if _, ok := ctx.Deadline(); !ok {
		s.m.refused.WithLabelValues("deadline").Inc()
		return nil, status.Error(codes.InvalidArgument, "call without a deadline: want one, so that nobody waits for an answer that nobody reads")
	}
	end, err := s.limits.begin(classOf(info.FullMethod))
	if err != nil {
		return nil, err
	}
	defer end()
	reply, err := next(ctx, req)
	if err == nil {
		err = failpoint.Hit("before-reply")
	}
	return reply, err
}

type authorizedStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (a authorizedStream) Context() context.Context { return a.ctx }

func (s *Server) stream(srv any, st grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	ctx, err := s.authorize(st.Context(), info.FullMethod)
	if err != nil {
		return err
	}
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	if cert := tlsid.PeerCert(ctx); cert != nil {
		defer s.streams.add(cert, end)()
	}
	return next(srv, authorizedStream{st, ctx})
}

// invalid is the answer to a message that cannot be decoded.
func invalid(err error) error { return status.Error(codes.InvalidArgument, err.Error()) }

// deny is the answer to a call that is refused with a reason.
func deny(r lease.Reason, format string, args ...any) error {
	return wire.ToStatus(&wire.Error{Code: wire.CodeFor(r), Reason: r, Msg: fmt.Sprintf(format, args...)})
}

// undurable is the answer when the store did not take the transaction.
func undurable(err error) error {
	return deny(lease.ReasonDegradedStore, "not written: %v", err)
}

// checkSource says whether the caller may use a tunnel source: it calls from it (or from its /64, where that is allowed),
// and it lies in the prefixes of hosts.
func (s *Server) checkSource(c caller, source netip.Addr) error {
	if !s.inPrefixes(source) {
		s.m.refused.WithLabelValues("source").Inc()
		return deny(lease.ReasonBadSource, "tunnel source %s is outside of hosts.prefixes %v", source, s.cfg.Hosts.Prefixes)
	}
	if source == c.addr || s.cfg.Hosts.Same64 && netip.PrefixFrom(c.addr, 64).Masked().Contains(source) {
		return nil
	}
	s.m.refused.WithLabelValues("source").Inc()
	return deny(lease.ReasonBadSource, "tunnel source %s is not proven: the call came from %s", source, c.addr)
}
