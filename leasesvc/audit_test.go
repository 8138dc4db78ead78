package leasesvc_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/dstm-project/dstm/internal/tlsid"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/leaseclient"
	"github.com/dstm-project/dstm/leasesvc/store/boltstore"
)

// exported reads a range of the audit log.
func exported(t *testing.T, c *leaseclient.Conn, r leaseclient.AuditRange) []leaseclient.AuditEvent {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var out []leaseclient.AuditEvent
	err := c.AuditExport(ctx, r, func(ev leaseclient.AuditEvent) error { out = append(out, ev); return nil })
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// lifetime binds a lease, gives it back and waits for the fence.
func lifetime(t *testing.T, h, op *leaseclient.Conn) leaseclient.Holding {
	t.Helper()
	l := bind(t, h)
	release(t, h, l)
	var was leaseclient.Holding
	eventually(t, "the lease is fenced", func() bool {
		who, err := op.Who(t.Context(), l.Addr, 0, time.Time{})
		if err != nil || len(who) == 0 || who[0].Gen != l.Gen {
			t.Fatalf("who %+v, %v, want the lease %s", who, err, l.Ref)
		}
		was = who[0]
		return !was.Fenced.IsZero()
	})
	return was
}

// TestAuditExport: an export has the three events of a lease as they are recorded, goes on where another ended, keeps to
// its times and, if asked, follows.
func TestAuditExport(t *testing.T) {
	w := newWorld(t, oneAddress)
	w.gateway("tep1")
	h, op := w.client(tlsid.RoleHost, "host1"), w.client(tlsid.RoleOperator, "noc")
	first := lifetime(t, h, op)
	evs := exported(t, op, leaseclient.AuditRange{})
	want := []leaseclient.AuditEvent{
		{Rev: first.Gen.Rev(), Kind: "bound", At: first.Bound, Ref: first.Ref, HostID: "host1", Host: loopback, TEP: first.TEP, Trigger: lease.TriggerPacket},
		{Kind: "unbound", At: first.Unbound, Ref: first.Ref, End: lease.ReasonIdle},
		{Kind: "fenced", At: first.Fenced, Ref: first.Ref},
	}
	same := cmp.Options{cmpopts.IgnoreFields(leaseclient.AuditEvent{}, "Chain"), cmpopts.EquateComparable(netip.Addr{})}
	if len(evs) == 3 {
		want[1].Rev, want[2].Rev = evs[1].Rev, evs[2].Rev
	}
	if d := cmp.Diff(want, evs, same); d != "" || !first.TEP.Is6() {
		t.Fatal(d)
	}
	second := lifetime(t, h, op)
	for name, c := range map[string]struct {
		r    leaseclient.AuditRange
		want []string
	}{
		"on":   {leaseclient.AuditRange{After: evs[2].Rev}, []string{"bound", "unbound", "fenced"}},
		"from": {leaseclient.AuditRange{From: second.Unbound}, []string{"unbound", "fenced"}},
		"to":   {leaseclient.AuditRange{From: first.Fenced, To: second.Unbound}, []string{"fenced", "bound"}},
		"none": {leaseclient.AuditRange{From: time.Now().Add(time.Hour)}, nil},
	} {
		var got []string
		for _, ev := range exported(t, op, c.r) {
			got = append(got, ev.Kind)
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
	follow(t, w, op)
}

// follow reads on while a lease is bound.
func follow(t *testing.T, w *world, op *leaseclient.Conn) {
	t.Helper()
	enough := errors.New("enough")
	all := exported(t, op, leaseclient.AuditRange{})
	got, done := make(chan leaseclient.AuditEvent, 8), make(chan error, 1)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	go func() {
		done <- op.AuditExport(ctx, leaseclient.AuditRange{After: all[len(all)-2].Rev, Follow: true}, func(ev leaseclient.AuditEvent) error {
			if got <- ev; ev.Kind == "bound" {
				return enough
			}
			return nil
		})
	}()
	if ev := <-got; ev.Rev != all[len(all)-1].Rev || !bytes.Equal(ev.Chain, all[len(all)-1].Chain) {
		t.Errorf("first of those followed %+v, want the last before them %+v", ev, all[len(all)-1])
	}
	l := bind(t, w.client(tlsid.RoleHost, "host1"))
	if err := <-done; !errors.Is(err, enough) {
		t.Fatal(err)
	}
	if ev := <-got; ev.Ref != l.Ref {
		t.Errorf("followed %+v, want the bind of %s", ev, l.Ref)
	}
}

// TestRetention: a lease is forgotten some time after its fence, one that lives is not.
func TestRetention(t *testing.T) {
	w := newWorld(t, "pools: [{name: main, prefix: 198.51.100.8/31, tep_address: \"2001:db8:a::1\"}]\naudit: {retention: 1s}\n")
	w.gateway("tep1")
	op := w.client(tlsid.RoleOperator, "noc")
	live := bind(t, w.client(tlsid.RoleHost, "host1"))
	was := lifetime(t, w.client(tlsid.RoleHost, "host2"), op)
	eventually(t, "the lease is forgotten", func() bool {
		who, err := op.Who(t.Context(), was.Addr, 0, time.Time{})
		if err != nil {
			t.Fatal(err)
		}
		return len(who) == 0
	})
	if who, err := op.Who(t.Context(), live.Addr, 443, time.Now()); err != nil || len(who) != 1 || who[0].HostID != "host1" {
		t.Errorf("who has %s: %+v, %v, want host1", live.Addr, who, err)
	}
}

// TestBackup: a backup of the running service is a store with everything in it.
func TestBackup(t *testing.T) {
	w := newWorld(t, oneAddress)
	w.gateway("tep1")
	op := w.client(tlsid.RoleOperator, "noc")
	l := bind(t, w.client(tlsid.RoleHost, "host1"))
	file := filepath.Join(t.TempDir(), "backup.db")
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	r, err := boltstore.Receive(file, func(out io.Writer) error { return op.Backup(ctx, out) })
	if err != nil || r.Addresses[lease.Bound] != 1 || r.Last < l.Gen.Rev() || r.Leases != 1 {
		t.Fatalf("%+v, %v", r, err)
	}
	left, err := os.ReadDir(filepath.Join(filepath.Dir(w.db), "copies"))
	if err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	if err := w.client(tlsid.RoleHost, "host1").Backup(ctx, io.Discard); leaseclient.ReasonOf(err) != lease.ReasonNotAllowed {
		t.Errorf("backup by a host: %v, want a refusal", err)
	}
}
