package cmd

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/dstm-project/dstm/dataplane"
	"github.com/dstm-project/dstm/dataplane/dataplanetest"
	"github.com/dstm-project/dstm/dataplane/tc"
	"github.com/dstm-project/dstm/internal/pki"
	"github.com/dstm-project/dstm/internal/tlsid"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/lease/replica"
	"github.com/dstm-project/dstm/leasesvc/leaseclient"
	"github.com/dstm-project/dstm/leasesvc/store"
	"github.com/dstm-project/dstm/leasesvc/store/boltstore"
)

// BenchmarkRestart starts the real lease service over a store with live leases, and gives a gateway with a packet path in the
// kernel the whole table. What it needs grows with the leases:
//
//	ready-s     from the start of the process until it listens
//	sync-s      from a gateway's call until the gateway has acknowledged the table
//	RSS-MB      resident memory after that
//	anon-MB     of which is not a page of the store's file
func BenchmarkRestart(b *testing.B) {
	for _, n := range []int{10_000, 100_000, 1_000_000} {
		b.Run(fmt.Sprintf("leases=%d", n), func(b *testing.B) {
			p := newPlace(b)
			addr, path := p.service(n), packetPath(b)
			var ready, sync time.Duration
			var rss, anon int
			for b.Loop() {
				c := exec.Command(filepath.Join(programs, "leasesvc"), "-c", p.path("full.yaml"))
				log, err := c.StderrPipe()
				if err != nil {
					b.Fatal(err)
				}
				begin := time.Now()
				if err := c.Start(); err != nil {
					b.Fatal(err)
				}
				listening(b, log)
				ready += time.Since(begin)
				begin = time.Now()
				r := p.follow(addr, path, n)
				sync += time.Since(begin)
				held, err := path.Entries(b.Context())
				if got := r.Status().Bindings; got != n || len(held) != n || err != nil {
					b.Errorf("the gateway holds %d bindings and its packet path %d, %v, want %d", got, len(held), err, n)
				}
				rss, anon = memory(b, c.Process.Pid)
				_ = c.Process.Signal(syscall.SIGTERM)
				if err := c.Wait(); err != nil {
					b.Error(err)
				}
			}
			b.ReportMetric(ready.Seconds()/float64(b.N), "ready-s")
			b.ReportMetric(sync.Seconds()/float64(b.N), "sync-s")
			b.ReportMetric(float64(rss)/1e6, "RSS-MB")
			b.ReportMetric(float64(anon)/1e6, "anon-MB")
		})
	}
}

// service writes full.yaml and its store, with n live leases of a /12. It returns where the service will listen.
func (p *place) service(n int) netip.AddrPort {
	p.t.Helper()
	l, err := net.Listen("tcp", "[::1]:0")
	if err != nil {
		p.t.Fatal(err)
	}
	defer l.Close()
	addr := netip.MustParseAddrPort(l.Addr().String())
	p.issue(tlsid.RoleSvc, "svc", pki.Options{DNS: []string{"lease1.example.net"}})
	text, err := os.ReadFile(p.path("leasesvc.yaml"))
	if err != nil {
		p.t.Fatal(err)
	}
	p.write("full.yaml", strings.NewReplacer("[::1]:3545", addr.String(), "198.51.100.0/24", "10.0.0.0/12").Replace(string(text))+"admin: \"[::1]:0\"\n")
	if err := boltstore.Create(p.path("lease.db")); err != nil {
		p.t.Fatal(err)
	}
	p.leases(lease.Pool{Name: "main", Prefix: netip.MustParsePrefix("10.0.0.0/12"), TEP: netip.MustParseAddr("2001:db8:a::1")}, n)
	return addr
}

// leases puts n leases of a pool into the store, which no service has open.
func (p *place) leases(pool lease.Pool, n int) {
	p.t.Helper()
	s, err := boltstore.Open(boltstore.Options{Path: p.path("lease.db")})
	if err != nil {
		p.t.Fatal(err)
	}
	st, err := s.Load(p.t.Context())
	if err != nil {
		p.t.Fatal(err)
	}
	c := lease.NewCell(st.Epoch, st.Last, 0)
	core, err := lease.NewCore(lease.Config{Pool: pool, Timers: lease.DefaultTimers()}, c, lease.Now{Wall: time.Now()}, nil)
	if err != nil {
		p.t.Fatal(err)
	}
	var last *store.Pending
	for i := range n {
		ev := lease.Bind{
			Host: fmt.Sprintf("host%08d.example.net", i), MTU: 1460, Trigger: lease.TriggerDNS,
			Source: netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 0, byte(i >> 16), byte(i >> 8), byte(i), 15: 1}),
		}
		a := core.Step(lease.Now{Wall: time.Now()}, ev)
		last = s.Commit(store.Tx{Commits: a.Commits, Wall: time.Now()})
		if i%4096 == 0 {
			if err := last.Wait(p.t.Context()); err != nil {
				p.t.Fatal(err)
			}
		}
	}
	if err := last.Wait(p.t.Context()); err != nil {
		p.t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		p.t.Fatal(err)
	}
}

