package hostd

import (
	"context"
	"fmt"
	"time"

	"github.com/dstm-project/dstm/dataplane"
	"github.com/dstm-project/dstm/lease"
)

// heldQueue keeps packets while a lease is on its way, in order, bounded in number and age.
type heldQueue struct {
	most    int
	age     time.Duration
	packets []dataplane.Held
}

// push adds a packet; when the queue is full the new one is dropped, because the old ones open the connections.
func (q *heldQueue) push(p dataplane.Held) bool {
	if len(q.packets) >= q.most {
		return false
	}
	q.packets = append(q.packets, p)
	return true
}

// pop removes and returns the oldest packet that is young enough; late is how many were not.
func (q *heldQueue) pop(now time.Time) (p dataplane.Held, late int, ok bool) {
	for len(q.packets) > 0 {
		p, q.packets = q.packets[0], q.packets[1:]
		if now.Sub(p.At) <= q.age {
			return p, late, true
		}
		late++
	}
	return dataplane.Held{}, late, false
}

func (q *heldQueue) clear() int {
	n := len(q.packets)
	q.packets = nil
	return n
}

// readHeld turns packets without a lease into triggers.
func (a *Agent) readHeld(ctx context.Context) error {
	for {
		p, err := a.DataPath.ReadHeld(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("held packets: %w", err)
		}
		a.mu.Lock()
		own := a.view.net.own
		a.mu.Unlock()
		cause := classify(p.Data, a.cfg.Device.Placeholder, own)
		a.metrics.trigger(cause)
		if cause != CausePacket || !a.cfg.Trigger.Packet {
			continue
		}
		a.mu.Lock()
		kept, standby := a.held.push(p), a.view.state == StateStandby
		a.mu.Unlock()
		if !kept {
			a.metrics.heldPackets("dropped", 1)
		}
		if !standby {
			a.post(ctx, evTrigger{trigger: lease.TriggerPacket})
		}
	}
}
