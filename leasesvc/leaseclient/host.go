package leaseclient

import (
	"context"
	"crypto/rand"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	leasev1 "github.com/dstm-project/dstm/api/lease/v1"
	"github.com/dstm-project/dstm/internal/wire"
	"github.com/dstm-project/dstm/lease"
)

// Lease is a lease as the host gets it. Valid counts from the sending of the request, on the caller's clock.
type Lease struct {
	lease.Ref
	TEP       netip.Addr
	Valid     time.Duration
	MTU       uint16   // largest inner packet that the gateways take; 0 = not limited by them
	Installed bool     // every serving gateway forwards for it
	Waiting   []string // those that do not yet
}

// BindRequest asks for a lease.
type BindRequest struct {
	Source  netip.Addr // tunnel source, IPv6
	Hint    uint64     // of the Offer that this answers; 0 = none
	Want    netip.Addr // preferred address; zero = none
	Valid   time.Duration
	Trigger lease.Trigger
	MTU     uint16 // the host's tunnel MTU in inner bytes; 0 = not known
	PortSet bool   // the host can do with a port set
}

// Bind leases an address, or renews the lease that the caller has from this source.
func (c *Conn) Bind(ctx context.Context, r BindRequest) (Lease, error) {
	m := &leasev1.BindRequest{
		RequestId: requestID(), TunnelSource: wire.FromAddr6(r.Source), HintId: r.Hint,
		ValidMs: wire.FromDuration(r.Valid), Trigger: leasev1.Trigger(r.Trigger), Mtu: uint32(r.MTU), AcceptsPortset: r.PortSet,
	}
	m.Held = c.proof()
	if r.Want.IsValid() {
		m.Want = wire.FromResource(lease.Whole(r.Want))
	}
	rep, err := call(ctx, c, func(ctx context.Context, cc *grpc.ClientConn, m *leasev1.BindRequest) (*leasev1.Lease, error) {
		return leasev1.NewHostsClient(cc).Bind(ctx, m)
	}, m)
	if err != nil {
		return Lease{}, fmt.Errorf("bind: %w", err)
	}
	c.remember(rep)
	return fromLease(rep)
}

// RenewRequest extends a live lease.
type RenewRequest struct {
	Ref    lease.Ref
	Source netip.Addr
	Valid  time.Duration
	MTU    uint16
}

// Renew extends a live lease.
func (c *Conn) Renew(ctx context.Context, r RenewRequest) (Lease, error) {
	m := &leasev1.RenewRequest{
		RequestId: requestID(), Lease: wire.FromRef(r.Ref), ValidMs: wire.FromDuration(r.Valid),
		TunnelSource: wire.FromAddr6(r.Source), Mtu: uint32(r.MTU), Secret: c.secret(r.Ref),
	}
	rep, err := call(ctx, c, func(ctx context.Context, cc *grpc.ClientConn, m *leasev1.RenewRequest) (*leasev1.Lease, error) {
		return leasev1.NewHostsClient(cc).Renew(ctx, m)
	}, m)
	if err != nil {
		return Lease{}, fmt.Errorf("renew: %w", err)
	}
	c.remember(rep)
	return fromLease(rep)
}

// Release gives a lease back. It succeeds when the lease is gone already.
func (c *Conn) Release(ctx context.Context, ref lease.Ref, why lease.Reason) error {
	m := &leasev1.ReleaseRequest{RequestId: requestID(), Lease: wire.FromRef(ref), Reason: wire.FromReason(why), Secret: c.secret(ref)}
	_, err := call(ctx, c, func(ctx context.Context, cc *grpc.ClientConn, m *leasev1.ReleaseRequest) (*leasev1.ReleaseReply, error) {
		return leasev1.NewHostsClient(cc).Release(ctx, m)
	}, m)
	if err != nil {
		return fmt.Errorf("release: %w", err)
	}
	return nil
}

// maxHeld is how many leases with a secret are remembered: the present one, and some that are about to be given back.
const maxHeld = 4

// remember keeps the secret of a lease, where there is one.
func (c *Conn) remember(m *leasev1.Lease) {
	if len(m.GetSecret()) == 0 {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	h := &leasev1.Held{Lease: &leasev1.LeaseRef{Res: m.GetRes(), Gen: m.GetGen()}, Secret: m.GetSecret()}
	c.held = slices.DeleteFunc(c.held, func(o *leasev1.Held) bool { return proto.Equal(o.Lease, h.Lease) })
	c.held = slices.Insert(c.held, 0, h)
	c.held = c.held[:min(len(c.held), maxHeld)]
}

// proof returns the lease to take along; nil when there is none with a secret.
func (c *Conn) proof() *leasev1.Held {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.held) == 0 {
		return nil
	}
	return c.held[0]
}

// secret returns the secret of a lease, if it is known.
func (c *Conn) secret(ref lease.Ref) []byte {
	want := wire.FromRef(ref)
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, h := range c.held {
		if proto.Equal(h.Lease, want) {
			return h.Secret
		}
	}
	return nil
}

func requestID() []byte {
	b := make([]byte, len(lease.RequestID{}))
	_, _ = rand.Read(b) // never fails, see crypto/rand
	return b
}

