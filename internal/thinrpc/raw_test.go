package thinrpc

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	mrand "math/rand/v2"
	"net"
	"testing"
	"time"
)

// thinPair returns both ends of a connection, of which the second is thin.
func thinPair(t *testing.T) (net.Conn, *Raw) {
	t.Helper()
	l, err := net.Listen("tcp", "[::1]:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	b, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	r, err := NewRaw(b.(*net.TCPConn), time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	_ = r.SetDeadline(time.Now().Add(time.Millisecond)) // as of a handshake
	if err := r.thin(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); r.Close() })
	return a, r
}

// TestRaw: what is read is what was sent, in whatever pieces both sides deal with it, and no wait is in vain.
func TestRaw(t *testing.T) {
	a, r := thinPair(t)
	sent := make([]byte, 1<<20)
	_, _ = rand.Read(sent)
	go func() {
		rnd := mrand.New(mrand.NewPCG(1, 2))
		for b := sent; len(b) > 0; {
			n := min(len(b), 1+rnd.IntN(200))
			if _, err := a.Write(b[:n]); err != nil {
				t.Error(err)
				return
			}
			b = b[n:]
			if rnd.IntN(50) == 0 {
				time.Sleep(time.Millisecond)
			}
		}
		a.Close()
	}()
	var got bytes.Buffer
	rnd := mrand.New(mrand.NewPCG(3, 4))
	for {
		if err := r.wait(); err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		for first := true; ; first = false {
			b := make([]byte, 1+rnd.IntN(300))
			n, err := r.Read(b)
			got.Write(b[:n])
			if errors.Is(err, errAgain) {
				if first {
					t.Fatal("nothing there after a wait")
				}
				break
			}
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	if !bytes.Equal(got.Bytes(), sent) {
		t.Errorf("%d bytes came, not those sent (%d)", got.Len(), len(sent))
	}
}

// TestRawClose: a wait ends with its connection.
func TestRawClose(t *testing.T) {
	_, r := thinPair(t)
	done := make(chan error, 1)
	go func() { done <- r.wait() }()
	r.Close()
	if err := <-done; err == nil {
		t.Error("a wait on a closed connection came to something")
	}
	if _, err := r.Read(make([]byte, 1)); err == nil || errors.Is(err, errAgain) {
		t.Errorf("read: %v", err)
	}
}
