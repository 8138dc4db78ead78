package thinrpc

import (
	"context"
	"encoding/binary"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// Stream is one call. Send is called by one goroutine at a time, End by any.
type Stream struct {
	c    *conn
	id   uint32
	call bool // with one answer

	// Of the goroutine that reads.
	buf    []byte // of a message that is not complete
	credit uint32 // what came and was not given back
	done   bool   // the other side sends nothing more

	taking sync.Mutex                                // guards what follows, and orders Recv and Closed
	unary  func(decode func(any) error) (any, error) // of a call
	recv   Receiver                                  // of another stream
	cancel context.CancelFunc

	headed bool // the headers of the answer were sent; guarded by conn.writing

	// Guarded by conn.mu.
	window int64 // what may be sent
	over   bool
}

// request is what the headers of a call say.
type request struct {
	method, path, content, encoding, timeout string
	size                                     int
}

// field takes a header field from the decoder.
func (c *conn) field(f hpack.HeaderField) {
	c.req.size += int(f.Size())
	switch f.Name {
	case ":method":
		c.req.method = f.Value
	case ":path":
		c.req.path = f.Value
	case "content-type":
		c.req.content = f.Value
	case "grpc-encoding":
		c.req.encoding = f.Value
	case "grpc-timeout":
		c.req.timeout = f.Value
	}
}

// unpad returns a payload without its padding and, of headers, the priority.
func unpad(f frame, padded http2.Flags) ([]byte, error) {
	p := f.payload
	if f.flags.Has(padded) {
		if len(p) < 1 || len(p) < 1+int(p[0]) {
			return nil, violation{http2.ErrCodeProtocol, "more padding than frame"}
		}
		p = p[1 : len(p)-int(p[0])]
	}
	if f.kind == http2.FrameHeaders && f.flags.Has(http2.FlagHeadersPriority) {
		if len(p) < 5 {
			return nil, errSize
		}
		p = p[5:]
	}
	return p, nil
}

func (c *conn) headers(f frame) error {
	if f.stream%2 == 0 {
		return violation{http2.ErrCodeProtocol, "headers on an even stream"}
	}
	p, err := unpad(f, http2.FlagHeadersPadded)
	if err != nil {
		return err
	}
	c.block, c.blockOf, c.blockEnd = append(c.block[:0], p...), f.stream, f.flags.Has(http2.FlagHeadersEndStream)
	return c.blockComplete(f.flags.Has(http2.FlagHeadersEndHeaders))
}

func (c *conn) continuation(f frame) error {
	if c.blockOf == 0 {
		return violation{http2.ErrCodeProtocol, "continuation of nothing"}
	}
	c.block = append(c.block, f.payload...)
	return c.blockComplete(f.flags.Has(http2.FlagContinuationEndHeaders))
}

// blockComplete decodes a header block, which has to be done whatever becomes of the stream.
func (c *conn) blockComplete(complete bool) error {
	if len(c.block) > maxHeaders {
		return violation{http2.ErrCodeEnhanceYourCalm, "headers of more than 8192 bytes"}
	}
	if !complete {
		return c.cost()
	}
	req, block, id := &request{}, c.block, c.blockOf
	c.req, c.block, c.blockOf = req, nil, 0
	_, err := c.dec.Write(block)
	if err == nil {
		err = c.dec.Close()
	}
	c.req = nil
	switch {
	case err != nil:
		return violation{http2.ErrCodeCompression, "headers: " + err.Error()}
	case req.size > maxHeaders:
		return violation{http2.ErrCodeEnhanceYourCalm, "headers of more than 8192 bytes"}
	case id > c.last:
		c.last = id
		return c.open(id, req)
	}
	if st := c.stream(id); st != nil && c.blockEnd { // trailers, which say nothing
		return st.ended()
	}
	return c.cost()
}

// open begins a call.
func (c *conn) open(id uint32, req *request) error {
	st := &Stream{c: c, id: id, call: c.s.conf.Unary[req.path] != nil, done: c.blockEnd}
	c.mu.Lock()
	full := len(c.streams) >= c.s.conf.MaxStreams || c.leaving
	if !full {
		st.window = c.initial
		c.streams = append(c.streams, st)
	}
	c.mu.Unlock()
	if full {
		if err := c.write(appendReset(nil, id, http2.ErrCodeRefusedStream)); err != nil {
			return err
		}
		return c.cost()
	}
	if req.method != http.MethodPost || req.content != "application/grpc" && !strings.HasPrefix(req.content, "application/grpc+") &&
		!strings.HasPrefix(req.content, "application/grpc;") {
		c.remove(st)
		p := appendField(nil, ":status", strconv.Itoa(http.StatusUnsupportedMediaType))
		return c.write(appendFrame(nil, http2.FrameHeaders, http2.FlagHeadersEndHeaders|http2.FlagHeadersEndStream, id, p...))
	}
	if err := st.begin(req); err != nil {
		st.finish(err)
	} else if c.blockEnd {
		return st.ended()
	}
	return nil
}

// begin finds who answers.
func (st *Stream) begin(req *request) error {
	st.taking.Lock() // the connection may end meanwhile
	defer st.taking.Unlock()
	ctx := peer.NewContext(context.Background(), st.c.peer)
	var timeout time.Duration
	if req.timeout != "" {
		var err error
		if timeout, err = parseTimeout(req.timeout); err != nil {
			return err
		}
	}
	if e := req.encoding; e != "" && e != "identity" {
		return status.Errorf(codes.Unimplemented, "grpc-encoding %q: want identity", e)
	}
	if f := st.c.s.conf.Unary[req.path]; f != nil {
		if req.timeout != "" {
			ctx, st.cancel = context.WithTimeout(ctx, timeout)
		} else {
			ctx, st.cancel = context.WithCancel(ctx)
		}
		st.unary = func(decode func(any) error) (any, error) { return f(ctx, decode) }
		return nil
	}
	if f := st.c.s.conf.Streams[req.path]; f != nil {
		if req.timeout != "" {
			t := time.AfterFunc(timeout, func() { st.finish(context.DeadlineExceeded) })
			st.cancel = func() { t.Stop() }
		}
		recv, err := f(ctx, st)
		if err == nil {
			st.recv = recv
		}
		return err
	}
	if f := st.c.s.conf.Unknown; f != nil {
		if err := f(ctx, req.path); err != nil {
			return err
		}
	}
	return status.Errorf(codes.Unimplemented, "no method %q", req.path)
}

// giveBack is how much has to have come before the other side is told that it may send as much again.
const giveBack = firstWindow / 2

func (c *conn) data(f frame) error {
	p, err := unpad(f, http2.FlagDataPadded)
	if err != nil {
		return err
	}
	if f.stream == 0 || f.stream > c.last {
		return violation{http2.ErrCodeProtocol, "data of no stream"}
	}
	st := c.stream(f.stream)
	var out []byte
	if c.credit += uint32(len(f.payload)); c.credit >= giveBack {
		out = appendWindow(out, 0, c.credit)
		c.credit = 0
	}
	if st != nil {
		if st.credit += uint32(len(f.payload)); st.credit >= giveBack {
			out = appendWindow(out, st.id, st.credit)
			st.credit = 0
		}
	}
	if len(out) > 0 {
		if err := c.write(out); err != nil {
			return err
		}
	}
	end := f.flags.Has(http2.FlagDataEndStream)
	if len(p) == 0 && !end || st == nil {
		return c.cost()
	}
	if err := st.take(p); err != nil {
		return err
	}
	if end {
		return st.ended()
	}
	return nil
}

// maxHeld is how many bytes of messages that are not complete one connection may have here.
const maxHeld = 256 << 10

// take takes a part of a message, or of several.
func (st *Stream) take(p []byte) error {
	if st.done {
		return violation{http2.ErrCodeStreamClosed, "data behind the end of a stream"}
	}
	c := st.c
	b := p
	if len(st.buf) > 0 {
		b = append(st.buf, p...)
		st.buf = nil
	}
	for len(b) >= 5 {
		n := int64(binary.BigEndian.Uint32(b[1:]))
		switch {
		case b[0] != 0:
			st.finish(status.Error(codes.Unimplemented, "compressed message: want none"))
			return nil
		case n > int64(c.s.conf.MaxMessage):
			st.finish(status.Errorf(codes.ResourceExhausted, "message of %d bytes: want at most %d", n, c.s.conf.MaxMessage))
			return nil
		case int64(len(b)) < 5+n:
			return st.keep(b)
		case st.call: // it waits for the end of the stream
			if int64(len(b)) > 5+n {
				st.finish(status.Error(codes.Internal, "more than one message in a call"))
				return nil
			}
			return st.keep(b)
		}
		if err := st.message(b[5 : 5+n]); err != nil {
			st.finish(err)
			return nil
		}
		b = b[5+n:]
	}
	return st.keep(b)
}

// keep keeps what is not complete.
func (st *Stream) keep(b []byte) error {
	if len(b) == 0 || st.isOver() {
		return nil
	}
	st.buf = slices.Clone(b)
	held := 0
	st.c.mu.Lock()
	for _, o := range st.c.streams {
		held += len(o.buf)
	}
	st.c.mu.Unlock()
	if held > maxHeld {
		return violation{http2.ErrCodeEnhanceYourCalm, "too much of messages that are not complete"}
	}
	return nil
}

func (st *Stream) isOver() bool {
	st.c.mu.Lock()
	defer st.c.mu.Unlock()
	return st.over
}

// message gives a message to the receiver, unless the stream has ended.
func (st *Stream) message(b []byte) error {
	st.taking.Lock()
	defer st.taking.Unlock()
	if st.isOver() {
		return nil
	}
	return st.recv.Recv(decoder(b))
}

func decoder(b []byte) func(any) error {
	return func(v any) error {
		if err := proto.Unmarshal(b, v.(proto.Message)); err != nil {
			return status.Errorf(codes.Internal, "message: %v", err)
		}
		return nil
	}
}

// ended: the other side sends nothing more. A call is answered now, and a stream has no other use.
func (st *Stream) ended() error {
	if st.done = true; !st.call {
		st.finish(nil)
		return nil
	}
	if st.isOver() {
		return nil
	}
	b := st.buf
	st.buf = nil
	if len(b) < 5 || len(b) < 5+int(binary.BigEndian.Uint32(b[1:])) {
		st.finish(status.Error(codes.Internal, "call without a message"))
		return nil
	}
	c := st.c
	c.s.wg.Add(1)
	answer := func() {
		defer c.s.wg.Done()
		reply, err := st.unary(decoder(b[5:]))
		if err != nil {
			st.finish(err)
			return
		}
		_ = st.send(reply, true) // an error ends the call or the connection
	}
	if c.call == nil {
		c.call = answer
	} else {
		c.s.do(answer)
	}
	return nil
}

// Send sends a message, and waits for as long as the other side's windows are full.
func (st *Stream) Send(m proto.Message) error { return st.send(m, false) }

// send sends a message, and with last the end of the stream behind it.
func (st *Stream) send(v any, last bool) error {
	m, err := proto.MarshalOptions{}.MarshalAppend(make([]byte, 5, 64), v.(proto.Message))
	if err != nil {
		err = status.Errorf(codes.Internal, "answer: %v", err)
		st.finish(err)
		return err
	}
	binary.BigEndian.PutUint32(m[1:], uint32(len(m)-5))
	for {
		n, err := st.reserve(len(m))
		if err != nil {
			return err
		}
		if err := st.write(m[:n], last && n == len(m)); err != nil || n == len(m) {
			return err
		}
		m = m[n:]
	}
}

// write writes a part of a message for which there is room, and with last the end of the stream.
func (st *Stream) write(p []byte, last bool) error {
	c := st.c
	c.writing.Lock()
	defer c.writing.Unlock()
	if last && !c.remove(st) || !last && st.isOver() {
		c.mu.Lock()
		c.window += int64(len(p))
		c.mu.Unlock()
		return errEnded
	}
	out := make([]byte, 0, len(p)+128)
	if !st.headed {
		st.headed = true
		out = appendResponse(out, st.id)
	}
	out = append(appendFrameHeader(out, len(p), http2.FrameData, 0, st.id), p...)
	if last {
		st.closed()
		out = appendTrailers(out, st.id, false, nil)
	}
	return c.writeLocked(out)
}

// reserve waits until some of n bytes may be sent, and returns how many.
func (st *Stream) reserve(n int) (int, error) {
	c := st.c
	for {
		c.mu.Lock()
		if st.over {
			c.mu.Unlock()
			return 0, errEnded
		}
		if may := min(int64(n), maxFrame, c.window, st.window); may > 0 {
			c.window -= may
			st.window -= may
			c.mu.Unlock()
			return int(may), nil
		}
		if c.grown == nil {
			c.grown = make(chan struct{})
		}
		grown := c.grown
		c.mu.Unlock()
		<-grown
	}
}

// End ends a stream with an error that the other side is told; nil = no error. It does not wait.
func (st *Stream) End(err error) {
	st.c.s.mu.Lock()
	defer st.c.s.mu.Unlock()
	if !st.c.s.ends { // or all streams end anyway
		st.c.s.wg.Go(func() { st.finish(err) })
	}
}

// finish ends the call with a status, unless it has ended.
func (st *Stream) finish(err error) {
	if !st.c.remove(st) {
		return
	}
	st.closed()
	c := st.c
	c.writing.Lock()
	defer c.writing.Unlock()
	out := appendTrailers(nil, st.id, !st.headed, err)
	if !st.call || !st.done { // the other side may have more to say, which nobody listens to
		out = appendReset(out, st.id, http2.ErrCodeNo)
	}
	_ = c.writeLocked(out) // else the connection ends, which is seen
}

// drop ends the call without a word.
func (st *Stream) drop() {
	if st.c.remove(st) {
		st.closed()
	}
}

// remove takes a stream off the list, and reports whether it was there.
func (c *conn) remove(st *Stream) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if st.over {
		return false
	}
	st.over = true
	c.streams = slices.DeleteFunc(c.streams, func(o *Stream) bool { return o == st })
	c.wake()
	return true
}

// closed tells whoever works on the call.
func (st *Stream) closed() {
	st.taking.Lock()
	defer st.taking.Unlock()
	if st.cancel != nil {
		st.cancel()
	}
	if st.recv != nil {
		st.recv.Closed()
	}
}
