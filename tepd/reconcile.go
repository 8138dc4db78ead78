package tepd

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/dstm-project/dstm/internal/failpoint"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/lease/replica"
)

// Service is the lease service as a gateway uses it.
type Service interface {
	// Sync opens a stream; hello is called right before it is sent.
	Sync(ctx context.Context, hello func() lease.Hello) (Stream, error)
}

// Stream is one life of a gateway's connection. One goroutine receives, another sends.
type Stream interface {
	// Recv returns the next lease.SessionReply, lease.SnapshotChunk, lease.Batch or lease.Upload.
	Recv() (any, error)
	Heartbeat(lease.Heartbeat) error
	Ack(lease.Ack) error
	Table(lease.TableChunk) error
	Close()
}

const (
	firstReply  = 10 * time.Second // from the Hello to the first message
	defaultBeat = 10 * time.Second // until the service says otherwise
	retryMin    = 250 * time.Millisecond
	retryMax    = 5 * time.Second
)

// follow keeps a stream to the lease service until ctx ends. What the packet path holds stays as it is between streams.
func (g *Gateway) follow(ctx context.Context) error {
	wait, last := retryMin, ""
	for {
		begun := g.Now()
		err := g.session(ctx)
		if ctx.Err() != nil {
			return nil
		}
		g.view.setSync(g.status(), false, err.Error())
		g.metrics.streams.Inc()
		if err.Error() != last {
			last = err.Error()
			g.Log.Warn("no session with the lease service", "err", err)
		}
		if g.Now()-begun > retryMax { // it worked for a while
			wait, last = retryMin, ""
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait/2 + rand.N(wait/2+1)):
		}
		wait = min(2*wait, retryMax)
	}
}

// received is one message, or the end of the stream.
type received struct {
	msg any
	err error
}

// session runs one stream to its end, which is always an error.
func (g *Gateway) session(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// A service that takes the stream and says nothing must not hold us forever.
	silence := time.AfterFunc(firstReply, cancel)
	defer silence.Stop()
	st, err := g.Service.Sync(ctx, g.hello)
	if err != nil {
		return err
	}
	defer st.Close()
	msgs := make(chan received)
	go func() {
		for {
			m, err := st.Recv()
			select {
			case msgs <- received{m, err}:
			case <-ctx.Done():
				return
			}
			if err != nil {
				return
			}
		}
	}()
	period := defaultBeat
	beat := time.NewTimer(period)
	defer beat.Stop()
	for {
		select {
		case <-ctx.Done():
			return errors.New("the lease service does not answer")
		case m := <-msgs:
			if m.err != nil {
				return m.err
			}
			if rep, ok := m.msg.(lease.SessionReply); ok && rep.NextBeatNS > 0 {
				period = time.Duration(rep.NextBeatNS)
				beat.Reset(period)
			}
			silence.Reset(3*period + firstReply)
			if err := g.take(ctx, st, m.msg); err != nil {
				return err
			}
		case <-beat.C:
			beat.Reset(period)
			if g.status().Session == 0 {
				continue
			}
			if err := st.Heartbeat(g.heartbeat()); err != nil {
				return err
			}
		}
	}
}

// take hands one message to the replica and does what follows from it.
func (g *Gateway) take(ctx context.Context, st Stream, msg any) error {
	if _, ok := msg.(lease.Upload); ok {
		return g.upload(ctx, st)
	}
	before := g.status()
	out, err := g.with(ctx, func(r *replica.Replica) (replica.Out, error) {
		switch m := msg.(type) {
		case lease.SessionReply:
			g.view.setLagging(m.Lagging)
			return r.Session(m, uint64(g.Now()))
		case lease.SnapshotChunk:
			return r.Snapshot(m)
		case lease.Batch:
			return r.Batch(m)
		}
		return replica.Out{}, fmt.Errorf("message of unexpected type %T", msg)
	})
	if err == nil {
		err = g.do(ctx, st, out)
	}
	after := g.status()
	g.view.setSync(after, after.Session != 0, "")
	g.metrics.sync(after)
	if after.Session != before.Session {
		g.Log.Info("session", "session", after.Session, "rev", uint64(after.Applied))
	}
	if after.Synced && !before.Synced {
		g.Log.Info("table synced", "rev", uint64(after.Applied), "bindings", after.Bindings)
	}
	return err
}

// tableChunk is how many bindings go into one message.
const tableChunk = 512

// upload tells the service what the packet path holds, whichever process put it there.
func (g *Gateway) upload(ctx context.Context, st Stream) error {
	es, err := g.Path.Entries(ctx)
	if err != nil {
		return fmt.Errorf("packet path: %w", err)
	}
	g.Log.Info("the lease service was restored from a copy and asks for the table", "bindings", len(es))
	for {
		n := min(len(es), tableChunk)
		c := lease.TableChunk{Last: n == len(es)}
		for _, e := range es[:n] {
			c.Held = append(c.Held, e.Binding)
		}
		if err := st.Table(c); err != nil {
			return err
		}
		if es = es[n:]; c.Last {
			return nil
		}
	}
}

// do carries out what follows from a message. The order is what makes acknowledgements honest (I8) and deadlines safe (F7):
// the packet path first, then Applied, and only what Applied returns leaves.
func (g *Gateway) do(ctx context.Context, st Stream, out replica.Out) error {
	for {
		if out.Ack != nil {
			for _, n := range out.Ack.Nacks {
				g.Log.Error("record refused", "addr", n.Resource.String(), "gen", n.Gen.String(), "reason", n.Reason)
			}
			if err := failpoint.Hit("tepd-before-ack"); err != nil {
				return err
			}
			if err := st.Ack(*out.Ack); err != nil {
				return err
			}
			if err := failpoint.Hit("tepd-after-ack"); err != nil {
				return err
			}
		}
		if out.Change == nil {
			return nil
		}
		change := out.Change
		err := failpoint.Hit("tepd-before-apply")
		if err == nil {
			err = g.apply(ctx, change)
		}
		if err != nil {
			g.failed()
			return fmt.Errorf("packet path: %w", err)
		}
		out, err = g.with(ctx, func(r *replica.Replica) (replica.Out, error) { return r.Applied(change.Rev), nil })
		if err != nil {
			return err
		}
		g.publish(change)
	}
}

// apply makes the packet path hold a change. Pools come before bindings that need them.
func (g *Gateway) apply(ctx context.Context, c *replica.Change) error {
	begun := time.Now()
	defer func() { g.metrics.applySeconds.Observe(time.Since(begun).Seconds()) }()
	if failpoint.Hit("bug-not-applied") != nil {
		return nil
	}
	if c.Pools {
		if err := g.setPools(ctx, g.rep.Pools()); err != nil {
			return err
		}
	}
	if c.Replace {
		return g.Path.Replace(ctx, c.Upserts)
	}
	if len(c.Upserts) == 0 && len(c.Deletes) == 0 {
		return nil
	}
	return g.Path.Apply(ctx, c.Upserts, c.Deletes)
}

// publish tells the announcer what is applied now, if it could matter to it.
func (g *Gateway) publish(c *replica.Change) {
	n := g.status().Bindings
	v := routesView{pools: g.rep.Pools(), leases: n}
	perLease := g.cfg.BGP.Announce.Pool == PoolLease
	if !c.Pools && !perLease {
		return
	}
	if perLease && n <= g.cfg.BGP.Announce.MaxHostRoutes {
		for _, b := range g.rep.Table() {
			v.addrs = append(v.addrs, b.Addr)
		}
	}
	g.view.setRoutes(v)
	g.wakeAnnouncer()
}
