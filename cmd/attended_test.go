package cmd

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"math/big"
	mrand "math/rand/v2"
	"net"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	leasev1 "github.com/dstm-project/dstm/api/lease/v1"
	"github.com/dstm-project/dstm/internal/pki"
	"github.com/dstm-project/dstm/internal/rpcload"
	"github.com/dstm-project/dstm/internal/tlsid"
	"github.com/dstm-project/dstm/internal/wire"
	"github.com/dstm-project/dstm/lease/replica"
)

// mostPerHost is what an idle host that attends may cost the service, in bytes of resident memory.
const mostPerHost = 25 << 10

// settled is when handshakes are garbage that was collected, and hosts have pinged.
const settled = 20 * time.Second

// TestAttendedHosts: what an idle host that attends costs a real lease service in memory.
func TestAttendedHosts(t *testing.T) {
	if os.Getenv("DSTM_TEST_FULL") != "1" {
		t.Skip("DSTM_TEST_FULL=1 go test ./cmd -run AttendedHosts")
	}
	const some, all = 1000, 5000
	c := newCrowd(t, all, netip.MustParsePrefix("::1/128"))
	c.start()
	defer c.stop()
	c.come(some)
	c.all(time.Minute)
	time.Sleep(settled)
	before := c.memory() // with what does not grow with the hosts
	c.come(all)
	c.all(time.Minute)
	time.Sleep(settled)
	each := (c.memory() - before) / (all - some)
	t.Logf("%d bytes for each of %d hosts", each, all-some)
	if each > mostPerHost {
		t.Errorf("an attending host costs %d bytes, want at most %d", each, mostPerHost)
	}
}

// BenchmarkAttend lets DSTM_ATTEND hosts attend, kills the service, starts it again and waits until all of them are back; with
// the limits that a service has by default and as impatient as the agent of a host is. It is run by hack/bench-attend in a
// namespace where every address of DSTM_ATTEND_NET is local.
//
//	B/host        resident memory of the service for each idle host
//	idle-cpu-%    processor time of the service while all are idle and ping, of one processor
//	come-s        until all attend that have never been there
//	back-s        until all attend again after the kill
//	gateway-s     until a gateway among them has a session again
//	resumed-%     of the handshakes after the kill
//	cpu-ms/back   processor time of the service for each host that came back, refused attempts included
func BenchmarkAttend(b *testing.B) {
	n, err := strconv.Atoi(os.Getenv("DSTM_ATTEND"))
	if err != nil || n < 1 {
		b.Skip("hack/bench-attend")
	}
	from, err := netip.ParsePrefix(os.Getenv("DSTM_ATTEND_NET"))
	if err != nil {
		b.Fatal(err)
	}
	c := newCrowd(b, n, from)
	c.start()
	defer func() { c.stop() }()
	before := c.memory()
	b.ResetTimer()
	c.come(n)
	go c.ping()
	b.ReportMetric(c.all(10*time.Minute).Seconds(), "come-s")
	time.Sleep(settled)
	b.ReportMetric(float64(c.memory()-before)/float64(n), "B/host")
	const idle = 20 * time.Second
	used := c.cpu()
	time.Sleep(idle)
	b.ReportMetric(100*(c.cpu()-used).Seconds()/idle.Seconds(), "idle-cpu-%")

	c.kill()
	for c.there.Load() > 0 {
		time.Sleep(10 * time.Millisecond)
	}
	c.full.Store(0)
	c.resumed.Store(0)
	c.start()
	gateway := make(chan time.Duration, 1)
	go func() { gateway <- c.gateway() }()
	b.ReportMetric(c.all(10*time.Minute).Seconds(), "back-s")
	b.ReportMetric((<-gateway).Seconds(), "gateway-s")
	full, resumed := float64(c.full.Load()), float64(c.resumed.Load())
	b.ReportMetric(100*resumed/(full+resumed), "resumed-%")
	b.ReportMetric(c.cpu().Seconds()*1000/float64(n), "cpu-ms/back")
	b.ReportMetric(0, "ns/op")
}

// crowd is hosts that attend, each on a connection of its own.
type crowd struct {
	*place
	t     testing.TB
	conf  string
	addr  netip.AddrPort
	from  netip.Prefix
	hosts []*attending
	came  int
	svc   *exec.Cmd
	ctx   context.Context

	there, full, resumed atomic.Int64
}

