// Package thinrpc serves gRPC to callers that are many and idle nearly all the time: hosts, each of which keeps one stream
// open. It speaks the same protocol as google.golang.org/grpc (gRPC over HTTP/2, RFC 9113, over TLS), with less for each
// connection: one goroutine that waits below TLS with an empty stack, no buffers, no timers, and no goroutine for a stream.
// Measured, an idle connection of google.golang.org/grpc costs 40 KB before garbage, half of that in stacks.
package thinrpc

import (
	"context"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
)

// Unary answers a call. It has a goroutine of its own. ctx ends with the call, and has the caller as grpc/peer has it.
type Unary func(ctx context.Context, decode func(any) error) (any, error)

// Open begins a stream. It runs in the goroutine of the connection and must not wait for long.
type Open func(ctx context.Context, st *Stream) (Receiver, error)

// Receiver takes what comes on a stream. Its methods run one at a time, and must not wait for long.
type Receiver interface {
	// Recv takes one message. An error ends the stream and is what the caller is told.
	Recv(decode func(any) error) error
	// Closed says that nothing more comes. It is called once, and always.
	Closed()
}

// Config says what is served, and what one connection may do.
type Config struct {
	Unary      map[string]Unary // by /service/method
	Streams    map[string]Open
	MaxMessage int           // bytes of a received one
	MaxStreams int           // calls and streams of a connection at once
	PingAfter  time.Duration // without anything heard
	PingWait   time.Duration // for something to be heard then
	// Unknown answers calls of other methods; nil = codes.Unimplemented.
	Unknown func(ctx context.Context, method string) error
}

// Server serves connections.
type Server struct {
	conf  Config
	start time.Time
	bufs  sync.Pool
	work  chan func() // to idle workers
	quit  chan struct{}
	idle  atomic.Int64   // workers
	hands sync.WaitGroup // of the workers

	mu    sync.Mutex
	conns map[*conn]struct{}
	ends  bool
	wg    sync.WaitGroup // of the connections and their calls
}

// New returns a server without connections. Run it.
func New(c Config) *Server {
	s := &Server{conf: c, start: time.Now(), conns: map[*conn]struct{}{}, work: make(chan func()), quit: make(chan struct{})}
	s.bufs.New = func() any { return new([readSize]byte) }
	return s
}

// Serve serves a connection until it ends. tls is what the other side is spoken to through, raw what is below, auth who it is.
func (s *Server) Serve(raw *Raw, tls net.Conn, auth credentials.AuthInfo) {
	c := newConn(s, tls, &peer.Peer{Addr: raw.RemoteAddr(), LocalAddr: raw.LocalAddr(), AuthInfo: auth})
	s.mu.Lock()
	if s.ends {
		s.mu.Unlock()
		tls.Close()
		return
	}
	s.conns[c] = struct{}{}
	s.wg.Add(1)
	s.mu.Unlock()
	defer s.wg.Done()
	defer func() {
		s.mu.Lock()
		delete(s.conns, c)
		s.mu.Unlock()
		c.end()
	}()
	if raw.thin() != nil {
		return
	}
	// This goroutine only waits, so that its stack stays the smallest there is: what has to be done is done by another one.
	for err := c.aside(c.begin); err == nil; err = c.aside(c.drain) {
		if raw.wait() != nil {
			return
		}
	}
}

// maxIdle is how many workers wait for work at most.
const maxIdle = 64

// do runs f in another goroutine: an idle one if there is one, whose stack has grown to what calls need already.
func (s *Server) do(f func()) {
	select {
	case s.work <- f:
	default:
		s.hands.Go(func() { s.worker(f) })
	}
}

func (s *Server) worker(f func()) {
	for f != nil {
		f()
		f = nil
		if s.idle.Add(1) <= maxIdle {
			select {
			case f = <-s.work:
			case <-s.quit:
			}
		}
		s.idle.Add(-1)
	}
}

// sweepEvery is how often silent connections are looked for.
const sweepEvery = 5 * time.Second

// Run looks after silent connections until ctx ends; then it stops serving: calls under way have patience to end.
func (s *Server) Run(ctx context.Context, patience time.Duration) {
	t := time.NewTicker(sweepEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			s.stop(patience)
			return
		case <-t.C:
			for _, c := range s.all() {
				c.look(s.now())
			}
		}
	}
}

// now is the time since the start of the server.
func (s *Server) now() time.Duration { return time.Since(s.start) }

func (s *Server) all() []*conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]*conn, 0, len(s.conns))
	for c := range s.conns {
		out = append(out, c)
	}
	return out
}

// Len returns how many connections there are.
func (s *Server) Len() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.conns)
}

func (s *Server) stop(patience time.Duration) {
	s.mu.Lock()
	s.ends = true
	s.mu.Unlock()
	all := s.all()
	for _, c := range all {
		c.leave()
	}
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		busy := false
		for _, c := range all {
			busy = busy || c.busy()
		}
		if !busy {
			break
		}
	}
	for _, c := range all {
		c.end()
	}
	s.wg.Wait()
	close(s.quit)
	s.hands.Wait()
}

var errEnded = errors.New("the connection has ended")
