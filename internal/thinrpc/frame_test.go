package thinrpc

import (
	"bytes"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	leasev1 "github.com/dstm-project/dstm/api/lease/v1"
)

// wire is a caller that sends what frames it likes.
type wire struct {
	t   *testing.T
	c   net.Conn
	out bytes.Buffer // frames that are to be sent
	fr  *http2.Framer
	enc *hpack.Encoder
	hdr bytes.Buffer
}

// dial connects, with the preface and the settings sent.
func (w *world) dial(t *testing.T) *wire {
	t.Helper()
	c, err := net.Dial("tcp", w.addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(patience))
	x := &wire{t: t, c: c}
	x.fr = http2.NewFramer(&x.out, c)
	x.fr.AllowIllegalWrites = true
	x.fr.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	x.enc = hpack.NewEncoder(&x.hdr)
	x.out.WriteString(http2.ClientPreface)
	x.do(x.fr.WriteSettings())
	return x
}

func (x *wire) do(err error) {
	x.t.Helper()
	if err != nil {
		x.t.Fatal(err)
	}
}

// flush sends the frames, at most n bytes at a time.
func (x *wire) flush(n int) {
	x.t.Helper()
	for x.out.Len() > 0 {
		_, err := x.c.Write(x.out.Next(n))
		x.do(err)
	}
}

// request returns a header block of a call.
func (x *wire) request(path string, more ...string) []byte {
	x.t.Helper()
	x.hdr.Reset()
	fields := append([]string{":method", "POST", ":scheme", "http", ":path", path, ":authority", "x", "content-type", "application/grpc", "te", "trailers"}, more...)
	for i := 0; i < len(fields); i += 2 {
		x.do(x.enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]}))
	}
	return bytes.Clone(x.hdr.Bytes())
}

// begin sends the headers of a call.
func (x *wire) begin(id uint32, path string, more ...string) {
	x.t.Helper()
	x.do(x.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: x.request(path, more...), EndHeaders: true}))
}

// until returns the next frame of a kind on a stream, as text: what of it matters.
func (x *wire) until(kind http2.FrameType, id uint32) string {
	x.t.Helper()
	for {
		f, err := x.fr.ReadFrame()
		if err != nil {
			x.t.Fatalf("waiting for %s on %d: %v", kind, id, err)
		}
		if f.Header().Type != kind || f.Header().StreamID != id || f.Header().Flags.Has(http2.FlagSettingsAck) && kind == http2.FrameSettings {
			continue
		}
		switch f := f.(type) {
		case *http2.MetaHeadersFrame:
			var s strings.Builder
			for _, h := range f.Fields {
				s.WriteString(h.Name + "=" + h.Value + " ")
			}
			return s.String()
		case *http2.DataFrame:
			return string(f.Data())
		case *http2.RSTStreamFrame:
			return f.ErrCode.String()
		case *http2.GoAwayFrame:
			return f.ErrCode.String() + " " + string(f.DebugData())
		case *http2.PingFrame:
			return string(f.Data[:])
		case *http2.SettingsFrame:
			return f.String()
		}
		return ""
	}
}

// answered wants a call to be answered without an error.
func (x *wire) answered(id uint32) {
	x.t.Helper()
	if got, want := x.until(http2.FrameHeaders, id), ":status=200 content-type=application/grpc "; got != want {
		x.t.Errorf("headers %q, want %q", got, want)
	}
	if got := x.until(http2.FrameData, id); got != "\x00\x00\x00\x00\x00" {
		x.t.Errorf("answer %q", got)
	}
	if got, want := x.until(http2.FrameHeaders, id), "grpc-status=0 "; got != want {
		x.t.Errorf("trailers %q, want %q", got, want)
	}
}

