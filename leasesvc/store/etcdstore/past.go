package etcdstore

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// past reads at one revision of etcd, which must not be compacted before the end.
type past struct {
	ctx      context.Context // of the one call that it serves
	c        *client
	patience time.Duration
	rev      int64
}

// get reads at the revision of the reader. What a member has at a past revision is what all have, so it need not ask the
// others.
func (p past) get(from, end string, opts ...clientv3.OpOption) (r *clientv3.GetResponse, err error) {
	opts = append(opts, clientv3.WithRange(end), clientv3.WithRev(p.rev), clientv3.WithSerializable())
	err = p.c.retry(p.ctx, p.patience, func(ctx context.Context) error {
		return p.c.use(func(m *clientv3.Client) error {
			r, err = m.Get(ctx, from, opts...)
			return err
		})
	})
	switch {
	case errors.Is(err, rpctypes.ErrCompacted):
		return nil, errors.New("etcd compacted its history meanwhile: let it keep more (--auto-compaction-retention)")
	case err != nil:
		return nil, fmt.Errorf("etcd: %w", err)
	}
	return r, nil
}

// scan yields the keys under a directory, without it, and their values.
func (p past) scan(dir string, yield func(key, value []byte) error) error {
	for from, end := dir, clientv3.GetPrefixRangeEnd(dir); ; {
		r, err := p.get(from, end, clientv3.WithLimit(page))
		if err != nil {
			return err
		}
		for _, kv := range r.Kvs {
			if err := yield(kv.Key[len(dir):], kv.Value); err != nil {
				return err
			}
		}
		if !r.More {
			return nil
		}
		from = string(r.Kvs[len(r.Kvs)-1].Key) + "\x00"
	}
}
