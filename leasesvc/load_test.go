package leasesvc_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/protobuf/proto"
)

// loader makes calls one after another on one connection, with as little work as gRPC allows: what a bench spends on making
// load is missing where the load goes. perfdhcp is as frugal.
type loader struct {
	c       *tls.Conn
	out     bytes.Buffer
	fr      *http2.Framer
	id      uint32
	headers map[string][]byte // blocks by method
	reply   []byte
}

// load connects as a host.
func load(ctx context.Context, addr string, conf *tls.Config) (*loader, error) {
	c, err := (&tls.Dialer{Config: conf}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	l := &loader{c: c.(*tls.Conn), id: 1, headers: map[string][]byte{}}
	l.fr = http2.NewFramer(&l.out, c)
	l.fr.SetReuseFrames()
	l.fr.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	l.out.WriteString(http2.ClientPreface)
	const room = 1 << 30 // for all answers of a bench
	if err := errors.Join(l.fr.WriteSettings(), l.fr.WriteWindowUpdate(0, room)); err != nil {
		return nil, err
	}
	return l, nil
}

// block returns the headers of a call. Nothing is put into a table, so that they are the same each time.
func (l *loader) block(method string) []byte {
	if b := l.headers[method]; b != nil {
		return b
	}
	var b bytes.Buffer
	e := hpack.NewEncoder(&b)
	e.SetMaxDynamicTableSize(0)
	for _, f := range [...][2]string{
		{":method", "POST"},
		{":scheme", "https"},
		{":path", method},
		{":authority", "lease1.example.net"},
		{"content-type", "application/grpc"},
		{"te", "trailers"},
		{"grpc-timeout", fmt.Sprintf("%dS", patience/time.Second)},
	} {
		_ = e.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]}) // a buffer takes it
	}
	l.headers[method] = b.Bytes()
	return b.Bytes()
}

// call makes a call and waits for its answer.
func (l *loader) call(method string, req, reply proto.Message) error {
	m, err := proto.MarshalOptions{}.MarshalAppend(make([]byte, 5), req)
	if err != nil {
		return err
	}
	binary.BigEndian.PutUint32(m[1:], uint32(len(m)-5))
	id := l.id
	l.id += 2
	err = errors.Join(
		l.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: l.block(method), EndHeaders: true}),
		l.fr.WriteData(id, true, m),
	)
	if err != nil {
		return err
	}
	if err := l.flush(); err != nil {
		return err
	}
	l.reply = l.reply[:0]
	for {
		f, err := l.fr.ReadFrame()
		if err != nil {
			return err
		}
		switch f := f.(type) {
		case *http2.SettingsFrame:
			if !f.IsAck() {
				err = l.fr.WriteSettingsAck()
			}
		case *http2.PingFrame:
			if !f.IsAck() {
				err = errors.Join(l.fr.WritePing(true, f.Data), l.flush())
			}
		case *http2.DataFrame:
			l.reply = append(l.reply, f.Data()...)
		case *http2.GoAwayFrame:
			err = fmt.Errorf("connection ends: %s %s", f.ErrCode, f.DebugData())
		case *http2.MetaHeadersFrame:
			if f.StreamEnded() {
				return l.answer(f.Fields, reply)
			}
		}
		if err != nil {
			return err
		}
	}
}

// answer reads what a call came to.
func (l *loader) answer(fields []hpack.HeaderField, reply proto.Message) error {
	for _, f := range fields {
		if f.Name == "grpc-status" && f.Value == "0" {
			if len(l.reply) < 5 {
				return errors.New("no message in an answer")
			}
			return proto.Unmarshal(l.reply[5:], reply)
		}
	}
	return fmt.Errorf("refused: %v", fields)
}

func (l *loader) flush() error {
	_, err := l.c.Write(l.out.Bytes())
	l.out.Reset()
	return err
}
