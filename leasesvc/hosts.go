package leasesvc

import (
	"context"
	"hash/maphash"
	"net/netip"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	leasev1 "github.com/dstm-project/dstm/api/lease/v1"
	"github.com/dstm-project/dstm/internal/thinrpc"
	"github.com/dstm-project/dstm/internal/wire"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/store"
)

// hosts is who attends, under Server.mu.
type hosts struct {
	byName   map[string]*attendant
	bySource map[netip.Addr]*attendant
	watchers map[*watcher]struct{}
	lastHint uint64
	seed     maphash.Seed // keys of hosts are of this process only
}

// attendant is one host with a live stream. It implements thinrpc.Receiver.
type attendant struct {
	s        *Server
	c        caller
	send     func(proto.Message) error
	end      func(error) // ends the stream, and does not wait for that
	uncount  func()
	welcomed bool // of the goroutine that receives

	name      string
	sources   []netip.Addr
	hint      *hint         // under way
	installed lease.Ref     // what the host last said it has in its packet path
	silent    bool          // did not answer an Offer; not held again until it speaks
	refused   lease.Reason  // of the last Bind
	until     time.Duration // until when refused counts

	out     sync.Mutex            // guards what follows
	queue   []*leasev1.AttendDown // what is to be sent; full = the host does not read, its stream ends
	sending bool                  // by somebody, who also takes what is queued meanwhile
}

// maxQueue is how many messages wait for a host at most.
const maxQueue = 16

// hint is one wish for a lease. Every resolver that asks for the same host waits for the same one.
type hint struct {
	id    uint64
	done  chan struct{} // closed when settled
	state leasev1.HintState
	why   lease.Reason
	spoke bool // the host has answered with a Bind
}

// refusedFor is how long a resolver need not ask again for a host that was refused.
const refusedFor = 5 * time.Second

func (h *hosts) init() {
	h.byName, h.bySource = map[string]*attendant{}, map[netip.Addr]*attendant{}
	h.watchers, h.seed = map[*watcher]struct{}{}, maphash.MakeSeed()
}

func (h *hosts) attended() int { return len(h.byName) }

func (h *hosts) key(name string) uint64 { return maphash.String(h.seed, name) }

// attend begins the stream of a host.
func (s *Server) attend(ctx context.Context, st *thinrpc.Stream) (thinrpc.Receiver, error) {
	ctx, err := s.authorize(ctx, leasev1.Hosts_Attend_FullMethodName)
	if err != nil {
		return nil, err
	}
	if err := s.complete(); err != nil {
		return nil, err
	}
	at := &attendant{s: s, c: callerOf(ctx), send: st.Send, end: st.End}
	at.name = at.c.id.Name
	if at.uncount, err = s.openStream(ctx, at.end); err != nil {
		return nil, err
	}
	return at, nil
}

// Recv implements thinrpc.Receiver.
func (at *attendant) Recv(decode func(any) error) error {
	var m leasev1.AttendUp
	if err := decode(&m); err != nil {
		return err
	}
	s := at.s
	if !at.welcomed && m.GetHello() == nil {
		return status.Error(codes.InvalidArgument, "attend: first message: want hello")
	}
	switch k := m.GetM().(type) {
	case *leasev1.AttendUp_Hello:
		return at.hello(k.Hello)
	case *leasev1.AttendUp_Installed:
		ref, err := wire.Ref("installed.lease", k.Installed.GetLease())
		if err != nil {
			return invalid(err)
		}
		s.installed(at, ref)
	case *leasev1.AttendUp_Sources:
		sources, err := s.ownSources(at.c, k.Sources.GetAddrs())
		if err != nil {
			return err
		}
		s.changeSources(at, sources)
	}
	return nil
}

// Closed implements thinrpc.Receiver.
func (at *attendant) Closed() {
	at.uncount()
	if at.welcomed {
		at.s.unregister(at)
	}
}

// hello registers the host.
func (at *attendant) hello(m *leasev1.HostHello) error {
	if at.welcomed {
		return status.Error(codes.InvalidArgument, "attend: a second hello")
	}
	sources, err := at.s.ownSources(at.c, m.GetSources())
	if err != nil {
		return err
	}
	if at.installed, err = wire.OptionalRef("hello.held", m.GetHeld()); err != nil {
		return invalid(err)
	}
	at.welcomed = true
	at.s.register(at, sources, m.GetLists())
	return nil
}

// changeSources takes what a host says of its addresses, unless its stream has ended meanwhile: nobody would take them off the
// list again.
func (s *Server) changeSources(at *attendant, sources []netip.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.hosts.byName[at.name] == at {
		s.setSources(at, sources)
	}
}

// ownSources decodes what a host reports and leaves out what it may not use.
func (s *Server) ownSources(c caller, bs [][]byte) ([]netip.Addr, error) {
	all, err := wire.Sources("sources", bs)
	if err != nil {
		return nil, invalid(err)
	}
	return slices.DeleteFunc(all, func(a netip.Addr) bool { return s.checkSource(c, a) != nil }), nil
}

