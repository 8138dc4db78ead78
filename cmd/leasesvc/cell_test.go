package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/dstm-project/dstm/internal/daemon"
	"github.com/dstm-project/dstm/internal/pki"
	"github.com/dstm-project/dstm/internal/tlsid"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/lease/replica"
	"github.com/dstm-project/dstm/leasesvc/leaseclient"
	"github.com/dstm-project/dstm/leasesvc/store/etcdstore/etcdtest"
)

// serviceEnv makes a child process of the test a lease service with these arguments.
const serviceEnv = "DSTM_TEST_LEASESVC"

func TestMain(m *testing.M) {
	etcdtest.Main()
	if args, ok := os.LookupEnv(serviceEnv); ok {
		daemon.Main("leasesvc", func(ctx context.Context, _ []string) error {
			return run(ctx, strings.Fields(args), os.Stdout, os.Stderr)
		})
	}
	os.Exit(m.Run())
}

const patience = 60 * time.Second

// world is an etcd of three members and the files of two lease services.
type world struct {
	t        *testing.T
	etcd     *etcdtest.Cluster
	dir      string
	services []*service
}

// service is a lease service in a process of its own.
type service struct {
	name, config  string
	listen, admin string
	cmd           *exec.Cmd
	log           string
}

func newWorld(t *testing.T) *world {
	w := &world{t: t, dir: t.TempDir()}
	var err error
	if w.etcd, err = etcdtest.Start(etcdtest.Options{Dir: w.dir, Members: 3}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.etcd.Close() })
	if err := pki.Init(filepath.Join(w.dir, "ca"), "example.net", time.Hour); err != nil {
		t.Fatal(err)
	}
	hosts, err := etcdtest.FreeHosts(4)
	if err != nil {
		t.Fatal(err)
	}
	for i, name := range []string{"lease1", "lease2"} {
		w.add(&service{name: name, listen: hosts[2*i], admin: hosts[2*i+1]})
	}
	if err := run(t.Context(), []string{"-create-store", "-c", w.services[0].config}, io.Discard, os.Stderr); err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *world) add(s *service) {
	w.t.Helper()
	f := w.files(tlsid.RoleSvc, s.name)
	text := fmt.Sprintf(`
cell: lab
trust_domain: example.net
listen: %q
tls: {cert: %s, key: %s, ca: %s}
store: {type: etcd, endpoints: ["%s"], ttl: 2s, copies: {every: 1s, keep: 2, dir: %s}}
pools: [{name: main, prefix: 198.51.100.0/24, tep_address: "2001:db8:a::1"}]
teps: [tep1]
hosts: {prefixes: ["::1/128"], per_64: 0}
timers: {valid: 10m, restart_grace: 1s, hold_down: 1s, bind_wait: 5s}
admin: %q
`, s.listen, f.Cert, f.Key, f.CA, strings.Join(w.etcd.Endpoints(), `", "`), filepath.Join(w.dir, s.name+"-copies"), s.admin)
	s.config, s.log = filepath.Join(w.dir, s.name+".yaml"), filepath.Join(w.dir, s.name+".log")
	if err := os.WriteFile(s.config, []byte(text), 0o600); err != nil {
		w.t.Fatal(err)
	}
	w.services = append(w.services, s)
}

func (w *world) files(role tlsid.Role, name string) tlsid.Files {
	w.t.Helper()
	o := pki.Options{}
	if role == tlsid.RoleSvc {
		o.DNS = []string{"lease.example.net"}
	}
	f, err := pki.Issue(filepath.Join(w.dir, "ca"), w.t.TempDir(), tlsid.ID{TrustDomain: "example.net", Cell: "lab", Role: role, Name: name}, o)
	if err != nil {
		w.t.Fatal(err)
	}
	return f
}

func (w *world) client(role tlsid.Role, name string) *leaseclient.Conn {
	w.t.Helper()
	id, err := tlsid.Open(w.files(role, name), role, slog.New(slog.DiscardHandler))
	if err != nil {
		w.t.Fatal(err)
	}
	o := leaseclient.Options{TLS: id.Client("lease.example.net"), BackoffMin: 10 * time.Millisecond, BackoffMax: 200 * time.Millisecond}
	for _, s := range w.services {
		o.Servers = append(o.Servers, netip.MustParseAddrPort(s.listen))
	}
	c, err := leaseclient.New(o)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { c.Close() })
	return c
}