type attending struct {
	tls  *tls.Config
	conn atomic.Pointer[rpcload.Conn]
}

// newCrowd makes a service without hosts, and hosts that call from addresses of a prefix, in /64s of their own if it has some.
func newCrowd(t testing.TB, n int, from netip.Prefix) *crowd {
	t.Helper()
	p, own := newPlace(t), from.Addr()
	if !from.IsSingleIP() {
		own = own.Next()
	}
	l, err := net.Listen("tcp", net.JoinHostPort(own.String(), "0"))
	if err != nil {
		t.Fatal(err)
	}
	c := &crowd{place: p, t: t, addr: netip.MustParseAddrPort(l.Addr().String()), from: from}
	l.Close()
	p.issue(tlsid.RoleSvc, "svc", pki.Options{DNS: []string{"lease1.example.net"}})
	c.conf = p.edit("leasesvc.yaml", `"[::1]:3545"`, `"`+c.addr.String()+`"`)
	f, err := os.OpenFile(c.conf, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if from.IsSingleIP() {
		fmt.Fprintln(f, "limits: {handshakes: 0, per_64: 0}")
	}
	f.Close()
	if out, code := p.run(nil, "leasesvc", "--create-store", "-c", c.conf); code != 0 {
		t.Fatal(out)
	}
	c.identities(n)
	ctx, cancel := context.WithCancel(context.Background())
	c.ctx = ctx
	t.Cleanup(cancel)
	return c
}

// identities gives each host a certificate. They share a key: it is of no interest here, and would take a minute to make.
func (c *crowd) identities(n int) {
	c.t.Helper()
	ca, err := tls.LoadX509KeyPair(c.path("ca.pem"), c.path("ca.key"))
	if err != nil {
		c.t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca.Leaf)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		c.t.Fatal(err)
	}
	for i := range n {
		der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
			SerialNumber: big.NewInt(int64(i + 1000)), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
			URIs:     []*url.URL{{Scheme: "spiffe", Host: "example.net", Path: fmt.Sprintf("/dstm/lab/host/h%d", i)}},
			KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		}, ca.Leaf, key.Public(), ca.PrivateKey)
		if err != nil {
			c.t.Fatal(err)
		}
		c.hosts = append(c.hosts, &attending{tls: &tls.Config{
			MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, ServerName: "lease1.example.net", RootCAs: roots,
			Certificates:       []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}},
			ClientSessionCache: &ticket{},
		}})
	}
}

// ticket holds the newest session, as the agent of a host does.
type ticket struct {
	mu sync.Mutex
	s  *tls.ClientSessionState
}

func (k *ticket) Get(string) (*tls.ClientSessionState, bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.s, k.s != nil
}

func (k *ticket) Put(_ string, s *tls.ClientSessionState) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.s = s
}

// start starts the service and waits until it listens.
func (c *crowd) start() {
	c.t.Helper()
	c.svc = exec.Command(programs+"/leasesvc", "-c", c.conf)
	log, err := c.svc.StderrPipe()
	if err != nil {
		c.t.Fatal(err)
	}
	if err := c.svc.Start(); err != nil {
		c.t.Fatal(err)
	}
	listening(c.t, log)
}

func (c *crowd) stop() {
	_ = c.svc.Process.Signal(syscall.SIGTERM)
	_ = c.svc.Wait()
}

func (c *crowd) kill() {
	_ = c.svc.Process.Kill()
	_ = c.svc.Wait()
}

func (c *crowd) memory() int {
	rss, _ := memory(c.t, c.svc.Process.Pid)
	return rss
}

// cpu returns the processor time that the service has used.
func (c *crowd) cpu() time.Duration {
	c.t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", c.svc.Process.Pid))
	if err != nil {
		c.t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), ") ")
	f := strings.Fields(rest)
	user, uerr := strconv.Atoi(f[11])
	system, serr := strconv.Atoi(f[12])
	if uerr != nil || serr != nil {
		c.t.Fatalf("/proc/PID/stat: %q", b)
	}
	return time.Duration(user+system) * (time.Second / 100) // USER_HZ
}

