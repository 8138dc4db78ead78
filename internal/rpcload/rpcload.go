// Package rpcload makes gRPC calls with as little work as the protocol allows, for tests and measurements: what is spent on
// making load is missing where the load goes.
package rpcload

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"sync"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/protobuf/proto"
)

// Conn is a connection. One goroutine uses it, but any may ping.
type Conn struct {
	tls  *tls.Conn
	fr   *http2.Framer
	id   uint32 // of the next call
	name string

	mu  sync.Mutex // guards what follows
	out bytes.Buffer

	blocks map[string][]byte // headers by method
	data   []byte            // of the call that is waited for
}

// Dial connects. conf has the name of the server.
func Dial(ctx context.Context, d *net.Dialer, addr string, conf *tls.Config) (*Conn, error) {
	raw, err := (&tls.Dialer{NetDialer: d, Config: conf}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	c := &Conn{tls: raw.(*tls.Conn), id: 1, name: conf.ServerName, blocks: map[string][]byte{}}
	c.fr = http2.NewFramer(&c.out, c.tls)
	c.fr.SetReuseFrames()
	c.fr.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	c.out.WriteString(http2.ClientPreface)
	const room = 1 << 30 // for all that is answered
	return c, c.send(c.fr.WriteSettings(), c.fr.WriteWindowUpdate(0, room))
}

// Close ends the connection.
func (c *Conn) Close() error { return c.tls.Close() }

// Resumed reports whether the connection took up an earlier TLS session.
func (c *Conn) Resumed() bool { return c.tls.ConnectionState().DidResume }

// send sends the frames that were written, if that went well. Who calls it holds mu, or nobody else knows c.
func (c *Conn) send(errs ...error) error {
	err := errors.Join(errs...)
	if err == nil {
		_, err = c.tls.Write(c.out.Bytes())
	}
	c.out.Reset()
	return err
}

// Ping asks the other side for a sign of life, and does not wait for it.
func (c *Conn) Ping() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.send(c.fr.WritePing(false, [8]byte{}))
}

// callTime is how long a call may take, which the other side is told.
const callTime = "60S"

// block returns the headers of a call or, with stream, of a stream. Nothing is put into a table, so that they are the same each
// time.
func (c *Conn) block(method string, stream bool) []byte {
	if b := c.blocks[method]; b != nil {
		return b
	}
	var b bytes.Buffer
	e := hpack.NewEncoder(&b)
	e.SetMaxDynamicTableSize(0)
	fields := [][2]string{
		{":method", "POST"},
		{":scheme", "https"},
		{":path", method},
		{":authority", c.name},
		{"content-type", "application/grpc"},
		{"te", "trailers"},
	}
	if !stream {
		fields = append(fields, [2]string{"grpc-timeout", callTime})
	}
	for _, f := range fields {
		_ = e.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]}) // a buffer takes it
	}
	c.blocks[method] = b.Bytes()
	return b.Bytes()
}

// begin begins a call with its first message; last = there are no more.
func (c *Conn) begin(method string, m proto.Message, last bool) error {
	b, err := proto.MarshalOptions{}.MarshalAppend(make([]byte, 5), m)
	if err != nil {
		return err
	}
	binary.BigEndian.PutUint32(b[1:], uint32(len(b)-5))
	c.mu.Lock()
	defer c.mu.Unlock()
	id := c.id
	c.id += 2
	c.data = c.data[:0]
	return c.send(
		c.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: c.block(method, !last), EndHeaders: true}),
		c.fr.WriteData(id, last, b),
	)
}

// Call makes a call and waits for its answer.
func (c *Conn) Call(method string, req, reply proto.Message) error {
	if err := c.begin(method, req, true); err != nil {
		return err
	}
	if err := c.Recv(reply); err != nil {
		return err
	}
	for {
		if done, err := c.next(); done || err != nil {
			return err
		}
	}
}

// Open begins a stream with its first message. Recv returns what comes.
func (c *Conn) Open(method string, first proto.Message) error { return c.begin(method, first, false) }

// Recv waits for the next message of the call or stream.
func (c *Conn) Recv(m proto.Message) error {
	for {
		if len(c.data) >= 5 {
			if n := 5 + int(binary.BigEndian.Uint32(c.data[1:])); len(c.data) >= n {
				err := proto.Unmarshal(c.data[5:n], m)
				c.data = append(c.data[:0], c.data[n:]...)
				return err
			}
		}
		if done, err := c.next(); err != nil {
			return err
		} else if done {
			return errors.New("the call ended without a message")
		}
	}
}

// next takes a frame. done = the call has ended well.
func (c *Conn) next() (done bool, err error) {
	f, err := c.fr.ReadFrame()
	if err != nil {
		return false, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch f := f.(type) {
	case *http2.SettingsFrame:
		if !f.IsAck() {
			return false, c.send(c.fr.WriteSettingsAck())
		}
	case *http2.PingFrame:
		if !f.IsAck() {
			return false, c.send(c.fr.WritePing(true, f.Data))
		}
	case *http2.DataFrame:
		c.data = append(c.data, f.Data()...)
	case *http2.RSTStreamFrame:
		return false, fmt.Errorf("stream reset: %s", f.ErrCode)
	case *http2.GoAwayFrame:
		return false, fmt.Errorf("connection ends: %s %s", f.ErrCode, f.DebugData())
	case *http2.MetaHeadersFrame:
		if !f.StreamEnded() {
			return false, nil
		}
		for _, h := range f.Fields {
			if h.Name == "grpc-status" && h.Value == "0" {
				return true, nil
			}
		}
		return false, fmt.Errorf("refused: %v", f.Fields)
	}
	return false, nil
}
