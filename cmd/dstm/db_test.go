package main

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dstm-project/dstm/internal/daemon"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/leaseclient"
	"github.com/dstm-project/dstm/leasesvc/store"
	"github.com/dstm-project/dstm/leasesvc/store/boltstore"
)

// newStore makes a store with n leases and returns its path.
func newStore(t *testing.T, dir string, n int) string {
	t.Helper()
	path := filepath.Join(dir, "lease.db")
	if err := boltstore.Create(path); err != nil {
		t.Fatal(err)
	}
	s := openStore(t, path)
	for i := range n {
		rev := lease.Rev(i + 1)
		a := lease.Address{
			Resource: lease.Whole(netip.AddrFrom4([4]byte{198, 51, 100, byte(i)})), State: lease.Bound, Gen: lease.MakeGen(1, rev), Rev: rev,
			Host: fmt.Sprint("host", i), Source: host1, TEP: tepAddr, BoundAt: noon.Add(time.Duration(i) * time.Second), Valid: time.Hour,
		}
		commitAddress(t, s, a)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

func openStore(t *testing.T, path string) *boltstore.Store {
	t.Helper()
	s, err := boltstore.Open(boltstore.Options{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func commitAddress(t *testing.T, s *boltstore.Store, a lease.Address) {
	t.Helper()
	tx := store.Tx{Commits: []lease.Commit{{Rev: a.Rev, Address: a, Audit: a.Audit()}}, Wall: noon}
	if err := s.Commit(tx).Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// events are the audit log of a store as the lease service sends it.
func events(t *testing.T, path string) (out []leaseclient.AuditEvent) {
	t.Helper()
	_, err := boltstore.Check(path, func(ev store.AuditEvent) error {
		out = append(out, leaseclient.AuditEvent{
			Rev: ev.Rev, Kind: ev.Kind.String(), At: ev.At, Ref: ev.Ref, HostID: ev.Host, Host: ev.Source, TEP: ev.TEP, Trigger: ev.Trigger,
			End: ev.End, Chain: ev.Chain[:],
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestBackup(t *testing.T) {
	dir := t.TempDir()
	path, file := newStore(t, dir, 3), filepath.Join(dir, "backup.db")
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	f := &fake{backup: func(w io.Writer) error { _, err := w.Write(whole); return err }}
	server := []string{"--server", "[2001:db8:2::10]:3545"}
	out, err := dstm(t, f, append(server, "db", "backup", "-o", file)...)
	if err != nil || !strings.HasPrefix(out, file+": backup is whole: epoch 1, revision 3 of 2026-01-02T12:00:00Z, addresses: 3 BOUND; audit log: 3 leases since 2026-01-02T12:00:00Z") {
		t.Fatalf("%q, %v", out, err)
	}
	for name, backup := range map[string]func(io.Writer) error{
		"cut":     func(w io.Writer) error { _, err := w.Write(whole[:9000]); return err },
		"refused": func(io.Writer) error { return errors.New("a backup is under way") },
	} {
		if out, err := dstm(t, &fake{backup: backup}, append(server, "db", "backup", "-o", file)...); err == nil {
			t.Errorf("%s: %q and no error", name, out)
		}
		if out, err := dstm(t, f, "db", "check", file); err != nil || !strings.Contains(out, "store is whole: epoch 1, revision 3") {
			t.Errorf("%s: the file before it: %q, %v", name, out, err)
		}
		if left, err := filepath.Glob(filepath.Join(dir, "*.tmp")); err != nil || len(left) != 0 {
			t.Errorf("%s: left %v, %v", name, left, err)
		}
	}
	if _, err := dstm(t, f, append(server, "db", "backup")...); daemon.ExitCode(err) != daemon.ExitUsage {
		t.Errorf("no file: %v", err)
	}
}

// config writes the configuration of a lease service with a store.
func serviceYAML(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile("../../deploy/leasesvc.yaml")
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(filepath.Dir(path), "leasesvc.yaml")
	text := strings.ReplaceAll(string(b), "/var/lib/dstm/lease.db", path)
	text = strings.ReplaceAll(text, "/var/lib/dstm/copies", filepath.Join(filepath.Dir(path), "copies"))
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestRestore(t *testing.T) {
	dir := t.TempDir()
	path := newStore(t, dir, 3)
	file, yaml := filepath.Join(dir, "backup.db"), serviceYAML(t, path)
	whole, err := os.ReadFile(path)
	if err == nil {
		err = os.WriteFile(file, whole, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	s := openStore(t, path)
	if _, err := dstm(t, nil, "db", "restore", file, "-c", yaml); err == nil || !strings.Contains(err.Error(), "is the service still running?") {
		t.Errorf("while the store is open: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	out, err := dstm(t, nil, "db", "restore", file, "-c", yaml)
	if err != nil || !strings.Contains(out, path+": kept as "+path+".replaced-20260102T120000.000Z\n") || !strings.Contains(out, "restored from "+file+": epoch 2, revision 3") {
		t.Fatalf("%q, %v", out, err)
	}
	other := newStore(t, t.TempDir(), 1)
	if _, err := dstm(t, nil, "db", "restore", other, "-c", yaml); err == nil || !strings.Contains(err.Error(), "the store in place is of cluster") {
		t.Errorf("store of another cluster: %v", err)
	}
}

func TestAuditExport(t *testing.T) {
	path := newStore(t, t.TempDir(), 3)
	f := &fake{events: events(t, path)}
	server := []string{"--server", "[2001:db8:2::10]:3545"}
	out, err := dstm(t, f, append(server, "audit", "export", "--after", "7", "--from", "1h", "--to", "12:00:00")...)
	want := leaseclient.AuditRange{After: 7, From: noon.Add(-time.Hour), To: noon}
	if err != nil || f.asked != want {
		t.Fatalf("asked for %+v, want %+v: %v", f.asked, want, err)
	}
	lines := strings.Split(strings.TrimSpace(out), "\n")
	begin := `{"schema":"dstm.audit/1","rev":1,"time":"2026-01-02T12:00:00Z","event":"bound","addr":"198.51.100.0","gen":"1.1",` +
		`"host":"host0","source":"2001:db8:1::a","tep":"2001:db8:a::1","trigger":"unspecified","chain":"`
	if len(lines) != 3 || !strings.HasPrefix(lines[0], begin) {
		t.Errorf("got %s\nwant three lines, the first of which begins %s", out, begin)
	}
	if _, err := dstm(t, f, append(server, "audit", "export", "--follow", "--to", "12:00:00")...); daemon.ExitCode(err) != daemon.ExitUsage {
		t.Errorf("--follow with --to: %v", err)
	}
}

func TestAuditVerify(t *testing.T) {
	dir := t.TempDir()
	path, export := newStore(t, dir, 3), filepath.Join(dir, "export.jsonl")
	f := &fake{events: events(t, path)}
	lines, err := dstm(t, f, "--server", "[2001:db8:2::10]:3545", "audit", "export")
	if err != nil {
		t.Fatal(err)
	}
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(export, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(lines)
	out, err := dstm(t, f, "audit", "verify", path, "--export", export)
	if err != nil || !strings.Contains(out, "audit log is whole: 3 events of 3 leases") || !strings.Contains(out, ": 3 lines are of this log") {
		t.Errorf("%q, %v", out, err)
	}
	other := newStore(t, t.TempDir(), 4) // the same leases, and others after them
	s := openStore(t, other)
	a := lease.Address{Resource: lease.Whole(netip.MustParseAddr("198.51.100.9")), State: lease.Bound, Gen: lease.MakeGen(1, 5), Rev: 5, Host: "late", BoundAt: noon.Add(time.Hour)}
	commitAddress(t, s, a)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if out, err := dstm(t, f, "audit", "verify", other, "--export", export); err != nil || !strings.Contains(out, ": 3 lines") {
		t.Errorf("a later copy: %q, %v", out, err)
	}
	first, rest, _ := strings.Cut(lines, "\n")
	chain := fmt.Sprintf("%x", f.events[1].Chain)
	for name, c := range map[string]struct{ text, want string }{
		"another chain": {strings.Replace(lines, chain, strings.Repeat("0", 32), 1), "exported line 2 has the chain 0000"},
		"later":         {lines + strings.Replace(first, `"rev":1`, `"rev":9`, 1) + "\n", "exported line 9 is not in the log"},
		"out of order":  {rest + first + "\n", "exported line 1 behind 3"},
		"no lines":      {"not JSON\n", "export behind line 0"},
	} {
		write(c.text)
		if out, err := dstm(t, f, "audit", "verify", path, "--export", export); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %q, %v, want %s", name, out, err, c.want)
		}
	}
}