func (w *world) start(s *service) {
	w.t.Helper()
	out, err := os.OpenFile(s.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		w.t.Fatal(err)
	}
	defer out.Close()
	s.cmd = exec.Command(os.Args[0])
	s.cmd.Env = append(os.Environ(), serviceEnv+"=-c "+s.config)
	s.cmd.Stderr, s.cmd.Stdout = out, out
	if err := s.cmd.Start(); err != nil {
		w.t.Fatal(err)
	}
	cmd := s.cmd
	w.t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // an error: it was killed, or it was waited for already
		if w.t.Failed() {
			b, _ := os.ReadFile(s.log)
			w.t.Logf("%s says:\n%s", s.name, b)
		}
	})
}

func (w *world) signal(s *service, sig syscall.Signal) {
	w.t.Helper()
	if err := s.cmd.Process.Signal(sig); err != nil {
		w.t.Fatal(err)
	}
	if sig == syscall.SIGKILL || sig == syscall.SIGTERM {
		if err := s.cmd.Wait(); sig == syscall.SIGTERM && err != nil {
			w.t.Errorf("%s ended with %v", s.name, err)
		}
	}
}

// page reads a page of the admin listener; the text is empty when it does not answer.
func (s *service) page(path string) (code int, text string) {
	c := http.Client{Timeout: time.Second}
	r, err := c.Get("http://" + s.admin + path)
	if err != nil {
		return 0, ""
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		return 0, ""
	}
	return r.StatusCode, string(b)
}

// state returns what a service is: owner, what a standby says, or nothing.
func (s *service) state() string {
	var st struct{ Schema, State string }
	_, text := s.page("/status")
	if json.Unmarshal([]byte(text), &st) != nil {
		return ""
	}
	if st.Schema == "dstm.leasesvc/1" {
		return "owner"
	}
	return st.State
}

// until waits until a service is something.
func (w *world) until(s *service, want string) {
	w.t.Helper()
	for end := time.Now().Add(patience); !strings.HasPrefix(s.state(), want); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			w.t.Fatalf("%s is %q after %s, want %q", s.name, s.state(), patience, want)
		}
	}
}

// gateway acknowledges whatever it is told, and calls again when the service goes.
func (w *world) gateway(name string) {
	c := w.client(tlsid.RoleTEP, name)
	r := replica.New(replica.Config{TEP: name, Instance: name + "-1"})
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		table := map[lease.Resource]lease.Binding{}
		for start := time.Now(); ctx.Err() == nil; time.Sleep(20 * time.Millisecond) {
			s, err := c.Sync(ctx, func() lease.Hello { return r.Hello(uint64(time.Since(start)) + 1) })
			if err != nil {
				continue
			}
			for err == nil {
				err = follow(s, r, table)
			}
			s.Close()
		}
	})
	w.t.Cleanup(func() {
		cancel()
		wg.Wait()
	})
}

// follow takes one message.
func follow(s *leaseclient.Sync, r *replica.Replica, table map[lease.Resource]lease.Binding) error {
	m, err := s.Recv()
	if err != nil {
		return err
	}
	var out replica.Out
	switch m := m.(type) {
	case lease.SessionReply:
		out, err = r.Session(m, m.EchoBootNS)
	case lease.SnapshotChunk:
		out, err = r.Snapshot(m)
	case lease.Batch:
		out, err = r.Batch(m)
	}
	if err != nil {
		return err
	}
	if ch := out.Change; ch != nil {
		if ch.Replace {
			clear(table)
		}
		for _, b := range ch.Upserts {
			table[b.Resource] = b
		}
		for _, res := range ch.Deletes {
			delete(table, res)
		}
		out = r.Applied(ch.Rev)
	}
	if out.Ack != nil {
		return s.Ack(*out.Ack)
	}
	return nil
}