// TestFrames: every form of frame that RFC 9113 allows is understood, however it is cut into packets.
func TestFrames(t *testing.T) {
	w := newWorld(t)
	message := framed(t, &leasev1.ReleaseRequest{RequestId: []byte("0123456789")})
	for _, c := range []struct {
		name string
		send func(x *wire)
	}{
		{"plain", func(x *wire) {
			x.begin(1, release)
			x.do(x.fr.WriteData(1, true, message))
		}},
		{"padded, with a priority", func(x *wire) {
			x.do(x.fr.WriteHeaders(http2.HeadersFrameParam{
				StreamID: 1, BlockFragment: x.request(release), EndHeaders: true, PadLength: 200,
				Priority: http2.PriorityParam{StreamDep: 3, Weight: 7},
			}))
			x.do(x.fr.WriteDataPadded(1, true, message, make([]byte, 255)))
		}},
		{"headers in pieces", func(x *wire) {
			b := x.request(release, "a", strings.Repeat("b", 1000))
			x.do(x.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: b[:5]}))
			x.do(x.fr.WriteContinuation(1, false, b[5:100]))
			x.do(x.fr.WriteContinuation(1, true, b[100:]))
			x.do(x.fr.WriteData(1, true, message))
		}},
		{"a message in pieces", func(x *wire) {
			x.begin(1, release)
			for i := range message {
				x.do(x.fr.WriteData(1, false, message[i:i+1]))
			}
			x.do(x.fr.WriteData(1, true, nil))
		}},
		{"trailers", func(x *wire) {
			x.begin(1, release)
			x.do(x.fr.WriteData(1, false, message))
			x.hdr.Reset()
			x.do(x.enc.WriteField(hpack.HeaderField{Name: "x", Value: "y"}))
			x.do(x.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: x.hdr.Bytes(), EndHeaders: true, EndStream: true}))
		}},
		{"what may be ignored", func(x *wire) {
			x.do(x.fr.WritePriority(1, http2.PriorityParam{StreamDep: 5}))
			x.do(x.fr.WriteRawFrame(99, 0, 1, []byte("new")))
			x.do(x.fr.WriteWindowUpdate(0, 1000))
			x.do(x.fr.WriteRSTStream(7, http2.ErrCodeCancel))
			x.begin(9, release)
			x.do(x.fr.WriteRSTStream(9, http2.ErrCodeCancel))
			x.do(x.fr.WriteData(9, true, message))
			x.do(x.fr.WriteWindowUpdate(9, 1000))
			x.begin(11, release)
			x.do(x.fr.WriteData(11, true, message))
			x.flush(1 << 20)
			x.answered(11)
			x.out.Reset()
			x.begin(1+12, release)
			x.do(x.fr.WriteData(13, true, message))
			x.flush(1 << 20)
			x.answered(13)
		}},
	} {
		for _, n := range []int{1 << 20, 1, 7, 64, 65} {
			t.Run(c.name, func(t *testing.T) {
				x := w.dial(t)
				c.send(x)
				x.flush(n)
				if c.name != "what may be ignored" {
					x.answered(1)
				}
				x.do(x.fr.WritePing(false, [8]byte{'p', 'i', 'n', 'g'}))
				x.flush(n)
				if got := x.until(http2.FramePing, 0); !strings.HasPrefix(got, "ping") {
					t.Errorf("ping answered with %q", got)
				}
			})
		}
	}
}

