package hostd

import (
	"context"
	"errors"
	"net/netip"

	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/leaseclient"
)

// Service is the lease service as a host uses it.
type Service interface {
	// Attend opens the stream that registers the host and returns once the service has welcomed it.
	Attend(ctx context.Context, h leaseclient.Hello) (Stream, leaseclient.Welcome, error)
	Bind(ctx context.Context, r leaseclient.BindRequest) (leaseclient.Lease, error)
	Renew(ctx context.Context, r leaseclient.RenewRequest) (leaseclient.Lease, error)
	Release(ctx context.Context, ref lease.Ref, why lease.Reason) error
	// Reset gives up the connection there is, because the network changed under it.
	Reset()
}

// Stream is an open attendance. Its methods may be called concurrently.
type Stream interface {
	Sources(addrs []netip.Addr) error
	Installed(ref lease.Ref) error
	// Recv returns the next leaseclient.Offer or leaseclient.Revoked.
	Recv() (any, error)
	Close()
}

// Client makes a Service of a connection.
type Client struct{ *leaseclient.Conn }

// Attend opens the stream that registers the host.
func (c Client) Attend(ctx context.Context, h leaseclient.Hello) (Stream, leaseclient.Welcome, error) {
	a, w, err := c.Conn.Attend(ctx, h)
	if err != nil {
		return nil, w, err
	}
	return a, w, nil
}

// MaxSources is how many addresses a host reports at most.
const MaxSources = 16

// errOver is the error of a lease that was over before its answer came.
var errOver = errors.New("the lease was over before the answer came")

// temporary reports whether the same request may succeed later: the service was not reached, or it refused for a reason
// that passes and that does not end a live lease.
func temporary(err error) bool {
	switch leaseclient.ReasonOf(err) {
	case lease.ReasonNone:
		return !errors.Is(err, errOver)
	case lease.ReasonPoolDry, lease.ReasonNotRegistered, lease.ReasonNoTEP, lease.ReasonDegradedStore:
		return true
	}
	return false
}
