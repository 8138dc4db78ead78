package leasesvc_test

import (
	"context"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/dstm-project/dstm/internal/tlsid"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/leaseclient"
	"github.com/dstm-project/dstm/leasesvc/store"
)

// restoredStore is a store that says, until it is told otherwise, that it is a copy.
type restoredStore struct {
	store.Store
	recovered bool
}

func (r *restoredStore) Load(ctx context.Context) (store.State, error) {
	st, err := r.Store.Load(ctx)
	st.Restored, st.Epoch = true, st.Epoch+1
	return st, err
}

func (r *restoredStore) Commit(tx store.Tx) *store.Pending {
	r.recovered = r.recovered || tx.Recovered
	return r.Store.Commit(tx)
}

// TestRestore: a service over an old copy of its store leases nothing before every gateway has said what it holds. What was
// leased since the copy was made stays with its host, what had ended is nobody's.
func TestRestore(t *testing.T) {
	w := newWorld(t, onePool)
	w.stop()
	w.config = strings.NewReplacer("::1/128", "::/64").Replace(w.config)
	w.up()
	g1, g2 := w.gateway("tep1"), w.gateway("tep2")
	bindAt := func(name, source string) (leaseclient.Lease, error) {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		return w.client(tlsid.RoleHost, name).Bind(ctx, leaseclient.BindRequest{Source: netip.MustParseAddr(source), MTU: 1460})
	}
	must := func(l leaseclient.Lease, err error) leaseclient.Lease {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	stays, ends := must(bindAt("stays", "::2")), must(bindAt("ends", "::3"))
	w.stop()
	old, err := os.ReadFile(w.db)
	if err != nil {
		t.Fatal(err)
	}
	w.up()
	g1.connect()
	g2.connect()
	since := must(bindAt("since", "::4"))
	release(t, w.client(tlsid.RoleHost, "ends"), ends)
	w.stop()
	if err := os.WriteFile(w.db, old, 0o600); err != nil {
		t.Fatal(err)
	}

	copied := &restoredStore{}
	w.wrap = func(s store.Store) store.Store { copied.Store = s; return copied }
	w.up()
	early := w.client(tlsid.RoleHost, "since")
	eventually(t, "a host is refused before any gateway has spoken", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := early.Bind(ctx, leaseclient.BindRequest{Source: netip.MustParseAddr("::4")})
		if err == nil {
			t.Fatal("leased before any gateway has spoken")
		}
		return leaseclient.ReasonOf(err) == lease.ReasonDegradedStore && strings.Contains(err.Error(), "tep1, tep2")
	})
	if err := g1.attempt(); err == nil || !strings.Contains(err.Error(), "or until they are fenced: tep2") {
		t.Errorf("the first gateway: %v", err)
	}
	if copied.recovered {
		t.Fatal("complete without the second gateway")
	}
	if err := g2.attempt(); err == nil || !strings.Contains(err.Error(), "say hello once more") {
		t.Errorf("the second gateway: %v", err)
	}
	g1.connect()
	g2.connect()
	if got := must(bindAt("since", "::4")); got.Addr != since.Addr || got.Gen.Epoch() != 2 || !got.Installed {
		t.Errorf("leased after the copy: %+v, want %s under a new generation", got, since.Addr)
	}
	if got := must(bindAt("stays", "::2")); got.Addr != stays.Addr {
		t.Errorf("leased before the copy: %+v, want %s", got, stays.Addr)
	}
	if !copied.recovered {
		t.Error("the store was not told that it is complete again")
	}
	for _, g := range []*gateway{g1, g2} {
		if b := g.table[since.Resource]; b.Host != netip.MustParseAddr("::4") {
			t.Errorf("%s holds %+v", g.name, b)
		}
	}
}