// TestRefused: what a caller must not do ends the call or the connection, with the reason.
func TestRefused(t *testing.T) {
	w := newWorld(t)
	message := framed(t, &leasev1.ReleaseRequest{})
	for _, c := range []struct {
		name string
		send func(x *wire)
		kind http2.FrameType
		id   uint32
		want string
	}{
		{"another content type", func(x *wire) { x.begin(1, release, "content-type", "text/html") }, http2.FrameHeaders, 1, ":status=415"},
		{"a bad deadline", func(x *wire) { x.begin(1, release, "grpc-timeout", "soon") }, http2.FrameHeaders, 1, "want 1 to 8 digits"},
		{"a compressor", func(x *wire) { x.begin(1, release, "grpc-encoding", "gzip") }, http2.FrameHeaders, 1, "grpc-status=12"},
		{"a compressed message", func(x *wire) {
			x.begin(1, release)
			x.do(x.fr.WriteData(1, true, []byte{1, 0, 0, 0, 0}))
		}, http2.FrameHeaders, 1, "grpc-status=12"},
		{"two messages in a call", func(x *wire) {
			x.begin(1, release)
			x.do(x.fr.WriteData(1, true, append(bytes.Clone(message), message...)))
		}, http2.FrameHeaders, 1, "more than one message"},
		{"no message in a call", func(x *wire) {
			x.begin(1, release)
			x.do(x.fr.WriteData(1, true, nil))
		}, http2.FrameHeaders, 1, "call without a message"},
		{"half a message in a call", func(x *wire) {
			x.begin(1, release)
			x.do(x.fr.WriteData(1, true, []byte{0, 0, 0, 0, 9, 1}))
		}, http2.FrameHeaders, 1, "call without a message"},
		{"no protobuf", func(x *wire) {
			x.begin(1, release)
			x.do(x.fr.WriteData(1, true, []byte{0, 0, 0, 0, 2, 0xff, 0xff}))
		}, http2.FrameHeaders, 1, "grpc-status=13"},
		{"too many calls", func(x *wire) {
			for i := range 9 {
				x.begin(uint32(2*i+1), attend)
			}
		}, http2.FrameRSTStream, 17, "REFUSED_STREAM"},
		{"large headers", func(x *wire) {
			x.begin(1, release, "x", strings.Repeat("\x01", 7000), "y", strings.Repeat("\x01", 7000))
		}, http2.FrameGoAway, 0, "ENHANCE_YOUR_CALM headers"},
		{"small headers that grow", func(x *wire) {
			var more []string
			for range 100 {
				more = append(more, "x", strings.Repeat("a", 100)) // an index each after the first
			}
			x.begin(1, release, more...)
		}, http2.FrameGoAway, 0, "ENHANCE_YOUR_CALM headers"},
		{"headers without an end", func(x *wire) {
			x.do(x.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1}))
			for range 1000 {
				x.do(x.fr.WriteContinuation(1, false, nil))
			}
		}, http2.FrameGoAway, 0, "ENHANCE_YOUR_CALM"},
		{"pings", func(x *wire) {
			for range 1000 {
				x.do(x.fr.WritePing(false, [8]byte{}))
			}
		}, http2.FrameGoAway, 0, "ENHANCE_YOUR_CALM too_many_pings"},
		{"calls begun and reset", func(x *wire) {
			for i := range 1000 {
				x.begin(uint32(2*i+1), attend)
				x.do(x.fr.WriteRSTStream(uint32(2*i+1), http2.ErrCodeCancel))
			}
		}, http2.FrameGoAway, 0, "ENHANCE_YOUR_CALM"},
		{"messages that are never complete", func(x *wire) {
			for i := range 8 {
				x.begin(uint32(2*i+1), release)
				x.do(x.fr.WriteData(uint32(2*i+1), false, append([]byte{0, 0, 0, 255, 255}, make([]byte, 16000)...)))
				for range 3 {
					x.do(x.fr.WriteData(uint32(2*i+1), false, make([]byte, 16000)))
				}
			}
		}, http2.FrameGoAway, 0, "ENHANCE_YOUR_CALM too much"},
		{"no HTTP/2", func(x *wire) {
			x.out.Reset()
			x.out.WriteString("GET / HTTP/1.1\r\n\r\n")
		}, http2.FrameGoAway, 0, "PROTOCOL_ERROR no HTTP/2 preface"},
		{"a large frame", func(x *wire) { x.do(x.fr.WriteRawFrame(99, 0, 0, make([]byte, 16385))) }, http2.FrameGoAway, 0, "FRAME_SIZE_ERROR"},
		{"a stream of ours", func(x *wire) { x.begin(2, release) }, http2.FrameGoAway, 0, "PROTOCOL_ERROR headers on an even"},
		{"stream 0", func(x *wire) { x.begin(0, release) }, http2.FrameGoAway, 0, "PROTOCOL_ERROR headers on an even"},
		{"data before headers", func(x *wire) { x.do(x.fr.WriteData(1, true, message)) }, http2.FrameGoAway, 0, "PROTOCOL_ERROR data of no"},
		{"data behind the end", func(x *wire) {
			x.begin(1, release)
			x.do(x.fr.WriteData(1, true, framed(x.t, &leasev1.ReleaseRequest{RequestId: []byte("s")})))
			x.do(x.fr.WriteData(1, true, message))
		}, http2.FrameGoAway, 0, "STREAM_CLOSED"},
		{"a frame between headers", func(x *wire) {
			x.do(x.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte{0x83}}))
			x.do(x.fr.WritePing(false, [8]byte{}))
		}, http2.FrameGoAway, 0, "PROTOCOL_ERROR frame within"},
		{"a continuation of nothing", func(x *wire) { x.do(x.fr.WriteContinuation(1, true, nil)) }, http2.FrameGoAway, 0, "PROTOCOL_ERROR"},
		{"bad header block", func(x *wire) {
			x.do(x.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte{0xff, 0xff, 0xff}, EndHeaders: true}))
		}, http2.FrameGoAway, 0, "COMPRESSION_ERROR"},
		{"padding without a frame", func(x *wire) { x.do(x.fr.WriteRawFrame(http2.FrameData, http2.FlagDataPadded, 1, []byte{9})) }, http2.FrameGoAway, 0, "PROTOCOL_ERROR more padding"},
		{"a window too large", func(x *wire) { x.do(x.fr.WriteWindowUpdate(0, 1<<31-1)) }, http2.FrameGoAway, 0, "FLOW_CONTROL_ERROR"},
		{"a window of nothing", func(x *wire) { x.do(x.fr.WriteRawFrame(http2.FrameWindowUpdate, 0, 0, make([]byte, 4))) }, http2.FrameGoAway, 0, "FLOW_CONTROL_ERROR"},
		{"a first window too large", func(x *wire) {
			x.do(x.fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 31}))
		}, http2.FrameGoAway, 0, "FLOW_CONTROL_ERROR"},
		{"half a setting", func(x *wire) { x.do(x.fr.WriteRawFrame(http2.FrameSettings, 0, 0, make([]byte, 7))) }, http2.FrameGoAway, 0, "FRAME_SIZE_ERROR"},
		{"half a ping", func(x *wire) { x.do(x.fr.WriteRawFrame(http2.FramePing, 0, 0, make([]byte, 7))) }, http2.FrameGoAway, 0, "FRAME_SIZE_ERROR"},
		{"half a reset", func(x *wire) { x.do(x.fr.WriteRawFrame(http2.FrameRSTStream, 0, 1, make([]byte, 3))) }, http2.FrameGoAway, 0, "FRAME_SIZE_ERROR"},
		{"a push", func(x *wire) { x.do(x.fr.WriteRawFrame(http2.FramePushPromise, 0, 1, make([]byte, 4))) }, http2.FrameGoAway, 0, "PROTOCOL_ERROR push"},
	} {
		t.Run(c.name, func(t *testing.T) {
			x := w.dial(t)
			c.send(x)
			go func(b []byte) { _, _ = x.c.Write(b) }(bytes.Clone(x.out.Bytes())) // an error: the other side has closed
			if got := x.until(c.kind, c.id); !strings.Contains(got, c.want) {
				t.Errorf("%s %q, want %q", c.kind, got, c.want)
			}
			if c.kind == http2.FrameGoAway {
				if _, err := io.Copy(io.Discard, x.c); err != nil && !strings.Contains(err.Error(), "reset") {
					t.Errorf("the connection goes on: %v", err)
				}
			}
		})
	}
}

