package etcdstore

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/dstm-project/dstm/leasesvc/store"
)

// Files names the PEM files with which the store shows itself to etcd and checks etcd's members.
type Files struct{ Cert, Key, CA string }

// Keep-alive of connections: gRPC sends no pings more often than every 10 s, and etcd takes them from 5 s on.
const (
	pingEvery   = 10 * time.Second
	pingTimeout = 3 * time.Second
)

// client is a connection to one etcd cluster. Every call through it has a deadline and asks for a member that knows a
// leader.
//
// Calls go to one member until it fails; then to the next. (The client's own balancer goes round, so that one member that
// hangs would hold up every third call.)
type client struct {
	members []*clientv3.Client // one an endpoint
	current atomic.Int32       // index of the one in use
	call    time.Duration      // deadline of one call
	keys    keys
	cluster uint64 // id of the etcd cluster that answers, 0 = not known yet
}

func dial(o Options) (*client, error) {
	t, err := o.TLS.client()
	if err != nil {
		return nil, err
	}
	c := &client{call: o.TTL / callsPerTTL, keys: newKeys(o.Prefix)}
	for _, e := range o.Endpoints {
		m, err := clientv3.New(clientv3.Config{
			Endpoints: []string{e}, TLS: t, DialTimeout: o.TTL, MaxUnaryRetries: 1,
			DialKeepAliveTime: pingEvery, DialKeepAliveTimeout: pingTimeout,
			Logger: zap.NewNop(), DialOptions: append(dialOptions{grpc.WithChainUnaryInterceptor(failFast)}, o.dial...),
		})
		if err != nil {
			return nil, errors.Join(fmt.Errorf("etcd: endpoint %s: %w", e, err), c.Close())
		}
		c.members = append(c.members, m)
	}
	return c, nil
}

// failFast lets calls to a member that cannot be reached end at once with the reason. The client's default is to wait for
// the connection until the deadline, after which nobody knows why there is none.
func failFast(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	return invoke(ctx, method, req, reply, cc, append(opts, grpc.WaitForReady(false))...)
}

// Close closes the connections.
func (c *client) Close() error {
	var errs []error
	for _, m := range c.members {
		errs = append(errs, m.Close())
	}
	return errors.Join(errs...)
}

// use runs a call on the member in use. After an error that may be this member's the next call goes to another.
func (c *client) use(f func(m *clientv3.Client) error) error {
	i := c.current.Load()
	err := f(c.members[i])
	if err != nil && !isFinal(err) {
		c.current.CompareAndSwap(i, (i+1)%int32(len(c.members)))
	}
	return err
}

// client returns the TLS configuration: nil without files. The certificate is read for each connection, so that a
// replaced one is used from the next on.
func (f Files) client() (*tls.Config, error) {
	if f == (Files{}) {
		return nil, nil
	}
	pem, err := os.ReadFile(f.CA)
	if err != nil {
		return nil, fmt.Errorf("etcd: tls: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("etcd: tls: ca %s: no certificate in it: want PEM with the CA that signs the members of etcd", f.CA)
	}
	load := func() (*tls.Certificate, error) {
		c, err := tls.LoadX509KeyPair(f.Cert, f.Key)
		if err != nil {
			return nil, fmt.Errorf("etcd: tls: certificate %s with key %s: %w", f.Cert, f.Key, err)
		}
		return &c, nil
	}
	if _, err := load(); err != nil {
		return nil, err
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS13, RootCAs: roots,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return load() },
	}, nil
}

// deadline bounds one call.
func (c *client) deadline(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(clientv3.WithRequireLeader(ctx), c.call)
}

// txn is one transaction: exactly one of the two branches is done, at one revision.
type txn struct {
	when      []clientv3.Cmp
	then, els []clientv3.Op
}

// do runs a transaction once; ctx comes from deadline or retry. After an error it may have been done, or may still be
// done later.
func (c *client) do(ctx context.Context, t txn) (r *clientv3.TxnResponse, err error) {
	err = c.use(func(m *clientv3.Client) error {
		r, err = m.Txn(ctx).If(t.when...).Then(t.then...).Else(t.els...).Commit()
		return err
	})
	if err == nil && c.cluster != 0 && r.Header.ClusterId != c.cluster {
		return nil, final{fmt.Errorf("cluster %x answers at the endpoints of cluster %x", r.Header.ClusterId, c.cluster)}
	}
	return r, err
}

