package leasesvc

import (
	"context"
	"crypto/x509"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/dstm-project/dstm/internal/bucket"
	"github.com/dstm-project/dstm/internal/thinrpc"
	"github.com/dstm-project/dstm/internal/tlsid"
)

// LimitsConfig bounds what callers may cost. 0 = no limit, except for Calls.
type LimitsConfig struct {
	Calls       int `yaml:"calls"`       // under way at once
	PerHost     int `yaml:"per_host"`    // calls and streams begun per second by one host; the burst is twice that
	Connections int `yaml:"connections"` // open at once by one caller
	Streams     int `yaml:"streams"`     // open at once by one caller, on all its connections
	// Handshakes is how many connections are accepted per second from hosts.prefixes, and as many from elsewhere; the burst
	// is twice that.
	Handshakes int `yaml:"handshakes"`
	Per64      int `yaml:"per_64"` // of them from one /64
}

func defaultLimits() LimitsConfig {
	return LimitsConfig{Calls: 4096, PerHost: 20, Connections: 16, Streams: 16, Handshakes: 1000, Per64: 200}
}

// lane is where a connection waits its turn. Hosts are many and come all together after a restart; gateways and resolvers
// call from elsewhere, as a rule, and must not wait for them.
type lane bool

const (
	laneHosts  lane = true // from hosts.prefixes
	laneOthers lane = false
)

// class is how important a call is when not all can be served. Streams of gateways are above all of them.
type class uint8

const (
	classHint  class = iota // may be late: DNS answers go out without
	classBind               // and what operators ask
	classRenew              // keeps a lease that is in use; so does Release, which makes room
)

// share is which part of the calls, in percent, may be under way before a class is refused.
var share = [...]int64{classHint: 50, classBind: 80, classRenew: 100}

var classes = map[string]class{
	"/dstm.lease.v1.Resolvers/Hint": classHint,
	"/dstm.lease.v1.Hosts/Renew":    classRenew,
	"/dstm.lease.v1.Hosts/Release":  classRenew,
}

func classOf(method string) class {
	if c, ok := classes[method]; ok {
		return c
	}
	return classBind
}

// maxCallers is how many identities, and how many /64, are remembered: about 10 MB each.
const maxCallers = 1 << 16

// limits counts what callers cost.
type limits struct {
	conf    LimitsConfig
	m       *metrics
	clients []netip.Prefix // hosts.prefixes
	start   time.Time
	calls   atomic.Int64

	accepted atomic.Int64 // connections

	mu    sync.Mutex
	hosts *bucket.Set[string]
	nets  *bucket.Set[netip.Prefix]
	lanes *bucket.Set[lane]
}

func newLimits(c LimitsConfig, clients []netip.Prefix, m *metrics) *limits {
	return &limits{
		conf: c, m: m, clients: clients, start: time.Now(),
		hosts: bucket.New[string](c.PerHost, time.Second, 2*c.PerHost, maxCallers),
		nets:  bucket.New[netip.Prefix](c.Per64, time.Second, 2*c.Per64, maxCallers),
		lanes: bucket.New[lane](c.Handshakes, time.Second, 2*c.Handshakes, 2),
	}
}

// retryAfter is when a caller that was refused may come back.
const retryAfter = 500 * time.Millisecond

func tooMany(what string) error {
	st, err := status.New(codes.ResourceExhausted, what).WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(retryAfter)})
	if err != nil {
		return status.Error(codes.ResourceExhausted, what)
	}
	return st.Err()
}

// begin lets a call begin, or says why not.
func (l *limits) begin(c class) (end func(), err error) {
	if n := l.calls.Add(1); n*100 > int64(l.conf.Calls)*share[c] {
		l.calls.Add(-1)
		l.m.refused.WithLabelValues("overload").Inc()
		return nil, tooMany("too many calls are under way")
	}
	return func() { l.calls.Add(-1) }, nil
}

