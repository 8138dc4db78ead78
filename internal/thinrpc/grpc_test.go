package thinrpc

import (
	"context"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	leasev1 "github.com/dstm-project/dstm/api/lease/v1"
)

// TestCalls: calls of google.golang.org/grpc get what its own server would answer.
func TestCalls(t *testing.T) {
	w := newWorld(t)
	c := w.client()
	for _, x := range []struct {
		name    string
		id      string
		timeout time.Duration
		code    codes.Code
		text    string
	}{
		{"answer", "", patience, codes.OK, ""},
		{"largest message", strings.Repeat("x", 64<<10-10), patience, codes.OK, ""},
		{"too large", strings.Repeat("x", 64<<10), patience, codes.ResourceExhausted, "want at most 65536"},
		{"refusal", "e", patience, codes.ResourceExhausted, `100 % of "it" — no more`},
		{"error that is no status", "x", patience, codes.Unknown, "no status"},
		{"deadline", "w", 50 * time.Millisecond, codes.DeadlineExceeded, ""},
	} {
		t.Run(x.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), x.timeout)
			defer cancel()
			_, err := c.Release(ctx, &leasev1.ReleaseRequest{RequestId: []byte(x.id)})
			st := status.Convert(err)
			if st.Code() != x.code || !strings.Contains(st.Message(), x.text) {
				t.Errorf("%v, want %s %q", err, x.code, x.text)
			}
			if x.id == "e" && len(st.Details()) != 1 {
				t.Errorf("details %v", st.Details())
			}
		})
	}
	if err := <-w.ended; err == nil {
		t.Error("the context of a call that is over goes on")
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if _, err := c.Bind(ctx, &leasev1.BindRequest{}); status.Code(err) != codes.Unimplemented {
		t.Errorf("a method that is not served: %v", err)
	}
	if _, err := c.Release(ctx, &leasev1.ReleaseRequest{}, grpc.UseCompressor("none")); err == nil {
		t.Error("an unknown compressor is used")
	}
}

// TestCancel: a call that is given up by its caller ends here.
func TestCancel(t *testing.T) {
	w := newWorld(t)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := w.client().Release(ctx, &leasev1.ReleaseRequest{RequestId: []byte("w")})
		done <- err
	}()
	<-w.waiting
	cancel()
	if err := <-done; status.Code(err) != codes.Canceled {
		t.Error(err)
	}
	if err := <-w.ended; err != context.Canceled {
		t.Error(err)
	}
}

// TestManyCalls: more calls than a connection may have under way at once all get their answers, on one connection.
func TestManyCalls(t *testing.T) {
	w := newWorld(t)
	c := w.client()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var wg sync.WaitGroup
	for i := range 500 {
		wg.Go(func() {
			if _, err := c.Release(ctx, &leasev1.ReleaseRequest{RequestId: fmt.Append(nil, i, strings.Repeat("y", i*100%20000))}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := w.s.Len(); n != 1 {
		t.Errorf("%d connections", n)
	}
}

// TestStream: messages of every size go both ways in order, and the end of the stream comes with its reason.
func TestStream(t *testing.T) {
	w := newWorld(t)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	st, err := w.client(grpc.WithInitialWindowSize(64 << 10)).Attend(ctx)
	if err != nil {
		t.Fatal(err)
	}
	var sizes []int
	for i := range 200 {
		sizes = append(sizes, i*i%50_000)
	}
	go func() {
		for _, n := range sizes {
			if err := st.Send(hello(strings.Repeat("z", n))); err != nil {
				t.Error(err)
			}
		}
	}()
	for _, n := range sizes {
		m, err := st.Recv()
		if err != nil || len(m.GetWelcome().GetHostId()) != n {
			t.Fatalf("%d bytes, %v: want %d", len(m.GetWelcome().GetHostId()), err, n)
		}
	}
	if err := st.Send(hello("large")); err != nil { // larger than every window
		t.Fatal(err)
	}
	if m, err := st.Recv(); err != nil || len(m.GetList().GetDer()) != 1<<20 {
		t.Fatalf("%d bytes, %v: want 1 MiB", len(m.GetList().GetDer()), err)
	}
	if err := st.Send(hello("end")); err != nil {
		t.Fatal(err)
	}
	if _, err := st.Recv(); status.Code(err) != codes.Aborted || status.Convert(err).Message() != "as you wish" {
		t.Errorf("end: %v", err)
	}
}

// TestEnds: a stream ends by either side, at any time, and always once.
func TestEnds(t *testing.T) {
	w := newWorld(t)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	c := w.client()
	open := func() (leasev1.Hosts_AttendClient, *Stream) {
		t.Helper()
		st, err := c.Attend(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := st.Send(hello("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := st.Recv(); err != nil {
			t.Fatal(err)
		}
		return st, <-w.streams
	}
	near, far := open()
	for range 10 {
		far.End(status.Error(codes.Unauthenticated, "taken back"))
	}
	if _, err := near.Recv(); status.Code(err) != codes.Unauthenticated || status.Convert(err).Message() != "taken back" {
		t.Errorf("ended by the server: %v", err)
	}
	if err := far.Send(&leasev1.AttendDown{}); err == nil {
		t.Error("sent on a stream that has ended")
	}
	near, _ = open()
	if err := near.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if _, err := near.Recv(); err != io.EOF {
		t.Errorf("ended by the caller: %v", err)
	}
	st, err := c.Attend(ctx)
	if err != nil {
		t.Fatal(err)
	}
	(<-w.streams).End(status.Error(codes.NotFound, "at once")) // before any message
	if _, err := st.Recv(); status.Code(err) != codes.NotFound {
		t.Errorf("ended before it began: %v", err)
	}
}

// TestStop: at a stop calls under way get their answers, streams end, and nothing is served any more.
func TestStop(t *testing.T) {
	w := newWorld(t)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	c := w.client()
	st, err := c.Attend(ctx)
	if err != nil {
		t.Fatal(err)
	}
	<-w.streams
	done := make(chan error, 1)
	go func() {
		_, err := c.Release(ctx, &leasev1.ReleaseRequest{RequestId: []byte("s")})
		done <- err
	}()
	<-w.waiting
	w.stop()
	if err := <-done; err != nil {
		t.Errorf("call under way: %v", err)
	}
	if _, err := st.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("stream: %v", err)
	}
}

// TestSilent: who says nothing is asked, and left when nothing comes.
func TestSilent(t *testing.T) {
	w := newWorld(t)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	c := w.client()
	if _, err := c.Release(ctx, &leasev1.ReleaseRequest{}); err != nil {
		t.Fatal(err)
	}
	k := w.s.all()[0]
	heard := k.heard.Load()
	k.look(w.s.now() + 30*time.Second)
	for end := time.Now().Add(patience); k.heard.Load() == heard; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("no answer to a ping")
		}
	}
	if k.look(w.s.now()); k.pinged.Load() != 0 {
		t.Error("still taken for silent")
	}
	k.look(w.s.now() + 30*time.Second)
	k.look(w.s.now() + 32*time.Second)
	if w.s.Len() != 1 {
		t.Error("closed too soon")
	}
	k.look(w.s.now() + 34*time.Second)
	for end := time.Now().Add(patience); w.s.Len() > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("a silent connection stays")
		}
	}
}