func fromLease(m *leasev1.Lease) (Lease, error) {
	res, err := wire.Resource("lease.res", m.GetRes())
	if err != nil {
		return Lease{}, err
	}
	tep, err := wire.Addr6("lease.tep", m.GetTep())
	if err != nil {
		return Lease{}, err
	}
	mtu, err := wire.MTU("lease.mtu_max", m.GetMtuMax())
	if err != nil {
		return Lease{}, err
	}
	return Lease{
		Ref: lease.Ref{Resource: res, Gen: lease.Gen(m.GetGen())}, TEP: tep, Valid: wire.Duration(m.GetValidMs()),
		MTU: mtu, Installed: m.GetInstalled(), Waiting: m.GetWaiting(),
	}, nil
}

// Welcome is the first message of an attendance.
type Welcome struct {
	Cell   string
	HostID string
	Known  lease.Ref // the caller's live lease as the service knows it; zero = none
	T1, T2 uint32    // permille of the validity
	Idle   time.Duration
}

// Offer asks the host to Bind with this hint, within the time given.
type Offer struct {
	Hint   uint64
	Within time.Duration
}

// Revoked says that a lease is the host's no longer.
type Revoked struct {
	Ref    lease.Ref
	Reason lease.Reason
}

// Hello opens an attendance.
type Hello struct {
	Instance string
	Sources  []netip.Addr // at most 16
	Held     lease.Ref    // zero = none
}

// Attendance is one life of the stream that registers a host.
type Attendance struct {
	c      *Conn
	stream grpc.BidiStreamingClient[leasev1.AttendUp, leasev1.AttendDown]
	cancel context.CancelFunc
	mu     sync.Mutex // a stream takes one sender at a time
}

// Attend opens the stream. It returns once the service has said Welcome.
func (c *Conn) Attend(ctx context.Context, h Hello) (*Attendance, Welcome, error) {
	ctx, cancel := context.WithCancel(ctx)
	a, w, err := c.attend(ctx, h)
	if err != nil {
		cancel()
		return nil, Welcome{}, fmt.Errorf("attend: %w", wire.FromStatus(err))
	}
	a.cancel = cancel
	return a, w, nil
}

func (c *Conn) attend(ctx context.Context, h Hello) (*Attendance, Welcome, error) {
	st, err := leasev1.NewHostsClient(c.get()).Attend(ctx)
	if err != nil {
		return nil, Welcome{}, err
	}
	err = st.Send(&leasev1.AttendUp{M: &leasev1.AttendUp_Hello{Hello: &leasev1.HostHello{
		Instance: h.Instance, Sources: wire.FromSources(h.Sources), Held: wire.FromRef(h.Held), Lists: c.lists(),
	}}})
	if err != nil {
		_, err = st.Recv() // Send says only EOF; Recv has the reason
		return nil, Welcome{}, err
	}
	m, err := st.Recv()
	if err != nil {
		return nil, Welcome{}, err
	}
	if m.GetWelcome() == nil {
		return nil, Welcome{}, fmt.Errorf("first message of the service is %T: want Welcome", m.GetM())
	}
	w := m.GetWelcome()
	known, err := wire.OptionalRef("welcome.known", w.GetKnown())
	if err != nil {
		return nil, Welcome{}, err
	}
	return &Attendance{c: c, stream: st}, Welcome{
		Cell: w.GetCell(), HostID: w.GetHostId(), Known: known,
		T1: w.GetTimers().GetT1Permille(), T2: w.GetTimers().GetT2Permille(), Idle: wire.Duration(w.GetTimers().GetIdleMs()),
	}, nil
}

// Recv returns the next Offer or Revoked. An error ends the attendance.
func (a *Attendance) Recv() (any, error) {
	for {
		m, err := a.stream.Recv()
		if err != nil {
			return nil, fmt.Errorf("attend: %w", wire.FromStatus(err))
		}
		switch k := m.GetM().(type) {
		case *leasev1.AttendDown_Offer:
			return Offer{Hint: k.Offer.GetHintId(), Within: wire.Duration(k.Offer.GetWithinMs())}, nil
		case *leasev1.AttendDown_Revoke:
			ref, err := wire.Ref("revoke.lease", k.Revoke.GetLease())
			if err != nil {
				return nil, fmt.Errorf("attend: %w", err)
			}
			return Revoked{Ref: ref, Reason: wire.Reason(k.Revoke.GetReason())}, nil
		case *leasev1.AttendDown_List:
			a.c.pushed(k.List)
		}
		// A message of a newer service: it says nothing to us.
	}
}

// Installed says that the host's packet path holds the lease.
func (a *Attendance) Installed(ref lease.Ref) error {
	return a.send(&leasev1.AttendUp{M: &leasev1.AttendUp_Installed{Installed: &leasev1.Installed{Lease: wire.FromRef(ref)}}})
}

// Sources replaces the addresses that the host reports.
func (a *Attendance) Sources(addrs []netip.Addr) error {
	return a.send(&leasev1.AttendUp{M: &leasev1.AttendUp_Sources{Sources: &leasev1.Sources{Addrs: wire.FromSources(addrs)}}})
}

func (a *Attendance) send(m *leasev1.AttendUp) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.stream.Send(m); err != nil {
		return fmt.Errorf("attend: %w", err)
	}
	return nil
}

// Close ends the attendance; Recv returns an error.
func (a *Attendance) Close() { a.cancel() }
