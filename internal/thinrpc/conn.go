package thinrpc

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/peer"
)

// conn is one connection. What is without a guard belongs to the goroutine that reads, which is another one each time: see
// aside.
type conn struct {
	s    *Server
	tls  net.Conn
	peer *peer.Peer

	turn     sync.WaitGroup // of what is done aside
	call     func()         // the first that has come
	dec      *hpack.Decoder
	req      *request // whose header block is read
	left     []byte   // the beginning of a frame
	block    []byte   // the beginning of a header block, of stream blockOf
	blockOf  uint32
	blockEnd bool   // the stream ends with it
	last     uint32 // the highest stream
	prefaced bool   // the client's preface was there
	credit   uint32 // what came and was not given back

	heard    atomic.Int64 // Server.now
	pinged   atomic.Int64 // Server.now, when the other side was silent; 0 = not
	messages atomic.Int32 // that cost more than they bring, since the last look

	writing sync.Mutex

	mu      sync.Mutex // guards what follows
	streams []*Stream
	window  int64         // what may be sent
	initial int64         // the window of a new stream
	grown   chan struct{} // closed when a window grows or a stream ends; nil = nobody waits
	leaving bool          // takes no new streams
	over    bool
}

func newConn(s *Server, tls net.Conn, p *peer.Peer) *conn {
	c := &conn{s: s, tls: tls, peer: p, window: firstWindow, initial: firstWindow}
	c.dec = hpack.NewDecoder(4096, c.field)
	c.dec.SetMaxStringLength(maxHeaders)
	c.heard.Store(int64(s.now()))
	return c
}

// aside does something in another goroutine and waits for it. The call that has come of it, if any, is answered by that
// goroutine too, for which nobody waits here.
func (c *conn) aside(f func() error) (err error) {
	c.turn.Add(1)
	c.s.do(func() {
		err = f()
		call := c.call
		c.call = nil
		c.turn.Done()
		if call != nil {
			call()
		}
	})
	c.turn.Wait()
	return err
}

// begin says what this side wants (RFC 9113 section 3.4).
func (c *conn) begin() error {
	var p []byte
	p = appendSetting(p, http2.SettingHeaderTableSize, 0)
	p = appendSetting(p, http2.SettingMaxConcurrentStreams, uint32(c.s.conf.MaxStreams))
	p = appendSetting(p, http2.SettingMaxHeaderListSize, maxHeaders)
	return c.write(appendFrame(nil, http2.FrameSettings, 0, 0, p...))
}

