package etcdstore

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"math"
	"strings"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"
)

// A copy is its first line, each key (without the prefix) and value with their lengths as varints, an empty key, and the
// SHA-256 of all that.
const copyHeader = "dstm etcdstore copy 1\n"

// maxField bounds what a damaged length can make Restore read, far above any record.
const maxField = 1 << 20

// Snapshot implements store.Store. What it writes is for Restore: the records of this cell at one revision of etcd,
// which must not be compacted before the end.
func (s *Store) Snapshot(ctx context.Context, w io.Writer) error {
	if err := s.snapshot(ctx, w); err != nil {
		return fmt.Errorf("store: snapshot: %w", err)
	}
	return nil
}

func (s *Store) snapshot(ctx context.Context, w io.Writer) error {
	sum := sha256.New()
	b := bufio.NewWriter(io.MultiWriter(w, sum))
	_, _ = b.WriteString(copyHeader) // errors stay until Flush
	k := s.c.keys
	end := clientv3.WithRange(clientv3.GetPrefixRangeEnd(k.prefix))
	rev := int64(0) // of the first page
	for from := k.prefix; from != ""; {
		r, err := s.read(ctx, clientv3.OpGet(from, end, clientv3.WithLimit(page), clientv3.WithRev(rev)))
		if errors.Is(err, rpctypes.ErrCompacted) {
			return errors.New("etcd compacted its history meanwhile: let it keep more (--auto-compaction-retention)")
		} else if err != nil {
			return err
		}
		if rev == 0 {
			rev = r.Header.Revision
		}
		rr := r.Responses[0].GetResponseRange()
		from = ""
		for _, kv := range rr.Kvs {
			key := string(kv.Key)
			if rr.More {
				from = key + "\x00"
			}
			if key != k.owner {
				writeField(b, []byte(strings.TrimPrefix(key, k.prefix)))
				writeField(b, kv.Value)
			}
		}
	}
	writeField(b, nil)
	if err := b.Flush(); err != nil {
		return err
	}
	_, err := w.Write(sum.Sum(nil))
	return err
}

func writeField(b *bufio.Writer, field []byte) {
	_, _ = b.Write(binary.AppendUvarint(nil, uint64(len(field))))
	_, _ = b.Write(field)
}

// Restore makes a store of a copy, under the next epoch and marked as restored. It refuses to replace a store; what an
// earlier attempt left half done it removes.
func Restore(ctx context.Context, o Options, from io.Reader) error {
	if err := o.defaults(); err != nil {
		return err
	}
	c, err := dial(o)
	if err != nil {
		return err
	}
	defer c.Close()
	var t tenure
	err = c.retry(ctx, o.TTL, func(ctx context.Context) (err error) {
		if err := c.voters(ctx); err != nil {
			return err
		}
		var holder string
		if t, holder, err = c.take(ctx, o); err == nil && holder != "" {
			err = final{fmt.Errorf("store %s in etcd is owned by %s: it is not replaced", c.keys.prefix, holder)}
		}
		return err
	})
	if err != nil {
		return err
	}
	err = c.restore(ctx, o, t, from)
	return errors.Join(err, c.revoke(t.lease))
}

// restorer writes under the prefix as long as it owns the cell and there is no store. The two records that make one come
// last, together, after the copy was found whole.
type restorer struct {
	c     *client
	o     Options
	lease clientv3.LeaseID
	when  []clientv3.Cmp
	ops   []clientv3.Op
}

func (c *client) restore(ctx context.Context, o Options, t tenure, from io.Reader) error {
	k := c.keys
	w := &restorer{c: c, o: o, lease: t.lease, when: []clientv3.Cmp{
		clientv3.Compare(clientv3.CreateRevision(k.owner), "=", t.rev),
		clientv3.Compare(clientv3.CreateRevision(k.meta), "=", 0),
	}}
	for _, dir := range []string{k.addresses, k.audit, k.index, k.members, k.pools} {
		w.ops = append(w.ops, clientv3.OpDelete(dir, clientv3.WithPrefix()))
	}
	if err := w.flush(ctx); err != nil {
		return err
	}
	var meta, first []byte
	err := readCopy(from, func(key string, value []byte) error {
		switch full := k.prefix + key; full {
		case k.meta:
			meta = value
		case k.head:
			first = value
		default:
			w.ops = append(w.ops, clientv3.OpPut(full, string(value)))
		}
		if len(w.ops) < maxPuts {
			return nil
		}
		return w.flush(ctx)
	})
	if err != nil {
		return err
	}
	if err := w.flush(ctx); err != nil {
		return err
	}
	return w.finish(ctx, meta, first)
}

