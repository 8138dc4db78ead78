package main

import (
	"context"
	"net/netip"
	"time"

	"github.com/dstm-project/dstm/lease"
)

// operator is what the lease service does for operators.
type operator interface {
	Leases(ctx context.Context, pool string) ([]leaseView, error)
	Who(ctx context.Context, addr netip.Addr, port uint16, at time.Time) ([]holdingView, error)
	Pools(ctx context.Context) ([]poolView, error)
	TEPs(ctx context.Context) ([]tepView, error)
	Revoke(ctx context.Context, ref lease.Ref) error
	Close() error
}

// The views are the JSON of the tool: field names are part of the schema "dstm.NAME/1".
type (
	leaseView struct {
		Addr    string     `json:"addr"`
		Gen     string     `json:"gen"`
		State   string     `json:"state"`
		Host    string     `json:"host"`
		Source  string     `json:"source"`
		Pool    string     `json:"pool"`
		LeftMS  int64      `json:"left_ms"`
		Bound   *time.Time `json:"bound,omitempty"`
		Waiting []string   `json:"waiting,omitempty"`
	}
	holdingView struct {
		Addr    string     `json:"addr"`
		Gen     string     `json:"gen"`
		Host    string     `json:"host"`
		Source  string     `json:"source"`
		Bound   *time.Time `json:"bound,omitempty"`
		Unbound *time.Time `json:"unbound,omitempty"`
		Fenced  *time.Time `json:"fenced,omitempty"`
		End     string     `json:"end,omitempty"`
	}
	poolView struct {
		Name     string `json:"name"`
		Prefix   string `json:"prefix"`
		TEP      string `json:"tep"`
		Size     uint32 `json:"size"`
		Bound    uint32 `json:"bound"`
		Revoking uint32 `json:"revoking"`
		HeldDown uint32 `json:"held_down"`
		Free     uint32 `json:"free"`
	}
	tepView struct {
		ID         string `json:"id"`
		Connected  bool   `json:"connected"`
		Serving    bool   `json:"serving"`
		Session    uint64 `json:"session"`
		AckedRev   uint64 `json:"acked_rev"`
		HeadRev    uint64 `json:"head_rev"`
		DeadlineMS int64  `json:"deadline_left_ms"`
	}
)