// bind returns a lease as soon as a service gives one.
func (w *world) bind(h *leaseclient.Conn) leaseclient.Lease {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), patience)
	defer cancel()
	for {
		try, end := context.WithTimeout(ctx, 5*time.Second)
		l, err := h.Bind(try, leaseclient.BindRequest{Source: netip.IPv6Loopback()})
		end()
		if err == nil {
			return l
		}
		if ctx.Err() != nil {
			w.t.Fatalf("no lease within %s: %v", patience, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// TestReplicas takes the cell from its owner in every way and looks whether hosts keep what they were given.
func TestReplicas(t *testing.T) {
	w := newWorld(t)
	one, two := w.services[0], w.services[1]
	w.start(one)
	w.until(one, "owner")
	w.start(two)
	w.until(two, "standby: lease1 owns the cell")
	if code, text := two.page("/readyz"); code != http.StatusServiceUnavailable || !strings.Contains(text, "standby: lease1 owns the cell") {
		t.Errorf("a standby is %d %q, want it not ready", code, text)
	}
	if code, text := two.page("/metrics"); code != http.StatusOK || strings.Contains(text, "dstm_leasesvc_commits_total") {
		t.Errorf("a standby has metrics of a service (%d)", code)
	}
	w.gateway("tep1")
	hosts := map[*leaseclient.Conn]leaseclient.Lease{}
	for i := range 3 {
		h := w.client(tlsid.RoleHost, fmt.Sprint("host", i))
		hosts[h] = w.bind(h)
	}
	same := func(t *testing.T) {
		t.Helper()
		for h, l := range hosts {
			if again := w.bind(h); again.Ref != l.Ref {
				t.Errorf("lease %s was %s", again.Ref, l.Ref)
			}
		}
		h := w.client(tlsid.RoleHost, fmt.Sprint("host", len(hosts)))
		fresh := w.bind(h)
		for _, l := range hosts {
			if l.Resource == fresh.Resource {
				t.Errorf("%s is leased twice", l.Resource)
			}
		}
		hosts[h] = fresh
	}
	for _, step := range []struct {
		name string
		do   func(t *testing.T)
	}{
		{"the owner is killed", func(*testing.T) {
			w.signal(one, syscall.SIGKILL)
			w.until(two, "owner")
			w.start(one)
			w.until(one, "standby: lease2 owns the cell")
		}},
		{"the owner is stopped", func(*testing.T) {
			w.signal(two, syscall.SIGTERM)
			w.until(one, "owner")
			w.start(two)
			w.until(two, "standby: lease1 owns the cell")
		}},
		{"the owner sleeps", func(*testing.T) {
			w.signal(one, syscall.SIGSTOP)
			w.until(two, "owner")
			w.signal(one, syscall.SIGCONT)
			w.until(one, "standby: lease2 owns the cell")
		}},
		{"the ownership is taken away", func(t *testing.T) {
			for range 3 { // one process owns the cell more than once
				if _, err := w.etcd.Client.Delete(t.Context(), "/dstm/lab/owner"); err != nil {
					t.Fatal(err)
				}
				w.bind(w.client(tlsid.RoleHost, "host0"))
			}
		}},
		{"the leader of etcd is killed", func(t *testing.T) {
			i := w.etcd.Leader()
			w.etcd.Stop(i)
			w.bind(w.client(tlsid.RoleHost, "host0"))
			if err := w.etcd.Restart(i); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		t.Run(step.name, func(t *testing.T) {
			step.do(t)
			same(t)
		})
	}
	for _, s := range w.services { // both outlived what came after their last start
		if s.state() == "" {
			t.Errorf("%s does not answer", s.name)
		}
		w.signal(s, syscall.SIGTERM)
	}
	if copies, err := filepath.Glob(filepath.Join(w.dir, "*-copies", "lease-*.db")); err != nil || len(copies) == 0 {
		t.Errorf("%d copies of the store, %v: want some", len(copies), err)
	}
}

// TestWrongCell: what waiting does not change ends the process.
func TestWrongCell(t *testing.T) {
	w := newWorld(t)
	s := w.services[0]
	text, err := os.ReadFile(s.config)
	if err != nil {
		t.Fatal(err)
	}
	none := filepath.Join(w.dir, "none.yaml")
	if err := os.WriteFile(none, []byte(strings.Replace(string(text), "type: etcd,", "type: etcd, prefix: /elsewhere,", 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	err = run(ctx, []string{"-c", none}, io.Discard, io.Discard)
	if err == nil || errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "store /elsewhere/ in etcd does not exist") {
		t.Errorf("error %v, want the missing store", err)
	}
	if err := run(ctx, []string{"-create-store", "-c", s.config}, io.Discard, io.Discard); err == nil || !strings.Contains(err.Error(), "it is not replaced") {
		t.Errorf("created twice: %v, want a refusal", err)
	}
}