// host says whether a host may begin one more call or stream. Gateways and resolvers speak for many and have no such limit.
func (l *limits) host(identity string) error {
	l.mu.Lock()
	ok := l.hosts.Take(time.Since(l.start), identity)
	l.mu.Unlock()
	if !ok {
		l.m.refused.WithLabelValues("rate").Inc()
		return tooMany("more calls than limits.per_host allows")
	}
	return nil
}

// admits reports whether a connection may begin its handshake, which costs more than anything else before its caller is known.
func (l *limits) admits(from net.Addr) bool {
	ap, err := netip.ParseAddrPort(from.String())
	if err != nil {
		return true // not TCP: a test's pipe
	}
	addr, in := ap.Addr().Unmap().WithZone(""), laneOthers
	net64, err := addr.Prefix(64)
	if err != nil {
		net64 = netip.PrefixFrom(addr, 32)
	}
	if slices.ContainsFunc(l.clients, func(p netip.Prefix) bool { return p.Contains(addr) }) {
		in = laneHosts
	}
	now := time.Since(l.start)
	l.mu.Lock()
	defer l.mu.Unlock()
	full, ok := l.nets.Next(now, net64)
	if !ok || !l.lanes.Take(now, in) {
		return false
	}
	l.nets.Set(now, net64, full)
	return true
}

// listener closes connections that are too many before anything is spent on them.
type listener struct {
	net.Listener
	l *limits
}

// Accept returns the next connection that may begin.
func (l listener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return c, err
		}
		if l.l.admits(c.RemoteAddr()) {
			l.l.accepted.Add(1)
			if tcp, ok := c.(*net.TCPConn); ok {
				if raw, err := thinrpc.NewRaw(tcp, pingWait); err == nil {
					return raw, nil
				}
			}
			return c, nil // an error: it is closed already, and reading will say so
		}
		l.l.m.refused.WithLabelValues("handshake").Inc()
		if tcp, ok := c.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0) // no state of the refused stays here
		}
		c.Close()
	}
}

// streams are those under way: counted by caller, and ended when their caller's certificate is revoked.
type streams struct {
	mu  sync.Mutex
	all map[*stream]struct{}
	by  map[callerID]int
}

// callerID tells callers apart.
type callerID struct {
	role tlsid.Role
	name string
}

type stream struct {
	cert *x509.Certificate // nil = none was shown
	end  func(error)
}

// openStream counts a stream that begins, unless its caller has too many. end ends it.
func (s *Server) openStream(ctx context.Context, end func(error)) (remove func(), err error) {
	c, st := callerOf(ctx), &stream{end: end}
	if p, ok := tlsid.PeerOf(ctx); ok {
		st.cert = p.Cert
	}
	id, most := callerID{c.id.Role, c.id.Name}, s.cfg.Limits.Streams
	all := &s.streams
	all.mu.Lock()
	defer all.mu.Unlock()
	if most > 0 && all.by[id] >= most {
		s.m.refused.WithLabelValues("streams").Inc()
		return nil, tooMany(fmt.Sprintf("%s has %d streams open already, which is all that limits.streams allows", id.name, most))
	}
	all.all[st] = struct{}{}
	all.by[id]++
	return func() {
		all.mu.Lock()
		defer all.mu.Unlock()
		delete(all.all, st)
		if all.by[id]--; all.by[id] == 0 {
			delete(all.by, id)
		}
	}, nil
}

// endRevoked ends every stream whose certificate a revocation list takes back.
func (s *Server) endRevoked() {
	s.streams.mu.Lock()
	defer s.streams.mu.Unlock()
	for st := range s.streams.all {
		if st.cert == nil {
			continue
		}
		if err := s.d.TLS.Revoked(st.cert); err != nil {
			s.d.Log.Warn("stream ended", "err", err)
			st.end(status.Error(codes.Unauthenticated, err.Error()))
		}
	}
}
