package cmd

import (
	"context"
	"net/netip"
	"time"

	"github.com/dstm-project/dstm/internal/tlsid"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/lease/replica"
	"github.com/dstm-project/dstm/leasesvc/leaseclient"
)

// off takes a gateway off the power for good: it forwards nothing any more, and nobody is told.
func (s *stand) off(name string) {
	s.gone[name]()
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.tables, name)
}

// gateway follows the service from now on, whenever there is one.
func (s *stand) gateway(name string) {
	at := s.addrs
	if a, ok := s.gatewayAt[name]; ok {
		at = []netip.AddrPort{netip.AddrPortFrom(a, at[0].Port())}
	}
	c := s.connTo(tlsid.RoleTEP, name, at...)
	ctx, cancel := context.WithCancel(s.ctx)
	s.gone[name] = cancel
	s.tables[name] = map[lease.Resource]lease.Binding{}
	r := replica.New(replica.Config{TEP: name, Instance: "1"})
	begin := time.Now()
	now := func() uint64 { return uint64(time.Since(begin)) + 1 }
	s.wg.Go(func() {
		defer cancel()
		for ctx.Err() == nil {
			y, err := c.Sync(ctx, func() lease.Hello {
				s.mu.Lock()
				defer s.mu.Unlock()
				return r.Hello(now())
			})
			if err != nil {
				time.Sleep(10 * time.Millisecond)
				continue
			}
			s.follow(name, r, y, now)
			y.Close()
		}
	})
}

func (s *stand) follow(name string, r *replica.Replica, y *leaseclient.Sync, now func() uint64) {
	end := make(chan struct{})
	defer close(end)
	for first := true; ; first = false {
		m, err := y.Recv()
		if err != nil {
			return
		}
		ack, err := s.take(name, r, m, now())
		if err != nil {
			s.fail("gateway %s: %v", name, err)
			return
		}
		if ack != nil && y.Ack(*ack) != nil {
			return
		}
		if first { // the session has begun
			s.wg.Go(func() { s.beat(r, y, now, end) })
		}
	}
}

// take gives a message to the replica of a gateway and its packet path.
func (s *stand) take(name string, r *replica.Replica, m any, now uint64) (*lease.Ack, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out replica.Out
	var err error
	switch m := m.(type) {
	case lease.SessionReply:
		out, err = r.Session(m, now)
	case lease.SnapshotChunk:
		out, err = r.Snapshot(m)
	case lease.Batch:
		out, err = r.Batch(m)
	}
	if err == nil && out.Change != nil {
		s.install(name, out.Change)
		out = r.Applied(out.Change.Rev)
	}
	return out.Ack, err
}

// beat sends heartbeats until the stream has ended.
func (s *stand) beat(r *replica.Replica, y *leaseclient.Sync, now func() uint64, end <-chan struct{}) {
	tick := time.NewTicker(250 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-end:
			return
		case <-tick.C:
		}
		s.mu.Lock()
		h := r.Heartbeat(now())
		s.mu.Unlock()
		if y.Heartbeat(h) != nil {
			return
		}
	}
}

// install is the packet path of a gateway. No other gateway may forward for another holder of what it takes (I1). The caller
// holds mu.
func (s *stand) install(name string, ch *replica.Change) {
	table, ok := s.tables[name]
	if !ok { // it is off
		return
	}
	if ch.Replace {
		clear(table)
	}
	for _, r := range ch.Deletes {
		delete(table, r)
	}
	for _, b := range ch.Upserts {
		for other, t := range s.tables {
			if o, ok := t[b.Resource]; ok && o.Gen < b.Gen {
				s.violated("gateway %s forwards %s for generation %s while %s does for %s", name, b.Resource, b.Gen, other, o.Gen)
			}
		}
		table[b.Resource] = b
	}
}
