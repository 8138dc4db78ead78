// Package leaseclient talks to the lease service on behalf of hosts, resolvers, gateways and operators. It speaks in our
// own types and never imports the service.
package leaseclient

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"

	leasev1 "github.com/dstm-project/dstm/api/lease/v1"
	"github.com/dstm-project/dstm/internal/wire"
	"github.com/dstm-project/dstm/lease"
)

// Error is a refusal by the service: gRPC code, reason, message.
type Error = wire.Error

// ReasonOf returns the reason of a refusal, lease.ReasonNone for any other error.
var ReasonOf = wire.ReasonOf

const (
	// A dead peer is noticed within keepaliveTime + keepaliveTimeout.
	keepaliveTime    = 10 * time.Second
	keepaliveTimeout = 3 * time.Second

	// attemptTimeout is how long one try of a unary call may take before it goes to a fresh connection. It lies above the
	// service's default bind_wait, which is time that the service takes on purpose.
	attemptTimeout = time.Second

	// maxMessage bounds what is received: a snapshot chunk or a list.
	maxMessage = 4 << 20
)

// Options say where the service is and who calls.
type Options struct {
	Servers []netip.AddrPort // tried in an order of our choosing; any of them will do
	TLS     *tls.Config      // from tlsid.Source.Client
	// Backoff bounds the wait between connection attempts; zero = 100 ms to 5 s.
	BackoffMin, BackoffMax time.Duration
}

// Conn is a connection to the service that is made when needed and made again when lost. It is safe for concurrent use.
type Conn struct {
	o  Options
	mu sync.Mutex
	cc *grpc.ClientConn
	// held are the newest leases that came with a secret, the newest first, for calls that must show it.
	held []*leasev1.Held
}

// New returns a Conn. It connects with the first call.
func New(o Options) (*Conn, error) {
	if len(o.Servers) == 0 {
		return nil, errors.New("lease service: no server given: want at least one address and port such as \"[2001:db8::1]:3545\"")
	}
	if o.TLS == nil {
		return nil, errors.New("lease service: no TLS configuration")
	}
	if o.BackoffMin == 0 {
		o.BackoffMin = 100 * time.Millisecond
	}
	if o.BackoffMax == 0 {
		o.BackoffMax = 5 * time.Second
	}
	c := &Conn{o: o}
	var err error
	c.cc, err = c.dial()
	return c, err
}

// window is how many bytes may be under way to the client: tables of gateways come as fast as 1 Gbit/s over 8 ms.
const window = 1 << 20

func (c *Conn) dial() (*grpc.ClientConn, error) {
	// Each client starts at another server, so that a restart of all clients does not fall on the first one.
	addrs := make([]resolver.Address, len(c.o.Servers))
	for i, at := range rand.Perm(len(addrs)) {
		addrs[i] = resolver.Address{Addr: c.o.Servers[at].String()}
	}
	r := manual.NewBuilderWithScheme("dstm")
	r.InitialState(resolver.State{Addresses: addrs})
	cc, err := grpc.NewClient("dstm:///lease-service",
		grpc.WithResolvers(r),
		grpc.WithTransportCredentials(credentials.NewTLS(c.o.TLS)),
		// No proxy from the environment: the way to the service is configured.
		grpc.WithNoProxy(),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: keepaliveTime, Timeout: keepaliveTimeout}),
		grpc.WithConnectParams(grpc.ConnectParams{
			MinConnectTimeout: 3 * time.Second,
			Backoff:           backoff.Config{BaseDelay: c.o.BackoffMin, Multiplier: 1.6, Jitter: 0.3, MaxDelay: c.o.BackoffMax},
		}),
		// Of a fixed size, or every call would come with pings that measure the path.
		grpc.WithInitialWindowSize(window), grpc.WithInitialConnWindowSize(window),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
	)
	if err != nil {
		return nil, fmt.Errorf("lease service: %w", err)
	}
	return cc, nil
}

func (c *Conn) get() *grpc.ClientConn {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.cc
}

// Reset drops the connection and makes a fresh one at once, without waiting for a back-off. Calls and streams under way
// fail with codes.Canceled. Call it after the host's addresses or routes changed or the machine woke up.
func (c *Conn) Reset() { c.replace(c.get()) }

// replace drops one connection, unless somebody else did already.
func (c *Conn) replace(old *grpc.ClientConn) {
	fresh, err := c.dial()
	if err != nil { // the options were good once; keep what there is
		return
	}
	c.mu.Lock()
	if c.cc != old {
		c.mu.Unlock()
		fresh.Close()
		return
	}
	c.cc = fresh
	c.mu.Unlock()
	old.Close()
	fresh.Connect()
}

// Close ends the connection and every stream on it.
func (c *Conn) Close() error { return c.get().Close() }

// call runs a unary call until it is answered or ctx ends. A try that gets no answer in attemptTimeout goes to a fresh
// connection; UNAVAILABLE is tried again after a short wait. Both are safe: requests carry an id, or change nothing.
func call[Req, Rep any](ctx context.Context, c *Conn, f func(context.Context, *grpc.ClientConn, Req) (Rep, error), req Req) (Rep, error) {
	wait := c.o.BackoffMin
	var said error // what the service answered last; it says more than a deadline does
	for {
		cc := c.get()
		end := time.Now().Add(attemptTimeout)
		try, cancel := context.WithDeadline(ctx, end)
		rep, err := f(try, cc, req)
		// The server's end of a try may be here before the context's own.
		expired := !time.Now().Before(end) && ctx.Err() == nil
		cancel()
		if err == nil {
			return rep, nil
		}
		err = wire.FromStatus(err)
		var e *Error
		switch {
		case ctx.Err() != nil && said != nil:
			return rep, said
		case ctx.Err() != nil || !errors.As(err, &e):
			return rep, err
		case expired:
			c.replace(cc)
			continue
		case e.Code != codes.Unavailable && e.Code != codes.Canceled:
			return rep, err
		}
		if e.Reason != lease.ReasonNone {
			said = err
		}
		select {
		case <-ctx.Done():
			return rep, err
		case <-time.After(wait/2 + rand.N(wait/2+1)):
		}
		wait = min(2*wait, c.o.BackoffMax)
	}
}
