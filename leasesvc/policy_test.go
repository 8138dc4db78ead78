package leasesvc_test

import (
	"context"
	"log/slog"
	"strings"
	"testing"

	"github.com/dstm-project/dstm/internal/tlsid"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc"
	"github.com/dstm-project/dstm/leasesvc/leaseclient"
	"github.com/dstm-project/dstm/leasesvc/policy"
)

// TestPolicy: what a policy denies is refused with its reason; it is asked about new leases alone.
func TestPolicy(t *testing.T) {
	w := newWorld(t, onePool)
	w.stop()
	w.config += `policy:
  rules: [{action: deny, name: guests, hosts: ["guest*"], reason: "guests have no IPv4"}]
  quotas: {per_host: {binds: 1, window: 1h}}
`
	cfg, err := leasesvc.ParseConfig("test.yaml", []byte(w.config))
	if err != nil {
		t.Fatal(err)
	}
	w.upWith(leasesvc.Deps{Policy: policy.New(cfg.Policy, policy.Deps{Log: slog.New(slog.DiscardHandler)})})
	w.gateway("tep1")
	if _, err := tryBind(t, w.client(tlsid.RoleHost, "guest1")); leaseclient.ReasonOf(err) != lease.ReasonPolicy || !strings.Contains(err.Error(), "guests have no IPv4") {
		t.Errorf("a guest: %v", err)
	}
	h := w.client(tlsid.RoleHost, "host1")
	l := bind(t, h)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for range 3 { // the quota of one new lease an hour is spent
		if got := bind(t, h); got.Ref != l.Ref {
			t.Errorf("bind of a holder gave %s, want %s", got.Ref, l.Ref)
		}
		if _, err := h.Renew(ctx, leaseclient.RenewRequest{Ref: l.Ref, Source: loopback}); err != nil {
			t.Error(err)
		}
	}
	release(t, h, l)
	if _, err := tryBind(t, h); leaseclient.ReasonOf(err) != lease.ReasonPolicy {
		t.Errorf("a second lease within the hour: %v", err)
	}
}
