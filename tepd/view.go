package tepd

import (
	"net/netip"
	"sync"

	"github.com/dstm-project/dstm/bgp"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/lease/replica"
)

// routesView is what the packet path holds, as far as announcements depend on it.
type routesView struct {
	pools  []lease.Pool
	leases int
	addrs  []netip.Addr // of leases; only in lease mode and below the cap
}

// state is what the tasks of a gateway know of each other, and what status shows.
type state struct {
	replica    replica.Status
	everSynced bool
	connected  bool
	problem    string // why not
	lagging    bool
	alone      bool // cut off from the service, unlike another gateway
	kernel     error
	health     Health
	why        string // the failure of the last self-test
	routes     routesView
	notes      []string // why less is announced than there is
	speaker    bgp.Remote
	speakerErr string
}

// view guards a state.
type view struct {
	mu sync.Mutex
	s  state
}

func (v *view) load() state {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.s
}

func (v *view) with(f func(s *state)) {
	v.mu.Lock()
	defer v.mu.Unlock()
	f(&v.s)
}

func (v *view) setSync(r replica.Status, connected bool, problem string) {
	v.with(func(s *state) {
		s.replica, s.connected, s.problem = r, connected, problem
		s.everSynced = s.everSynced || r.Synced
	})
}

// setDeadline notes what moves without the service.
func (v *view) setDeadline(deadline uint64, alone bool) {
	v.with(func(s *state) { s.replica.Deadline, s.alone = deadline, alone })
}

func (v *view) setLagging(on bool) { v.with(func(s *state) { s.lagging = on }) }

func (v *view) setKernel(err error) (was error) {
	v.with(func(s *state) { was, s.kernel = s.kernel, err })
	return was
}

func (v *view) setHealth(h Health, why string) (was string) {
	v.with(func(s *state) { was, s.health, s.why = s.why, h, why })
	return was
}

func (v *view) setRoutes(r routesView) { v.with(func(s *state) { s.routes = r }) }

func (v *view) setNotes(n []string) { v.with(func(s *state) { s.notes = n }) }

func (v *view) setSpeaker(sp bgp.Remote, problem string) {
	v.with(func(s *state) { s.speaker, s.speakerErr = sp, problem })
}
