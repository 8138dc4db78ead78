package leasesvc_test

import (
	"context"
	"strings"
	"testing"

	"github.com/dstm-project/dstm/internal/tlsid"
)

// TestGatewayOffForGood: an address waits for a gateway that is gone, until an operator gives his word that it is off.
func TestGatewayOffForGood(t *testing.T) {
	w := newWorld(t, oneAddress)
	w.gateway("tep1")
	g2 := w.gateway("tep2")
	op := w.client(tlsid.RoleOperator, "noc")
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	h1, h2 := w.client(tlsid.RoleHost, "host1"), w.client(tlsid.RoleHost, "host2")
	l := bind(t, h1)
	if err := op.FenceTEP(ctx, "tep2"); err == nil || !strings.Contains(err.Error(), "has a live stream: it is not off") {
		t.Errorf("fence of a gateway with a stream: %v", err)
	}
	g2.stop()
	release(t, h1, l)
	eventually(t, "the stream's end is seen", func() bool { return op.FenceTEP(ctx, "tep2") == nil })
	eventually(t, "host2 gets the address", func() bool {
		got, err := tryBind(t, h2)
		return err == nil && got.Addr == l.Addr
	})
	if err := op.RemoveTEP(ctx, "tep1"); err == nil || !strings.Contains(err.Error(), "has a live stream") {
		t.Errorf("removal of a gateway that works: %v", err)
	}
	if err := op.RemoveTEP(ctx, "tep2"); err != nil {
		t.Fatal(err)
	}
	listed := func() string {
		ts, err := op.TEPs(ctx)
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, x := range ts {
			names = append(names, x.ID)
		}
		return strings.Join(names, " ")
	}
	if got := listed(); got != "tep1" {
		t.Errorf("gateways %q after the removal", got)
	}
	w.stop()
	w.up()
	op = w.client(tlsid.RoleOperator, "noc")
	if got := listed(); got != "tep1" {
		t.Errorf("gateways %q after a restart", got)
	}
}
