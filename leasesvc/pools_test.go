package leasesvc_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/dstm-project/dstm/internal/tlsid"
	"github.com/dstm-project/dstm/leasesvc/leaseclient"
)

// TestPools: three hosts bind and one gives back; the operator sees how full the pool is, was, and how it is used.
func TestPools(t *testing.T) {
	w := newWorld(t, onePool)
	w.gateway("tep1")
	attend(t, w.client(tlsid.RoleHost, "host0"))
	for i := range 3 {
		h := w.client(tlsid.RoleHost, fmt.Sprint("host", i))
		if l := bind(t, h); i == 2 {
			release(t, h, l)
		}
	}
	op := w.client(tlsid.RoleOperator, "noc")
	var p leaseclient.PoolInfo
	eventually(t, "the released address is fenced, held down and free", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		ps, err := op.Pools(ctx)
		if err != nil {
			t.Fatal(err)
		}
		p = ps[0]
		return p.Free == p.Size-2
	})
	want := leaseclient.PoolInfo{Size: 254, Bound: 2, Free: 252, Peak: 3, PeakDay: 3, Binds: 3, Ends: 1, Hosts: 1}
	if diff := cmp.Diff(want, p, cmpopts.IgnoreFields(leaseclient.PoolInfo{}, "Pool", "Window", "Mean")); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if p.Window <= 0 || p.Window > time.Hour || p.Mean <= 0 || p.Mean > 3 {
		t.Errorf("window %s, mean %g: want some time, and more than nothing", p.Window, p.Mean)
	}
}