// drain takes what has come.
func (c *conn) drain() error {
	buf := c.s.bufs.Get().(*[readSize]byte)
	defer c.s.bufs.Put(buf)
	n := copy(buf[:], c.left)
	c.left = nil
	for {
		m, err := c.tls.Read(buf[n:])
		if m > 0 {
			c.heard.Store(int64(c.s.now()))
			n += m
			used, ierr := c.input(buf[:n])
			if ierr != nil {
				c.reject(ierr)
				return ierr
			}
			n = copy(buf[:], buf[used:n])
		}
		if errors.Is(err, errAgain) {
			if n > 0 {
				c.left = bytes.Clone(buf[:n])
			}
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// violation is an error of the other side that ends the connection.
type violation struct {
	code http2.ErrCode
	text string
}

func (v violation) Error() string { return v.text }

// reject says why the connection ends.
func (c *conn) reject(err error) {
	var v violation
	if errors.As(err, &v) {
		_ = c.write(appendGoAway(nil, c.last, v.code, v.text)) // it ends anyway
	}
}

// maxMessages is how many messages that bring nothing (pings, resets, settings) are taken between two looks: callers ping
// every ten seconds.
const maxMessages = 200

// cost counts a message that brings nothing.
func (c *conn) cost() error {
	if c.messages.Add(1) > maxMessages {
		return violation{http2.ErrCodeEnhanceYourCalm, "too_many_pings"}
	}
	return nil
}

// input takes whole frames from b and returns how many bytes they have.
func (c *conn) input(b []byte) (used int, err error) {
	if !c.prefaced {
		switch n := min(len(b), len(http2.ClientPreface)); {
		case string(b[:n]) != http2.ClientPreface[:n]:
			return 0, violation{http2.ErrCodeProtocol, "no HTTP/2 preface"}
		case n < len(http2.ClientPreface):
			return 0, nil
		}
		c.prefaced, used = true, len(http2.ClientPreface)
	}
	for len(b)-used >= frameHeader {
		h := b[used:]
		length := int(h[0])<<16 | int(h[1])<<8 | int(h[2])
		if length > maxFrame {
			return used, violation{http2.ErrCodeFrameSize, "frame of more than 16384 bytes"}
		}
		if len(h) < frameHeader+length {
			break
		}
		f := frame{http2.FrameType(h[3]), http2.Flags(h[4]), binary.BigEndian.Uint32(h[5:]) &^ (1 << 31), h[frameHeader : frameHeader+length]}
		if err := c.frame(f); err != nil {
			return used, err
		}
		used += frameHeader + length
	}
	return used, nil
}

type frame struct {
	kind    http2.FrameType
	flags   http2.Flags
	stream  uint32
	payload []byte
}

var errSize = violation{http2.ErrCodeFrameSize, "frame of a wrong size"}

func (c *conn) frame(f frame) error {
	if c.blockOf != 0 && (f.kind != http2.FrameContinuation || f.stream != c.blockOf) {
		return violation{http2.ErrCodeProtocol, "frame within a header block"}
	}
	switch f.kind {
	case http2.FrameData:
		return c.data(f)
	case http2.FrameHeaders:
		return c.headers(f)
	case http2.FrameContinuation:
		return c.continuation(f)
	case http2.FrameRSTStream:
		if len(f.payload) != 4 {
			return errSize
		}
		if st := c.stream(f.stream); st != nil {
			st.drop()
		}
		return c.cost()
	case http2.FrameSettings:
		return c.settings(f)
	case http2.FramePing:
		return c.ping(f)
	case http2.FrameWindowUpdate:
		return c.windowUpdate(f)
	case http2.FramePushPromise:
		return violation{http2.ErrCodeProtocol, "push from a client"}
	case http2.FrameGoAway:
		return nil
	}
	return c.cost() // priorities, and frames of an unknown kind
}

func (c *conn) settings(f frame) error {
	if f.flags.Has(http2.FlagSettingsAck) {
		return c.cost()
	}
	if len(f.payload)%6 != 0 {
		return errSize
	}
	for p := f.payload; len(p) > 0; p = p[6:] {
		id, v := http2.SettingID(binary.BigEndian.Uint16(p)), binary.BigEndian.Uint32(p[2:])
		if id != http2.SettingInitialWindowSize {
			continue // our frames are of the smallest limit, and our headers in no table
		}
		if v > 1<<31-1 {
			return violation{http2.ErrCodeFlowControl, "window of more than 2^31-1"}
		}
		c.mu.Lock()
		for _, st := range c.streams {
			st.window += int64(v) - c.initial
		}
		c.initial = int64(v)
		c.wake()
		c.mu.Unlock()
	}
	if err := c.write(appendFrame(nil, http2.FrameSettings, http2.FlagSettingsAck, 0)); err != nil {
		return err
	}
	return c.cost()
}

func (c *conn) ping(f frame) error {
	if len(f.payload) != 8 {
		return errSize
	}
	if err := c.cost(); err != nil || f.flags.Has(http2.FlagPingAck) {
		return err
	}
	var b [frameHeader + 8]byte
	return c.write(appendFrame(b[:0], http2.FramePing, http2.FlagPingAck, 0, f.payload...))
}

func (c *conn) windowUpdate(f frame) error {
	if len(f.payload) != 4 {
		return errSize
	}
	n := int64(binary.BigEndian.Uint32(f.payload) &^ (1 << 31))
	c.mu.Lock()
	w := &c.window
	if f.stream != 0 {
		st := c.find(f.stream)
		if st == nil {
			c.mu.Unlock()
			return c.cost()
		}
		w = &st.window
	}
	*w += n
	large := *w > 1<<31-1
	c.wake()
	c.mu.Unlock()
	if n == 0 || large {
		return violation{http2.ErrCodeFlowControl, "window update of a wrong size"}
	}
	return nil
}

// wake makes those look again who wait for a window. The caller holds mu.
func (c *conn) wake() {
	if c.grown != nil {
		close(c.grown)
		c.grown = nil
	}
}

// find returns an open stream. The caller holds mu.
func (c *conn) find(id uint32) *Stream {
	if i := slices.IndexFunc(c.streams, func(st *Stream) bool { return st.id == id }); i >= 0 {
		return c.streams[i]
	}
	return nil
}

func (c *conn) stream(id uint32) *Stream {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.find(id)
}

// writeTime is how long a write may take until the other side has room for it.
const writeTime = 10 * time.Second

// write writes frames. An error ends the connection.
func (c *conn) write(b []byte) error {
	c.writing.Lock()
	defer c.writing.Unlock()
	return c.writeLocked(b)
}

// writeLocked is write for those who hold writing.
func (c *conn) writeLocked(b []byte) error {
	if err := c.tls.SetWriteDeadline(time.Now().Add(writeTime)); err != nil {
		return err
	}
	_, err := c.tls.Write(b)
	if err != nil {
		c.tls.Close() // which ends the reading goroutine, and that the rest
	}
	return err
}

// look pings a connection that is silent, and closes it when that brings nothing.
func (c *conn) look(now time.Duration) {
	c.messages.Store(0)
	heard, pinged := time.Duration(c.heard.Load()), time.Duration(c.pinged.Load())
	switch {
	case now-heard < c.s.conf.PingAfter:
		c.pinged.Store(0)
	case pinged == 0:
		c.pinged.Store(int64(now))
		go func() { _ = c.write(appendFrame(nil, http2.FramePing, 0, 0, make([]byte, 8)...)) }() // it may take its time
	case now-pinged >= c.s.conf.PingWait:
		c.tls.Close()
	}
}

// leave lets the other side begin nothing more here.
func (c *conn) leave() {
	c.mu.Lock()
	c.leaving = true
	c.mu.Unlock()
	_ = c.write(appendGoAway(nil, 1<<31-1, http2.ErrCodeNo, "")) // it ends anyway
}

// busy reports whether calls are under way.
func (c *conn) busy() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.ContainsFunc(c.streams, func(st *Stream) bool { return st.call })
}

// end ends everything.
func (c *conn) end() {
	c.mu.Lock()
	c.over, c.leaving = true, true
	all := slices.Clone(c.streams)
	c.mu.Unlock()
	c.tls.Close()
	for _, st := range all {
		st.drop()
	}
}
