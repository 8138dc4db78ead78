package etcdstore

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

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
type client struct {
	*clientv3.Client
	call    time.Duration // deadline of one call
	keys    keys
	cluster uint64 // id of the etcd cluster that answers, 0 = not known yet
}

func dial(o Options) (*client, error) {
	t, err := o.TLS.client()
	if err != nil {
		return nil, err
	}
	c, err := clientv3.New(clientv3.Config{
		Endpoints: o.Endpoints, TLS: t, DialTimeout: o.TTL,
		DialKeepAliveTime: pingEvery, DialKeepAliveTimeout: pingTimeout,
		Logger: zap.NewNop(), DialOptions: o.dial,
	})
	if err != nil {
		return nil, fmt.Errorf("etcd: %w", err)
	}
	return &client{Client: c, call: o.TTL / callsPerTTL, keys: newKeys(o.Prefix)}, nil
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

// do runs a transaction once. After an error it may have been done, or may still be done later.
func (c *client) do(ctx context.Context, t txn) (*clientv3.TxnResponse, error) {
	ctx, cancel := c.deadline(ctx)
	defer cancel()
	r, err := c.Txn(ctx).If(t.when...).Then(t.then...).Else(t.els...).Commit()
	if err == nil && c.cluster != 0 && r.Header.ClusterId != c.cluster {
		return nil, final{fmt.Errorf("cluster %x answers at the endpoints of cluster %x", r.Header.ClusterId, c.cluster)}
	}
	return r, err
}

// voters checks how many members vote.
func (c *client) voters(ctx context.Context) error {
	ctx, cancel := c.deadline(ctx)
	defer cancel()
	r, err := c.MemberList(ctx)
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
		return final{fmt.Errorf("etcd with the members %s has %w", strings.Join(names, ", "), err)}
	}
	return nil
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
	case codes.InvalidArgument:
		return !errors.Is(err, rpctypes.ErrAuthOldRevision)
	case codes.PermissionDenied, codes.Unauthenticated, codes.DataLoss, codes.OutOfRange:
		return true
	}
	return false
}

// Waits between attempts, and the deadline of one call as a part of the TTL.
const (
	firstWait   = 10 * time.Millisecond
	longestWait = 250 * time.Millisecond
	callsPerTTL = 4
)

// retry repeats f until it succeeds, fails for good, or patience (0 = without end) is over.
func retry(ctx context.Context, patience time.Duration, f func() error) error {
	start := time.Now()
	for wait := firstWait; ; wait = min(2*wait, longestWait) {
		err := f()
		if err == nil || isFinal(err) || patience > 0 && time.Since(start) >= patience {
			return err
		}
		if !sleep(ctx, wait) {
			return ctx.Err()
		}
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