// listening waits until a program says that it listens, and then swallows the rest.
func listening(t testing.TB, log io.Reader) {
	t.Helper()
	lines := bufio.NewScanner(log)
	for lines.Scan() {
		if strings.Contains(lines.Text(), "listening") && !strings.Contains(lines.Text(), "admin") {
			go func() { _, _ = io.Copy(io.Discard, log) }()
			return
		}
	}
	t.Fatal("the program ended before it listened")
}

// packetPath returns a gateway's packet path in a namespace of its own, with nothing to forward.
func packetPath(b *testing.B) dataplane.Gateway {
	b.Helper()
	dataplanetest.NeedRoot(b)
	ns := dataplanetest.NewNamespace(b, "s")
	ns.IP("link add uplink type veth peer name core", "link set uplink up", "link set core up")
	var g *tc.Gateway
	ns.Do(func() (err error) {
		if g, err = tc.NewGateway(slog.New(slog.DiscardHandler)); err != nil {
			return err
		}
		return g.Configure(b.Context(), dataplane.GatewayConfig{
			Device: "dstm0", Uplinks: []string{"uplink"}, TEPs: []netip.Addr{netip.MustParseAddr("2001:db8:a::1")},
			PinDir: dataplanetest.PinDir(b),
		})
	})
	b.Cleanup(func() { _ = g.Close(false) })
	return g
}

// follow is a gateway until it has acknowledged n bindings.
func (p *place) follow(addr netip.AddrPort, path dataplane.Gateway, n int) *replica.Replica {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.t.Context(), 2*time.Minute)
	defer cancel()
	id, err := tlsid.Open(tlsid.Files{Cert: p.path("tep.pem"), Key: p.path("tep.key"), CA: p.path("ca.pem")}, tlsid.RoleTEP, slog.New(slog.DiscardHandler))
	if err != nil {
		p.t.Fatal(err)
	}
	conn, err := leaseclient.New(leaseclient.Options{Servers: []netip.AddrPort{addr}, TLS: id.Client("lease1.example.net")})
	if err != nil {
		p.t.Fatal(err)
	}
	defer conn.Close()
	begin := time.Now()
	now := func() uint64 { return uint64(time.Since(begin)) + 1 }
	r := replica.New(replica.Config{TEP: "tep", Instance: "1"})
	s, err := conn.Sync(ctx, func() lease.Hello { return r.Hello(now()) })
	if err != nil {
		p.t.Fatal(err)
	}
	defer s.Close()
	for {
		m, err := s.Recv()
		if err != nil {
			p.t.Fatal(err)
		}
		var out replica.Out
		switch m := m.(type) {
		case lease.SessionReply:
			out, err = r.Session(m, now())
		case lease.SnapshotChunk:
			out, err = r.Snapshot(m)
		case lease.Batch:
			out, err = r.Batch(m)
		}
		if err != nil {
			p.t.Fatal(err)
		}
		if out.Change == nil {
			continue
		}
		if !out.Change.Replace {
			p.t.Fatal("a table came in another way than as a whole")
		}
		if err := path.Replace(ctx, out.Change.Upserts); err != nil {
			p.t.Fatal(err)
		}
		ack := r.Applied(out.Change.Rev).Ack
		if err := s.Ack(*ack); err != nil {
			p.t.Fatal(err)
		}
		if len(out.Change.Upserts) == n {
			return r
		}
	}
}

// memory returns the resident memory of a process, and how much of it is no page of a file, in bytes.
func memory(t testing.TB, pid int) (rss, anon int) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		name, value, _ := strings.Cut(line, ":")
		kb, _ := strconv.Atoi(strings.TrimSuffix(strings.TrimSpace(value), " kB"))
		switch name {
		case "VmRSS":
			rss = kb << 10
		case "RssAnon":
			anon = kb << 10
		}
	}
	return rss, anon
}
