package etcdstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"

	"github.com/dstm-project/dstm/leasesvc/store/boltstore"
)

// tables are the directories of records, and what they are called in a store file.
func (k keys) tables() map[boltstore.Table]string {
	return map[boltstore.Table]string{
		boltstore.TableAddress: k.addresses, boltstore.TableAudit: k.audit, boltstore.TableIndex: k.index,
		boltstore.TableMember: k.members, boltstore.TablePool: k.pools,
	}
}

// Snapshot implements store.Store. What it writes is a store file as package boltstore keeps it, so that copies of both
// stores are checked and restored alike. It is made below Options.Scratch first, of one revision of etcd, which must not
// be compacted before the end.
func (s *Store) Snapshot(ctx context.Context, w io.Writer) error {
	if err := s.snapshot(ctx, w); err != nil {
		return fmt.Errorf("store: snapshot: %w", err)
	}
	return nil
}

func (s *Store) snapshot(ctx context.Context, w io.Writer) (err error) {
	if s.o.Scratch != "" {
		if err := os.MkdirAll(s.o.Scratch, 0o700); err != nil {
			return err
		}
	}
	dir, err := os.MkdirTemp(s.o.Scratch, "etcdstore-*.tmp")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	path := filepath.Join(dir, "copy.db")
	r, err := s.read(ctx, clientv3.OpGet(s.c.keys.head), clientv3.OpGet(s.c.keys.meta))
	if err != nil {
		return err
	}
	if err := s.c.export(ctx, s.o, r, path); err != nil {
		return err
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	_, err = io.Copy(w, f)
	return errors.Join(err, f.Close())
}

// export writes the records to a store file, at the revision at which head and meta, the first two responses, were read.
func (c *client) export(ctx context.Context, o Options, r *clientv3.TxnResponse, path string) error {
	hs, ms := r.Responses[0].GetResponseRange().GetKvs(), r.Responses[1].GetResponseRange().GetKvs()
	if len(hs) == 0 || len(ms) == 0 {
		return errors.New("head or meta record is missing")
	}
	m, err := decodeMeta(ms[0].Value, o.Cell, 0)
	if err != nil {
		return err
	}
	h, err := decodeHead(hs[0].Value)
	if err != nil {
		return err
	}
	meta := proto.CloneOf(m.Meta)
	meta.LastRev, meta.LastWall, meta.Restored, meta.Audit = h.msg.LastRev, h.msg.LastWall, h.msg.Restored, h.msg.Audit
	past := past{ctx: ctx, c: c, patience: o.TTL, rev: r.Header.Revision}
	return boltstore.Write(path, meta, func(put func(t boltstore.Table, k, v []byte) error) error {
		for t, dir := range c.keys.tables() {
			if err := past.scan(dir, func(k, v []byte) error { return put(t, k, v) }); err != nil {
				return err
			}
		}
		return nil
	})
}
