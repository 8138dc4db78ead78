package leaseclient

import (
	"context"
	"fmt"
	"slices"
	"sync"

	"google.golang.org/grpc"

	leasev1 "github.com/dstm-project/dstm/api/lease/v1"
	"github.com/dstm-project/dstm/internal/wire"
	"github.com/dstm-project/dstm/lease"
)

// Sync is one life of a gateway's stream. One goroutine receives; any may send.
type Sync struct {
	c      *Conn
	stream grpc.BidiStreamingClient[leasev1.SyncUp, leasev1.SyncDown]
	cancel context.CancelFunc
	mu     sync.Mutex
}

// Sync opens the stream and says Hello. hello is called right before sending, so that the send time in it is honest.
func (c *Conn) Sync(ctx context.Context, hello func() lease.Hello) (*Sync, error) {
	ctx, cancel := context.WithCancel(ctx)
	st, err := leasev1.NewTepsClient(c.get()).Sync(ctx)
	if err != nil {
		cancel()
		return nil, fmt.Errorf("sync: %w", wire.FromStatus(err))
	}
	s := &Sync{c: c, stream: st, cancel: cancel}
	m := wire.FromHello(hello())
	m.GetHello().Caps, m.GetHello().Lists = append(slices.Clip(m.GetHello().GetCaps()), capLists), c.lists()
	if err := s.send(m); err != nil {
		_, rerr := s.Recv() // Send says only EOF; Recv has the reason
		cancel()
		return nil, rerr
	}
	return s, nil
}

// Recv returns the next lease.SessionReply, lease.SnapshotChunk, lease.Batch or lease.Upload. An error ends the stream.
func (s *Sync) Recv() (any, error) {
	for {
		m, err := s.stream.Recv()
		if err != nil {
			return nil, fmt.Errorf("sync: %w", wire.FromStatus(err))
		}
		if l := m.GetList(); l != nil {
			s.c.pushed(l)
			continue
		}
		v, err := wire.SyncDown(m)
		if err != nil {
			return nil, fmt.Errorf("sync: %w", err)
		}
		return v, nil
	}
}

// capLists says to the service that revocation lists may come on the stream.
const capLists = "revocation_lists"

// Heartbeat sends a heartbeat.
func (s *Sync) Heartbeat(h lease.Heartbeat) error { return s.send(wire.FromHeartbeat(h)) }

// Ack sends an acknowledgement.
func (s *Sync) Ack(a lease.Ack) error { return s.send(wire.FromAck(a)) }

// Table sends a part of the table that an Upload asked for.
func (s *Sync) Table(c lease.TableChunk) error { return s.send(wire.FromTableChunk(c)) }

func (s *Sync) send(m *leasev1.SyncUp) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.stream.Send(m); err != nil {
		return fmt.Errorf("sync: %w", err)
	}
	return nil
}

// Close ends the stream; Recv returns an error.
func (s *Sync) Close() { s.cancel() }