// finish makes what was written a store.
func (w *restorer) finish(ctx context.Context, meta, first []byte) error {
	r, err := w.do(ctx, txn{then: []clientv3.Op{clientv3.OpGet(w.c.keys.meta)}})
	if err != nil {
		return err
	}
	m, err := decodeMeta(meta, w.o.Cell, 0)
	if err != nil {
		return fmt.Errorf("copy: %w", err)
	}
	if m.Meta.Epoch >= math.MaxUint16 {
		return fmt.Errorf("copy: epoch %d is the last one", m.Meta.Epoch)
	}
	m.Meta.Epoch++
	m.EtcdCluster = r.Header.ClusterId
	h, err := decodeHead(first)
	if err != nil {
		return fmt.Errorf("copy: %w", err)
	}
	h.msg.Restored = true
	if h, err = newHead(h.msg); err != nil {
		return err
	}
	b, err := proto.Marshal(m)
	if err != nil {
		return err
	}
	w.ops = []clientv3.Op{clientv3.OpPut(w.c.keys.meta, string(b)), clientv3.OpPut(w.c.keys.head, h.value)}
	return w.flush(ctx)
}

func (w *restorer) do(ctx context.Context, t txn) (*clientv3.TxnResponse, error) {
	ctx, cancel := w.c.deadline(ctx)
	defer cancel()
	return w.c.do(ctx, t)
}

// flush writes what was collected. It renews the etcd lease before, for a copy may take longer than the TTL.
func (w *restorer) flush(ctx context.Context) error {
	if len(w.ops) == 0 {
		return nil
	}
	try, cancel := w.c.deadline(ctx)
	err := w.c.renew(try, w.lease)
	cancel()
	if err != nil {
		return err
	}
	r, err := w.do(ctx, txn{when: w.when, then: w.ops})
	if err != nil {
		return err
	}
	if !r.Succeeded {
		return fmt.Errorf("store %s exists in etcd, or another service makes one: it is not replaced", w.c.keys.prefix)
	}
	w.ops = w.ops[:0]
	return nil
}

// readCopy yields keys and values, and returns an error unless the copy is whole.
func readCopy(from io.Reader, yield func(key string, value []byte) error) error {
	r := &copyReader{r: bufio.NewReader(from), sum: sha256.New()}
	head := make([]byte, len(copyHeader))
	if _, err := io.ReadFull(r, head); err != nil || string(head) != copyHeader {
		return errors.New("copy: this is no copy of a store in etcd")
	}
	for {
		key, err := r.field()
		if err != nil {
			return fmt.Errorf("copy is damaged: %w", err)
		}
		if len(key) == 0 {
			break
		}
		value, err := r.field()
		if err != nil {
			return fmt.Errorf("copy is damaged: %w", err)
		}
		if err := yield(string(key), value); err != nil {
			return err
		}
	}
	want := r.sum.Sum(nil)
	got := make([]byte, len(want))
	if _, err := io.ReadFull(r, got); err != nil || string(got) != string(want) {
		return errors.New("copy is damaged: its checksum is wrong")
	}
	return nil
}

// copyReader sums up what it reads.
type copyReader struct {
	r   *bufio.Reader
	sum hash.Hash
}

func (c *copyReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.sum.Write(p[:n])
	return n, err
}

// ReadByte implements io.ByteReader.
func (c *copyReader) ReadByte() (byte, error) {
	b, err := c.r.ReadByte()
	if err == nil {
		c.sum.Write([]byte{b})
	}
	return b, err
}

func (c *copyReader) field() ([]byte, error) {
	n, err := binary.ReadUvarint(c)
	if err != nil {
		return nil, err
	}
	if n > maxField {
		return nil, fmt.Errorf("field of %d bytes", n)
	}
	b := make([]byte, n)
	_, err = io.ReadFull(c, b)
	return b, err
}
