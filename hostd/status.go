package hostd

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strings"

	"github.com/dstm-project/dstm/dataplane"
	"github.com/dstm-project/dstm/internal/daemon"
)

// Status is GET /status, schema dstm.host/1.
type Status struct {
	State    string       `json:"state"`             // of the lease keeper; "standby: native ipv4" with its reason
	Reason   string       `json:"reason"`            // of the last change
	Lease    string       `json:"lease,omitempty"`   // address, with the port set if it is one
	Gen      string       `json:"gen,omitempty"`     // epoch.revision
	LeftMS   int64        `json:"left_ms,omitempty"` // until the lease ends unless renewed
	TEP      string       `json:"tep,omitempty"`
	MTU      uint16       `json:"mtu,omitempty"`     // of the tunnel, inner bytes
	Attended bool         `json:"attended"`          // registered at the lease service
	Problem  string       `json:"problem,omitempty"` // why not
	Source   string       `json:"source,omitempty"`  // of the tunnel
	Link     string       `json:"link,omitempty"`    // the way out
	Sources  []netip.Addr `json:"sources"`           // reported to the lease service
}

// Status returns what the agent is doing.
func (a *Agent) Status() Status {
	a.mu.Lock()
	v := a.view
	a.mu.Unlock()
	s := Status{
		State: v.state.String(), Reason: v.why, Attended: v.attended, Problem: v.problem,
		Link: v.net.hop.Link, MTU: v.net.mtu, Sources: append([]netip.Addr{}, v.net.sources...),
	}
	if v.net.source.IsValid() {
		s.Source = v.net.source.String()
	}
	if v.state == StateStandby {
		s.State += ": " + v.why
	}
	if v.has {
		s.Lease, s.Gen, s.TEP, s.MTU = v.lease.Resource.String(), v.lease.Gen.String(), v.lease.TEP.String(), v.lease.Binding.MTU
		s.LeftMS = max(0, v.lease.deadline()-a.Now()).Milliseconds()
	}
	return s
}

// Ready says why the host could not get a lease now; nil: it could.
func (a *Agent) Ready() error {
	s := a.Status()
	switch {
	case s.Attended || strings.HasPrefix(s.State, StateStandby.String()):
		return nil
	case s.Problem == "":
		return errors.New("not registered at the lease service yet")
	}
	return fmt.Errorf("not registered at the lease service: %s", s.Problem)
}

// Drops is GET /drops, schema dstm.drops/1: rx = tx + consumed + the sum of drops, in each direction.
type Drops struct {
	Up   Direction `json:"up"`   // from this host into the tunnel
	Down Direction `json:"down"` // from the tunnel to this host
}

// Direction counts the packets of one direction.
type Direction struct {
	Rx       uint64            `json:"rx"`
	RxBytes  uint64            `json:"rx_bytes"`
	Tx       uint64            `json:"tx"`
	TxBytes  uint64            `json:"tx_bytes"`
	Consumed uint64            `json:"consumed"`
	Drops    map[string]uint64 `json:"drops"`
}

func direction(d dataplane.Direction) Direction {
	out := Direction{Rx: d.Rx, RxBytes: d.RxBytes, Tx: d.Tx, TxBytes: d.TxBytes, Consumed: d.Consumed, Drops: map[string]uint64{}}
	for reason, n := range d.Drops {
		if n > 0 {
			out.Drops[reason.String()] = n
		}
	}
	return out
}

// Drops reads the counters of the packet path.
func (a *Agent) Drops(ctx context.Context) (Drops, error) {
	c, err := a.DataPath.Counters(ctx)
	if err != nil {
		return Drops{}, err
	}
	return Drops{Up: direction(c.Up), Down: direction(c.Down)}, nil
}

// Handlers are the agent's pages for the admin listener.
func (a *Agent) Handlers() map[string]http.Handler {
	return map[string]http.Handler{
		"GET /status": daemon.JSON("dstm.host/1", func(*http.Request) (any, error) { return a.Status(), nil }),
		"GET /drops":  daemon.JSON("dstm.drops/1", func(r *http.Request) (any, error) { return a.Drops(r.Context()) }),
		"POST /up": daemon.JSON("dstm.host/1", func(r *http.Request) (any, error) {
			a.Trigger(r.Context())
			return a.Status(), nil
		}),
	}
}