// TestWindows: what is sent stays inside of the windows of stream and connection, whatever they are set to on the way.
func TestWindows(t *testing.T) {
	w := newWorld(t)
	x := w.dial(t)
	x.do(x.fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1000}))
	x.begin(1, attend)
	x.do(x.fr.WriteData(1, false, framed(t, hello("large"))))
	x.flush(1 << 20)
	got, limit := 0, 1000 // of the stream; the connection's first window is 65535
	read := func(upto int) {
		t.Helper()
		for got < upto {
			got += len(x.until(http2.FrameData, 1))
		}
		if got != upto {
			t.Fatalf("%d bytes came, %d may", got, upto)
		}
		x.do(x.fr.WritePing(false, [8]byte{1}))
		x.flush(1 << 20)
		for { // nothing more may come before the answer
			f, err := x.fr.ReadFrame()
			x.do(err)
			if f.Header().Type == http2.FrameData {
				t.Fatalf("%d bytes more than there is room for", f.Header().Length)
			}
			if f.Header().Type == http2.FramePing {
				return
			}
		}
	}
	read(limit)
	x.do(x.fr.WriteWindowUpdate(1, 500))
	limit += 500
	x.flush(1 << 20)
	read(limit)
	x.do(x.fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 3000})) // 2000 more for all streams
	limit += 2000
	x.flush(1 << 20)
	read(limit)
	x.do(x.fr.WriteWindowUpdate(1, 1<<20))
	x.flush(1 << 20)
	read(65535) // now the connection is the limit
	x.do(x.fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0}))
	x.do(x.fr.WriteWindowUpdate(0, 2<<20))
	x.flush(1 << 20)
	for got < 1<<20 { // what is left of the stream's window suffices
		got += len(x.until(http2.FrameData, 1))
	}
}

// TestGiveBack: a caller may send for ever, because it is told of what was taken.
func TestGiveBack(t *testing.T) {
	w := newWorld(t)
	x := w.dial(t)
	x.begin(1, attend)
	message := framed(t, hello(strings.Repeat("m", 15_000)))
	conn, stream := 65535, 65535
	for range 20 {
		for conn < len(message) || stream < len(message) {
			f, err := x.fr.ReadFrame()
			x.do(err)
			if u, ok := f.(*http2.WindowUpdateFrame); ok && u.StreamID == 0 {
				conn += int(u.Increment)
			} else if ok {
				stream += int(u.Increment)
			}
		}
		conn, stream = conn-len(message), stream-len(message)
		x.do(x.fr.WriteData(1, false, message))
		x.do(x.fr.WriteWindowUpdate(0, uint32(len(message)))) // for the echo
		x.do(x.fr.WriteWindowUpdate(1, uint32(len(message))))
		x.flush(1 << 20)
	}
}

func TestParseTimeout(t *testing.T) {
	for v, want := range map[string]time.Duration{
		"1H": time.Hour, "2M": 2 * time.Minute, "3S": 3 * time.Second, "4m": 4 * time.Millisecond, "5u": 5 * time.Microsecond,
		"6n": 6, "0S": 0, "99999999H": 1 << 62 / time.Hour * time.Hour,
	} {
		if got, err := parseTimeout(v); err != nil || got != want {
			t.Errorf("%s: %s, %v: want %s", v, got, err, want)
		}
	}
	for _, v := range []string{"", "1", "S", "-1S", "1x", "123456789S", "1 S"} {
		if got, err := parseTimeout(v); err == nil {
			t.Errorf("%q is %s", v, got)
		}
	}
}
