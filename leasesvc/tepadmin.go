package leasesvc

import (
	"context"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	leasev1 "github.com/dstm-project/dstm/api/lease/v1"
	"github.com/dstm-project/dstm/leasesvc/store"
)

// FenceTep implements the Operators service.
func (a operatorsAPI) FenceTep(ctx context.Context, m *leasev1.FenceTepRequest) (*leasev1.FenceTepReply, error) {
	s := a.s
	s.mu.Lock()
	err := s.fence.Order(m.GetId())
	s.mu.Unlock()
	if err != nil {
		return nil, status.Error(codes.FailedPrecondition, err.Error())
	}
	s.d.Log.Warn("gateway counts as off by an operator's word", "tep", m.GetId(), "operator", callerOf(ctx).id.Name)
	s.kick()
	s.acked.Broadcast()
	return &leasev1.FenceTepReply{}, nil
}

// RemoveTep implements the Operators service.
func (a operatorsAPI) RemoveTep(ctx context.Context, m *leasev1.RemoveTepRequest) (*leasev1.RemoveTepReply, error) {
	s := a.s
	s.mu.Lock()
	err := s.fence.Remove(s.now().Mono, m.GetId())
	var gone *store.Pending
	if err == nil {
		delete(s.caps, m.GetId())
		delete(s.resync, m.GetId())
		gone = s.d.Store.Commit(store.Tx{Removed: []string{m.GetId()}})
	}
	s.mu.Unlock()
	if err != nil {
		return nil, status.Error(codes.FailedPrecondition, err.Error())
	}
	if err := s.durable(ctx, gone); err != nil {
		return nil, undurable(err)
	}
	s.d.Log.Info("gateway removed from the fence set", "tep", m.GetId(), "operator", callerOf(ctx).id.Name)
	return &leasev1.RemoveTepReply{}, nil
}