// gateway is a gateway until it has a session, which takes as long as is returned.
func (c *crowd) gateway() time.Duration {
	begin := time.Now()
	id, err := tlsid.Open(tlsid.Files{Cert: c.path("tep.pem"), Key: c.path("tep.key"), CA: c.path("ca.pem")}, tlsid.RoleTEP, slog.New(slog.DiscardHandler))
	if err != nil {
		c.t.Error(err)
		return 0
	}
	conf := id.Client("lease1.example.net")
	for c.ctx.Err() == nil {
		ctx, cancel := context.WithTimeout(c.ctx, 20*time.Second)
		conn, err := rpcload.Dial(ctx, &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP("2001:db8:2::1")}}, c.addr.String(), conf)
		if err == nil {
			var m leasev1.SyncDown
			hello := wire.FromHello(replica.New(replica.Config{TEP: "tep", Instance: "1"}).Hello(1))
			if err = conn.Open(leasev1.Teps_Sync_FullMethodName, hello); err == nil {
				err = conn.Recv(&m)
			}
			conn.Close()
		}
		cancel()
		if err == nil {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	return time.Since(begin)
}

// come lets hosts attend from now on, up to n in number.
func (c *crowd) come(n int) {
	for i := c.came; i < n; i++ {
		go c.attend(i, c.hosts[i])
	}
	c.came = n
}

// ping pings for every host that attends every ten seconds, as leaseclient does.
func (c *crowd) ping() {
	const share = 100
	for t, part := time.NewTicker(10*time.Second/share), 0; ; part = (part + 1) % share {
		for i := part; i < len(c.hosts); i += share {
			if conn := c.hosts[i].conn.Load(); conn != nil {
				_ = conn.Ping() // its reader sees what is wrong
			}
		}
		select {
		case <-c.ctx.Done():
			return
		case <-t.C:
		}
	}
}

// attend keeps a host attending, with the waits between attempts of leaseclient.
func (c *crowd) attend(i int, h *attending) {
	const first, most = 100 * time.Millisecond, 5 * time.Second
	for wait := first; c.ctx.Err() == nil; {
		begun := c.once(i, h)
		if begun {
			wait = first
		}
		time.Sleep(time.Duration(float64(wait) * (0.8 + 0.4*mrand.Float64())))
		wait = min(wait*8/5, most)
	}
}

// once attends until the connection is lost, and reports whether it began.
func (c *crowd) once(i int, h *attending) (begun bool) {
	ctx, cancel := context.WithTimeout(c.ctx, 20*time.Second)
	defer cancel()
	conn, err := rpcload.Dial(ctx, &net.Dialer{LocalAddr: c.source(i)}, c.addr.String(), h.tls)
	if err != nil {
		return false
	}
	defer conn.Close()
	defer context.AfterFunc(c.ctx, func() { conn.Close() })()
	if conn.Resumed() {
		c.resumed.Add(1)
	} else {
		c.full.Add(1)
	}
	hello := &leasev1.AttendUp{M: &leasev1.AttendUp_Hello{Hello: &leasev1.HostHello{Instance: "1"}}}
	var m leasev1.AttendDown
	if conn.Open(leasev1.Hosts_Attend_FullMethodName, hello) != nil || conn.Recv(&m) != nil || m.GetWelcome() == nil {
		return false
	}
	c.there.Add(1)
	h.conn.Store(conn)
	for conn.Recv(&m) == nil {
	}
	h.conn.Store(nil)
	c.there.Add(-1)
	return true
}

// source returns the address that a host calls from.
func (c *crowd) source(i int) net.Addr {
	if c.from.IsSingleIP() {
		return nil
	}
	a := c.from.Addr().As16()
	a[6], a[7], a[8], a[15] = byte(i>>8), byte(i), byte(i>>16), 2
	return &net.TCPAddr{IP: a[:]}
}

// all waits until all hosts attend, and returns how long that took.
func (c *crowd) all(patience time.Duration) time.Duration {
	c.t.Helper()
	begin := time.Now()
	for c.there.Load() < int64(c.came) {
		if time.Since(begin) > patience {
			c.t.Fatalf("%d of %d hosts attend after %s", c.there.Load(), c.came, patience)
		}
		time.Sleep(10 * time.Millisecond)
	}
	return time.Since(begin)
}