// register puts a host on the list, and what it is to know first, in order, into its queue. A newer stream of the same identity
// takes the place of the older.
func (s *Server) register(at *attendant, sources []netip.Addr, lists [][]byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if old := s.hosts.byName[at.name]; old != nil {
		old.end(status.Error(codes.Aborted, "attend: another stream of this identity took over"))
		s.remove(old)
	}
	s.hosts.byName[at.name] = at
	s.setSources(at, sources)
	t := s.cfg.leaseTimers()
	w := &leasev1.Welcome{
		Cell: s.cfg.Cell, ClusterId: s.cluster[:], HostId: at.name,
		Timers: &leasev1.Timers{T1Permille: t.T1, T2Permille: t.T2, IdleMs: wire.FromDuration(s.cfg.Timers.Idle)},
	}
	if in, ok := s.leaseOf(s.now().Mono, at.name); ok {
		w.Known = wire.FromRef(in.Ref())
	}
	at.queue = append(at.queue, &leasev1.AttendDown{M: &leasev1.AttendDown_Welcome{Welcome: w}})
	for _, l := range s.missing(lists) {
		at.queue = append(at.queue, &leasev1.AttendDown{M: &leasev1.AttendDown_List{List: l}})
	}
	at.sending = true
	go at.flush()
}

// leaseOf returns the live lease of a host. The caller holds mu.
func (s *Server) leaseOf(now time.Duration, name string) (lease.Info, bool) {
	r, ok := s.cell.Where(name)
	if !ok {
		return lease.Info{}, false
	}
	c := s.core(r)
	if c == nil {
		return lease.Info{}, false
	}
	return c.Lookup(now, r)
}

func (s *Server) unregister(at *attendant) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.remove(at)
}

func (s *Server) remove(at *attendant) {
	if s.hosts.byName[at.name] == at {
		delete(s.hosts.byName, at.name)
	}
	s.setSources(at, nil)
	at.settle(leasev1.HintState_REFUSED, lease.ReasonNotRegistered)
}

// setSources replaces the sources of a host. The first host that reports an address has it.
func (s *Server) setSources(at *attendant, sources []netip.Addr) {
	for _, a := range at.sources {
		if s.hosts.bySource[a] == at && !slices.Contains(sources, a) {
			delete(s.hosts.bySource, a)
			s.sourceChanged(a)
		}
	}
	at.sources = at.sources[:0]
	for _, a := range sources {
		if have := s.hosts.bySource[a]; have != nil && have != at {
			s.m.refused.WithLabelValues("source_taken").Inc()
			continue
		}
		s.hosts.bySource[a] = at
		at.sources = append(at.sources, a)
		s.sourceChanged(a)
	}
}

// hostSpoke notes a sign of life that answers an Offer.
func (s *Server) hostSpoke(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if at := s.hosts.byName[name]; at != nil {
		at.silent = false
		if at.hint != nil {
			at.hint.spoke = true
		}
	}
}

// installed notes that the host's packet path has a lease, which ends the hold of its DNS answers.
func (s *Server) installed(at *attendant, ref lease.Ref) {
	s.mu.Lock()
	defer s.mu.Unlock()
	at.installed, at.silent = ref, false
	if s.hosts.byName[at.name] != at {
		return // its stream has ended
	}
	if in, ok := s.leaseOf(s.now().Mono, at.name); ok && in.Ref() == ref {
		at.settle(leasev1.HintState_READY, lease.ReasonNone)
		s.hostChanged(at.name)
	}
}

// refusedHost ends the hint of a host whose Bind was refused. The caller holds mu.
func (s *Server) refusedHost(now lease.Now, name string, why lease.Reason) {
	at := s.hosts.byName[name]
	if at == nil {
		return
	}
	at.refused, at.until = why, now.Mono+refusedFor
	at.settle(leasev1.HintState_REFUSED, why)
	s.hostChanged(name)
}

func (at *attendant) settle(state leasev1.HintState, why lease.Reason) {
	if at.hint == nil {
		return
	}
	at.hint.state, at.hint.why = state, why
	close(at.hint.done)
	at.hint = nil
}

// tell queues a message for a host; a host that does not read loses its stream and finds out on the next one. What sends is a
// goroutine that lives no longer than there is something to send: most hosts are idle.
func (at *attendant) tell(m *leasev1.AttendDown) {
	at.out.Lock()
	defer at.out.Unlock()
	if len(at.queue) == maxQueue {
		at.end(status.Error(codes.ResourceExhausted, "attend: the host does not read"))
		return
	}
	at.queue = append(at.queue, m)
	if !at.sending {
		at.sending = true
		go at.flush()
	}
}

// flush sends what is queued. A stream has one at a time.
func (at *attendant) flush() {
	for {
		at.out.Lock()
		ms := at.queue
		at.queue = nil
		at.sending = len(ms) > 0
		at.out.Unlock()
		if len(ms) == 0 {
			return
		}
		for _, m := range ms {
			if err := at.send(m); err != nil {
				at.end(err)
				return // the stream is over, nothing is sent any more
			}
		}
	}
}

// tellRevoked tells a host, once it is durable, that its lease ended. The caller holds mu.
func (s *Server) tellRevoked(e lease.Ended, p *store.Pending) {
	at := s.hosts.byName[e.Host]
	if at == nil {
		return
	}
	go func() {
		// Not bound to a caller: the revoke stands whoever asked for it.
		if p.Wait(context.Background()) == nil {
			at.tell(&leasev1.AttendDown{M: &leasev1.AttendDown_Revoke{Revoke: &leasev1.Revoke{
				Lease: wire.FromRef(e.Ref), Reason: wire.FromReason(e.Reason),
			}}})
		}
	}()
}
