package tepd

import (
	"context"
	"fmt"
	"time"

	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/lease/replica"
)

// Peers is how this gateway asks others, and is asked, whether they have a session with the lease service (F9).
type Peers interface {
	// Ask asks another gateway whether it has no session.
	Ask(ctx context.Context, to lease.Peer) (quiet bool, err error)
	// Serve answers others with what asked returns, until ctx ends.
	Serve(ctx context.Context, asked func() (quiet bool)) error
}

const (
	minQuestion = 100 * time.Millisecond // between questions
	idle        = time.Second            // until there was a first session
)

// with steps the replica and moves the deadline of the packet path, in one order for all who do.
func (g *Gateway) with(ctx context.Context, step func(r *replica.Replica) (replica.Out, error)) (replica.Out, error) {
	g.table.Lock()
	defer g.table.Unlock()
	out, err := step(g.rep)
	if err == nil && out.Deadline != 0 {
		if err = g.Path.SetDeadline(ctx, out.Deadline); err != nil {
			err = fmt.Errorf("packet path: deadline: %w", err)
		}
	}
	return out, err
}

func (g *Gateway) hello() lease.Hello {
	g.table.Lock()
	defer g.table.Unlock()
	return g.rep.Hello(uint64(g.Now()))
}

func (g *Gateway) heartbeat() lease.Heartbeat {
	g.table.Lock()
	defer g.table.Unlock()
	return g.rep.Heartbeat(uint64(g.Now()))
}

func (g *Gateway) failed() {
	g.table.Lock()
	defer g.table.Unlock()
	g.rep.Failed()
}

// status returns where the replica stands.
func (g *Gateway) status() replica.Status {
	g.table.Lock()
	defer g.table.Unlock()
	return g.rep.Status()
}

// alone reports whether another gateway has a session while this one has none.
func (g *Gateway) alone() bool {
	g.table.Lock()
	defer g.table.Unlock()
	return g.rep.Alone()
}

// asked answers the question of another gateway.
func (g *Gateway) asked() bool {
	g.table.Lock()
	defer g.table.Unlock()
	return g.rep.Asked(uint64(g.Now()))
}

// goOn asks the other gateways while the lease service is silent, and goes on forwarding while all of them say that it is
// silent to them too.
func (g *Gateway) goOn(ctx context.Context) error {
	for {
		var q replica.Question
		every := idle
		_, err := g.with(ctx, func(r *replica.Replica) (out replica.Out, err error) {
			q, out = r.Ask(uint64(g.Now()))
			if e := time.Duration(r.QuestionEvery()); e > 0 {
				every = max(e, minQuestion)
			}
			return out, nil
		})
		if err != nil {
			g.Log.Error("not going on without the lease service", "err", err)
		}
		for _, o := range q.Others {
			go g.ask(ctx, o, q.Sent, every)
		}
		g.view.setDeadline(g.status().Deadline, g.alone())
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(every):
		}
	}
}

// ask puts one question to one gateway. No answer in time is no answer.
func (g *Gateway) ask(ctx context.Context, to lease.Peer, sent uint64, patience time.Duration) {
	asking, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	quiet, err := g.Peers.Ask(asking, to)
	if err != nil {
		if ctx.Err() == nil {
			g.metrics.questions.WithLabelValues("failed").Inc()
			g.Log.Warn("question not answered", "tep", to.TEP, "err", err)
		}
		return
	}
	result := "session"
	if quiet {
		result = "quiet"
	}
	g.metrics.questions.WithLabelValues(result).Inc()
	alone := false
	_, err = g.with(ctx, func(r *replica.Replica) (replica.Out, error) {
		was := r.Alone()
		out := r.Answer(to.TEP, sent, quiet, uint64(g.Now()))
		alone = r.Alone() && !was
		return out, nil
	})
	if err != nil {
		g.Log.Error("not going on without the lease service", "err", err)
	}
	if alone {
		g.Log.Warn("this gateway alone is cut off from the lease service", "tep", to.TEP)
	}
}
