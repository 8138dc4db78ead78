package tepd

import (
	"context"

	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/leaseclient"
)

// Client makes a Service of a connection.
type Client struct{ *leaseclient.Conn }

// Sync opens a stream and says Hello.
func (c Client) Sync(ctx context.Context, hello func() lease.Hello) (Stream, error) {
	s, err := c.Conn.Sync(ctx, hello)
	if err != nil {
		return nil, err
	}
	return s, nil
}
