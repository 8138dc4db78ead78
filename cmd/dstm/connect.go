package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/dstm-project/dstm/internal/tlsid"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/leaseclient"
)

// operator is what the lease service does for operators; a leaseclient.Conn is one.
type operator interface {
	Leases(ctx context.Context, pool string) ([]leaseclient.LeaseInfo, error)
	Who(ctx context.Context, addr netip.Addr, port uint16, at time.Time) ([]leaseclient.Holding, error)
	Pools(ctx context.Context) ([]leaseclient.PoolInfo, error)
	TEPs(ctx context.Context) ([]leaseclient.TEPInfo, error)
	Revoke(ctx context.Context, ref lease.Ref) error
	FenceTEP(ctx context.Context, id string) error
	RemoveTEP(ctx context.Context, id string) error
	archive
}

// archive is what is taken out of the lease service to be kept elsewhere.
type archive interface {
	AuditExport(ctx context.Context, r leaseclient.AuditRange, yield func(leaseclient.AuditEvent) error) error
	Backup(ctx context.Context, w io.Writer) error
}

// connect prepares the calls of an operator; the returned function ends them.
func connect(c *Config) (operator, func() error, error) {
	s := c.LeaseService
	src, err := tlsid.Open(s.TLS, tlsid.RoleOperator, slog.New(slog.DiscardHandler))
	if err != nil {
		return nil, nil, err
	}
	conn, err := leaseclient.New(leaseclient.Options{Servers: s.Servers, TLS: src.Client(s.Name)})
	if err != nil {
		return nil, nil, err
	}
	return conn, conn.Close, nil
}

// sentence says a failed call as a person would.
func sentence(err error) error {
	var refusal *leaseclient.Error
	var rpc interface{ GRPCStatus() *status.Status }
	switch {
	case err == nil:
		return nil
	case errors.As(err, &refusal):
		return err
	case errors.Is(err, context.DeadlineExceeded):
		return errors.New("lease service does not answer in time; see --timeout")
	case !errors.As(err, &rpc):
		return err
	}
	switch st := rpc.GRPCStatus(); st.Code() {
	case codes.Unavailable:
		return fmt.Errorf("lease service cannot be reached: %s", st.Message())
	case codes.DeadlineExceeded:
		return errors.New("lease service does not answer in time; see --timeout")
	default:
		return fmt.Errorf("lease service: %s", st.Message())
	}
}
