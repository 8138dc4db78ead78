package thinrpc

import (
	"bytes"
	"context"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/peer"
)

// sink is a connection that takes everything.
type sink struct{ net.Conn }

func (sink) Write(b []byte) (int, error)      { return len(b), nil }
func (sink) SetWriteDeadline(time.Time) error { return nil }
func (sink) Close() error                     { return nil }

// counted is a receiver that must be closed once.
type counted struct{ open *atomic.Int64 }

func (counted) Recv(decode func(any) error) error { return nil }
func (c counted) Closed()                         { c.open.Add(-1) }

// FuzzInput: whatever comes, in two pieces, nothing breaks, nothing is held that must not be, and every stream is closed once.
func FuzzInput(f *testing.F) {
	var b bytes.Buffer
	fr := http2.NewFramer(&b, nil)
	b.WriteString(http2.ClientPreface)
	must := func(err error) {
		if err != nil {
			f.Fatal(err)
		}
	}
	must(fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 70000}))
	var h bytes.Buffer
	enc := hpack.NewEncoder(&h)
	for _, x := range []string{":method=POST", ":path=/s", "content-type=application/grpc", "grpc-timeout=9S"} {
		k, v, _ := strings.Cut(x, "=")
		must(enc.WriteField(hpack.HeaderField{Name: k, Value: v}))
	}
	must(fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: h.Bytes(), EndHeaders: true}))
	must(fr.WriteDataPadded(1, false, []byte{0, 0, 0, 0, 1, 7, 0, 0}, []byte{0, 0}))
	f.Add(bytes.Clone(b.Bytes()), 30)
	must(fr.WriteData(1, true, []byte{0, 0, 3}))
	f.Add(bytes.Clone(b.Bytes()), 60)
	must(fr.WriteRSTStream(1, 8))
	must(fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 3, BlockFragment: h.Bytes()[:4]}))
	must(fr.WriteContinuation(3, true, h.Bytes()[4:]))
	must(fr.WriteWindowUpdate(3, 1<<30))
	must(fr.WritePing(false, [8]byte{}))
	f.Add(bytes.Clone(b.Bytes()), 90)
	f.Fuzz(func(t *testing.T, in []byte, at int) {
		var open atomic.Int64
		s := New(Config{MaxMessage: 1000, MaxStreams: 4, Streams: map[string]Open{
			"/s": func(context.Context, *Stream) (Receiver, error) {
				open.Add(1)
				return counted{&open}, nil
			},
		}})
		c := newConn(s, sink{}, &peer.Peer{})
		at = min(max(at, 0), len(in))
		left := []byte{}
		for _, part := range [][]byte{in[:at], in[at:]} {
			left = append(left, part...)
			for len(left) > 0 {
				n := min(len(left), readSize)
				used, err := c.input(left[:n])
				if err != nil {
					left = nil
					break
				}
				left = left[used:]
				if used == 0 {
					break
				}
			}
		}
		held := 0
		for _, st := range c.streams {
			held += len(st.buf)
		}
		if held > maxHeld || len(c.block) > maxHeaders || len(c.streams) > 4 {
			t.Errorf("%d bytes of messages, %d of headers, %d streams", held, len(c.block), len(c.streams))
		}
		c.end()
		s.wg.Wait()
		if n := open.Load(); n != 0 {
			t.Errorf("%d streams not closed, or closed twice", n)
		}
	})
}
