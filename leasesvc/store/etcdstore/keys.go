package etcdstore

import (
	"strings"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/store/record"
)

// keys are the keys of one cell, below its prefix.
type keys struct {
	prefix                                  string
	meta, head, owner, restoring            string
	addresses, audit, index, members, pools string
}

func newKeys(prefix string) keys {
	p := strings.TrimSuffix(prefix, "/") + "/"
	return keys{
		prefix: p, meta: p + "meta", head: p + "head", owner: p + "owner", restoring: p + "restoring",
		addresses: p + "address/", audit: p + "audit/", index: p + "audit-index/", members: p + "member/", pools: p + "pool/",
	}
}

func (k keys) address(r lease.Resource) string { return k.addresses + string(record.ResourceKey(r)) }
func (k keys) member(id string) string         { return k.members + id }
func (k keys) pool(name string) string         { return k.pools + name }

// rangeOf returns the reading of all keys under a directory.
func rangeOf(dir string, opts ...clientv3.OpOption) clientv3.Op {
	return clientv3.OpGet(dir, append(opts, clientv3.WithPrefix())...)
}
