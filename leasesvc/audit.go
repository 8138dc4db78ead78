package leasesvc

import (
	"context"

	leasev1 "github.com/dstm-project/dstm/api/lease/v1"
	"github.com/dstm-project/dstm/internal/wire"
	"github.com/dstm-project/dstm/lease"
)

// maxHistory bounds a reply that asks for the whole history of an address.
const maxHistory = 1000

// Who implements the Operators service.
func (a operatorsAPI) Who(ctx context.Context, m *leasev1.WhoRequest) (*leasev1.WhoReply, error) {
	rep := &leasev1.WhoReply{}
	err := a.s.d.Store.History(ctx, wire.Addr4(m.GetAddr()), wire.Time(m.GetAtUnixMs()), func(h lease.Audit) bool {
		rep.Holdings = append(rep.Holdings, &leasev1.Holding{
			HostId: h.Host, Host: wire.FromAddr6(h.Source), Res: wire.FromResource(h.Resource), Gen: uint64(h.Gen),
			BoundMs: wire.FromTime(h.Bound), UnboundMs: wire.FromTime(h.Unbound), FencedMs: wire.FromTime(h.Fenced),
			End: wire.FromReason(h.End),
		})
		return len(rep.Holdings) < maxHistory
	})
	if err != nil {
		return nil, undurable(err)
	}
	return rep, nil
}
