package cmd

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/dstm-project/dstm/internal/pki"
	"github.com/dstm-project/dstm/internal/tlsid"
	"github.com/dstm-project/dstm/leasesvc/leaseclient"
)

// attendedHosts is how many hosts attend in the test, and mostPerHost what each may cost the service.
const (
	attendedHosts = 2000
	mostPerHost   = 25 << 10 // bytes of resident memory
)

// TestAttendedHosts: what an idle host that attends costs a real lease service in memory.
func TestAttendedHosts(t *testing.T) {
	if os.Getenv("DSTM_TEST_FULL") != "1" {
		t.Skip("DSTM_TEST_FULL=1 go test ./cmd -run AttendedHosts")
	}
	p := newPlace(t)
	l, err := net.Listen("tcp", "[::1]:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := netip.MustParseAddrPort(l.Addr().String())
	l.Close()
	p.issue(tlsid.RoleSvc, "svc", pki.Options{DNS: []string{"lease1.example.net"}})
	conf := p.edit("leasesvc.yaml", `"[::1]:3545"`, `"`+addr.String()+`"`)
	f, err := os.OpenFile(conf, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(f, "limits: {handshakes: 0, per_64: 0}\nadmin: \"[::1]:0\"\n")
	f.Close()
	if out, code := p.run(nil, "leasesvc", "--create-store", "-c", conf); code != 0 {
		t.Fatal(out)
	}
	c := exec.Command(programs+"/leasesvc", "-c", conf)
	c.Stderr = os.Stderr
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Process.Signal(syscall.SIGTERM); _ = c.Wait() }()
	attend := func(name string) *leaseclient.Attendance {
		p.issue(tlsid.RoleHost, name, pki.Options{})
		id, err := tlsid.Open(tlsid.Files{Cert: p.path(name + ".pem"), Key: p.path(name + ".key"), CA: p.path("ca.pem")}, tlsid.RoleHost, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Error(err)
			return nil
		}
		conn, err := leaseclient.New(leaseclient.Options{Servers: []netip.AddrPort{addr}, TLS: id.Client("lease1.example.net")})
		if err != nil {
			t.Error(err)
			return nil
		}
		t.Cleanup(func() { conn.Close() })
		for end := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
			a, _, err := conn.Attend(context.Background(), leaseclient.Hello{Instance: "1"})
			if err == nil {
				return a
			}
			if time.Now().After(end) {
				t.Errorf("%s: %v", name, err)
				return nil
			}
		}
	}
	attend("first")
	time.Sleep(time.Second)
	before := resident(t, c.Process.Pid)
	var wg sync.WaitGroup
	slots := make(chan struct{}, 32)
	begin := time.Now()
	for i := range attendedHosts {
		wg.Go(func() {
			slots <- struct{}{}
			attend(fmt.Sprint("h", i))
			<-slots
		})
	}
	wg.Wait()
	took := time.Since(begin)
	time.Sleep(20 * time.Second) // handshakes are garbage by now
	each := (resident(t, c.Process.Pid) - before) / attendedHosts
	t.Logf("%d hosts in %s, %d bytes each (%d MB before)", attendedHosts, took.Round(time.Millisecond), each, before>>20)
	if each > mostPerHost {
		t.Errorf("an attending host costs %d bytes, want at most %d", each, mostPerHost)
	}
}

// resident returns the resident memory of a process in bytes.
func resident(t *testing.T, pid int) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		t.Fatal(err)
	}
	pages, err := strconv.Atoi(strings.Fields(string(b))[1])
	if err != nil {
		t.Fatal(err)
	}
	return pages * os.Getpagesize()
}