// voters checks how many members vote.
func (c *client) voters(ctx context.Context) error {
	var r *clientv3.MemberListResponse
	err := c.use(func(m *clientv3.Client) (err error) {
		r, err = m.MemberList(ctx)
		return err
	})
	if err != nil {
		return err
	}
	n, names := 0, []string{}
	for _, m := range r.Members {
		if !m.IsLearner {
			n++
			names = append(names, m.Name)
		}
	}
	if err := store.CheckVoters(n); err != nil {
		return final{fmt.Errorf("etcd of %s: %w", strings.Join(names, ", "), err)}
	}
	return nil
}

// grant makes an etcd lease.
func (c *client) grant(ctx context.Context, ttl time.Duration) (id clientv3.LeaseID, err error) {
	err = c.use(func(m *clientv3.Client) error {
		r, err := m.Grant(ctx, int64(ttl/time.Second))
		if err == nil {
			id = r.ID
		}
		return err
	})
	return id, err
}

// renew makes an etcd lease last for its TTL from now. final(ErrLeaseNotFound) means that it ended.
func (c *client) renew(ctx context.Context, id clientv3.LeaseID) error {
	ctx, cancel := context.WithCancel(ctx) // ends the stream
	defer cancel()
	return c.use(func(m *clientv3.Client) error {
		stream, err := pb.NewLeaseClient(m.ActiveConnection()).LeaseKeepAlive(ctx)
		if err != nil {
			return err
		}
		if err := stream.Send(&pb.LeaseKeepAliveRequest{ID: int64(id)}); err != nil {
			return err
		}
		r, err := stream.Recv()
		if err == nil && r.TTL <= 0 {
			return final{rpctypes.ErrLeaseNotFound}
		}
		return err
	})
}

// revoke ends an etcd lease, and with it every key bound to it.
func (c *client) revoke(id clientv3.LeaseID) error {
	ctx, cancel := c.deadline(context.Background())
	defer cancel()
	err := c.use(func(m *clientv3.Client) error {
		_, err := m.Revoke(ctx, id)
		return err
	})
	if errors.Is(err, rpctypes.ErrLeaseNotFound) {
		return nil
	}
	return err
}

// final marks an error that another attempt would meet again.
type final struct{ error }

func (f final) Unwrap() error { return f.error }

// isFinal tells errors that etcd would answer again and before it did anything from those after which it is not known
// what was done.
func isFinal(err error) bool {
	var f final
	if errors.As(err, &f) || errors.Is(err, rpctypes.ErrNoSpace) {
		return true
	}
	var e rpctypes.EtcdError
	if !errors.As(err, &e) {
		return false
	}
	switch e.Code() {
	case codes.InvalidArgument, codes.OutOfRange:
		return !errors.Is(err, rpctypes.ErrAuthOldRevision) && !errors.Is(err, rpctypes.ErrFutureRev)
	case codes.PermissionDenied, codes.Unauthenticated, codes.DataLoss,
		codes.NotFound:
		return true
	}
	return false
}

// Waits between attempts, and the deadline of one call as a part of the TTL.
const (
	firstWait   = 10 * time.Millisecond
	longestWait = 250 * time.Millisecond
	callsPerTTL = 5
)

// retry repeats f until it succeeds, fails for good, or patience (0 = without end) is over. The context of an attempt
// has a deadline, the first one's half as long: a member may hang, and the next attempt goes to another.
func (c *client) retry(ctx context.Context, patience time.Duration, f func(ctx context.Context) error) error {
	start, limit := time.Now(), c.call/2
	for wait := firstWait; ; wait = min(2*wait, longestWait) {
		try, cancel := context.WithTimeout(clientv3.WithRequireLeader(ctx), limit)
		err := f(try)
		cancel()
		if err == nil || isFinal(err) || patience > 0 && time.Since(start) >= patience {
			return err
		}
		if !sleep(ctx, wait) {
			return ctx.Err()
		}
		limit = c.call
	}
}

// sleep returns false if ctx ended.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// dialOptions of tests: what stands between the store and etcd.
type dialOptions = []grpc.DialOption
