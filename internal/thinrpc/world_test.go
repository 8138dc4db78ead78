package thinrpc

import (
	"context"
	"errors"
	"net"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	leasev1 "github.com/dstm-project/dstm/api/lease/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 20 * time.Second

// world is a server on loopback, without TLS, that serves Hosts in its own way: Release answers, fails or waits as its
// request says, and Attend sends back what it gets.
type world struct {
	t    testing.TB
	s    *Server
	addr string
	stop func()

	mu      sync.Mutex
	begun   int // streams
	closed  int
	waiting chan struct{} // calls that wait
	ended   chan error    // of the contexts of calls that waited
	streams chan *Stream
}

const (
	release = "/dstm.lease.v1.Hosts/Release"
	attend  = "/dstm.lease.v1.Hosts/Attend"
)

func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{t: t, waiting: make(chan struct{}, 100), ended: make(chan error, 100), streams: make(chan *Stream, 100)}
	w.s = New(Config{
		Unary: map[string]Unary{release: w.release}, Streams: map[string]Open{attend: w.attend},
		MaxMessage: 64 << 10, MaxStreams: 8, PingAfter: 20 * time.Second, PingWait: 3 * time.Second,
	})
	l, err := net.Listen("tcp", "[::1]:0")
	if err != nil {
		t.Fatal(err)
	}
	w.addr = l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { w.s.Run(ctx, 2*time.Second) })
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			raw, err := NewRaw(c.(*net.TCPConn), 10*time.Second)
			if err != nil {
				t.Error(err)
				continue
			}
			wg.Go(func() { w.s.Serve(raw, raw, nil) })
		}
	})
	w.stop = sync.OnceFunc(func() {
		l.Close()
		cancel()
		wg.Wait()
	})
	t.Cleanup(func() {
		w.stop()
		if w.begun != w.closed {
			t.Errorf("%d streams begun, %d closed", w.begun, w.closed)
		}
	})
	return w
}

// release answers by the first byte of the request id: e and x fail, w and s wait, else it answers at once.
func (w *world) release(ctx context.Context, decode func(any) error) (any, error) {
	var m leasev1.ReleaseRequest
	if err := decode(&m); err != nil {
		return nil, err
	}
	if _, ok := peer.FromContext(ctx); !ok {
		return nil, status.Error(codes.Internal, "no peer")
	}
	switch id := string(m.GetRequestId()); {
	case id == "e":
		st, err := status.New(codes.ResourceExhausted, "100 % of \"it\" — no more").WithDetails(&leasev1.ReleaseReply{})
		if err != nil {
			return nil, err
		}
		return nil, st.Err()
	case id == "x":
		return nil, errors.New("no status")
	case id == "w":
		w.waiting <- struct{}{}
		<-ctx.Done()
		w.ended <- ctx.Err()
		return nil, ctx.Err()
	case id == "s": // some time
		w.waiting <- struct{}{}
		time.Sleep(200 * time.Millisecond)
	}
	return &leasev1.ReleaseReply{}, nil
}

// echo sends back what it gets as lists, until it gets an empty one.
type echo struct {
	w  *world
	st *Stream
	in chan *leasev1.AttendDown
}

func (w *world) attend(_ context.Context, st *Stream) (Receiver, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.begun++
	e := &echo{w, st, make(chan *leasev1.AttendDown, 1000)}
	go func() {
		for m := range e.in {
			_ = st.Send(m) // an error: the stream has ended
		}
	}()
	select {
	case w.streams <- st:
	default: // nobody wants so many
	}
	return e, nil
}

func (e *echo) Recv(decode func(any) error) error {
	var m leasev1.AttendUp
	if err := decode(&m); err != nil {
		return err
	}
	h := m.GetHello()
	switch h.GetInstance() {
	case "end":
		return status.Error(codes.Aborted, "as you wish")
	case "large":
		e.in <- &leasev1.AttendDown{M: &leasev1.AttendDown_List{List: &leasev1.RevocationList{Der: make([]byte, 1<<20)}}}
	default:
		e.in <- &leasev1.AttendDown{M: &leasev1.AttendDown_Welcome{Welcome: &leasev1.Welcome{HostId: h.GetInstance()}}}
	}
	return nil
}

func (e *echo) Closed() {
	e.w.mu.Lock()
	defer e.w.mu.Unlock()
	e.w.closed++
	close(e.in)
}

// client calls as google.golang.org/grpc does.
func (w *world) client(o ...grpc.DialOption) leasev1.HostsClient {
	w.t.Helper()
	cc, err := grpc.NewClient("passthrough:///"+w.addr, append(o, grpc.WithTransportCredentials(insecure.NewCredentials()))...)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { cc.Close() })
	return leasev1.NewHostsClient(cc)
}

func hello(instance string) *leasev1.AttendUp {
	return &leasev1.AttendUp{M: &leasev1.AttendUp_Hello{Hello: &leasev1.HostHello{Instance: instance}}}
}

// framed is a message as gRPC sends it.
func framed(t testing.TB, m proto.Message) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return append([]byte{0, byte(len(b) >> 24), byte(len(b) >> 16), byte(len(b) >> 8), byte(len(b))}, b...)
}
