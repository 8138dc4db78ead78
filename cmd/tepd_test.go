package cmd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/dstm-project/dstm/dataplane/dataplanetest"
	"github.com/dstm-project/dstm/internal/pki"
	"github.com/dstm-project/dstm/internal/tlsid"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/tepd"
)

// alone runs a test again in a network namespace of its own and reports whether this is that run.
func alone(t *testing.T) bool {
	t.Helper()
	privileged(t)
	const variable = "DSTM_ALONE"
	if os.Getenv(variable) != "" {
		ran(t, "ip", "link", "set", "lo", "up")
		return true
	}
	c := exec.Command("unshare", "-n", os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
	c.Env = append(os.Environ(), variable+"=1")
	out, err := c.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
		t.Fatalf("%v:\n%s", err, out)
	}
	return false
}

// gatewayProcess is a real gateway with its packet path in the kernel, on a node of its own. It is started more than once.
type gatewayProcess struct {
	*process
	s     *stand
	name  string
	ns    *dataplanetest.Namespace
	admin http.Client
}

// gatewayAdmin is on the loopback of the node.
const gatewayAdmin = "[::1]:9546"

// realGateway makes the node and the configuration of a gateway, which the stand's rules cover from now on.
func (s *stand) realGateway(name string) *gatewayProcess {
	s.t.Helper()
	g := &gatewayProcess{s: s, name: name, ns: dataplanetest.NewNamespace(s.t, name)}
	ran(s.t, "ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", g.ns.String())
	ran(s.t, "ip", "addr", "add", "2001:db8::1/64", "dev", name, "nodad")
	ran(s.t, "ip", "link", "set", name, "up")
	g.ns.IP("addr add 2001:db8::2/64 dev eth0 nodad", "link set eth0 up")
	g.admin = http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		DialContext: func(ctx context.Context, network, addr string) (c net.Conn, err error) {
			var refused error
			g.ns.Do(func() error {
				var d net.Dialer
				c, refused = d.DialContext(ctx, network, addr)
				return nil
			})
			return c, refused
		},
	}}
	s.t.Cleanup(g.admin.CloseIdleConnections)
	s.issue(tlsid.RoleTEP, name, pki.Options{})
	s.write(name+".yaml", fmt.Sprintf(`cell: lab
id: %s
lease_service: {servers: ["[2001:db8::1]:%d"], name: lease1.example.net, tls: {cert: DIR/%[1]s.pem, key: DIR/%[1]s.key, ca: DIR/ca.pem}}
tunnel: {address: "2001:db8:a::1", ipv4_address: 192.0.2.1, uplinks: [eth0]}
paths: {run: DIR/%[1]s, bpf: %[3]s}
admin: %[4]q
`, name, s.addrs[0].Port(), dataplanetest.PinDir(s.t), gatewayAdmin))
	s.tepd = g
	return g
}

// run starts the gateway with failpoints.
func (g *gatewayProcess) run(failpoints string) {
	g.s.t.Helper()
	// Not by ip-netns(8): it mounts another /sys, with which the pins would go.
	g.process = g.s.startIn(g.ns.Do, failpoints, breakable(g.s.t, "tepd"), "-c", g.s.path(g.name+".yaml"))
}

// table reads what the packet path holds.
func (g *gatewayProcess) table() (map[lease.Resource]lease.Gen, error) {
	r, err := g.admin.Get("http://" + gatewayAdmin + "/table")
	if err != nil {
		return nil, err
	}
	defer r.Body.Close()
	var t tepd.Table
	if err := json.NewDecoder(r.Body).Decode(&t); err != nil {
		return nil, err
	}
	have := map[lease.Resource]lease.Gen{}
	for _, e := range t.Bindings {
		addr, err := netip.ParseAddr(e.Addr)
		if err != nil {
			return nil, err
		}
		var epoch lease.Epoch
		var rev lease.Rev
		if _, err := fmt.Sscanf(e.Gen, "%d.%d", &epoch, &rev); err != nil {
			return nil, fmt.Errorf("generation %q: %w", e.Gen, err)
		}
		if _, twice := have[lease.Whole(addr)]; twice {
			return nil, errors.New(e.Addr + " is in the table twice")
		}
		have[lease.Whole(addr)] = lease.MakeGen(epoch, rev)
	}
	return have, nil
}

// watch compares the table with what hosts were told before it was read, again and again: whoever was told of a generation
// was told after this gateway had let go of every earlier one (I4), and a gateway that was away lets go before it serves.
func (g *gatewayProcess) watch(ctx context.Context) {
	g.s.wg.Go(func() {
		for ; ctx.Err() == nil; time.Sleep(5 * time.Millisecond) {
			g.s.mu.Lock()
			told := map[lease.Resource]lease.Gen{}
			for r, gen := range g.s.newest {
				told[r] = gen
			}
			g.s.mu.Unlock()
			have, err := g.table()
			if err != nil { // it is not there just now
				continue
			}
			for r, gen := range have {
				if gen < told[r] {
					g.s.fail("gateway %s forwards %s under %s, a host was told of %s", g.name, r, gen, told[r])
				}
			}
		}
	})
}

// gatewayPoints are the failpoints of a gateway.
var gatewayPoints = []string{"tepd-before-apply", "tepd-before-ack", "tepd-after-ack"}

// TestGatewayKilled: a gateway that is killed, or whose packet path fails, at any named point and at any time takes up what
// its packet path still holds, and nobody's packets are forwarded for somebody who has the address no longer. At random it
// is killed 3 times here, 20 times with DSTM_TEST_FULL=1.
func TestGatewayKilled(t *testing.T) {
	if !alone(t) {
		return
	}
	rnd := seeded(t)
	s, g, p := gatewayStand(t, rnd)
	g.run("")
	g.watch(s.ctx)
	recovers := func() {
		t.Helper()
		s.working(p, 50)
		s.settled()
	}
	recovers()
	for _, point := range gatewayPoints {
		g.stop(syscall.SIGKILL)
		at := fmt.Sprintf("%s=kill@%d", point, 1+rnd.IntN(100))
		t.Log(at)
		g.run(at)
		s.killed(g.process)
		g.run("")
		recovers()
	}
	g.stop(syscall.SIGKILL)
	g.run(fmt.Sprintf("tepd-before-apply=error@%d", 2+rnd.IntN(50)))
	recovers()
	rounds := 3
	if os.Getenv("DSTM_TEST_FULL") == "1" {
		rounds = 20
	}
	for range rounds {
		time.Sleep(time.Duration(rnd.IntN(500)) * time.Millisecond)
		g.stop(syscall.SIGKILL)
		time.Sleep(time.Duration(rnd.IntN(500)) * time.Millisecond)
		g.run("")
		recovers()
	}
}

// TestGatewayFindsBugs: the checks above see a gateway that acknowledges what its packet path does not hold, and one that forwards
// for somebody who has the address no longer.
func TestGatewayFindsBugs(t *testing.T) {
	if !alone(t) {
		return
	}
	s, g, p := gatewayStand(t, seeded(t))
	g.run("")
	s.working(p, 50)
	s.settled()
	g.stop(syscall.SIGKILL)
	g.run("bug-not-applied=error")
	g.watch(s.ctx)
	s.working(p, 200)
	if err := s.compare(time.Second); err == nil {
		t.Error("the table of the gateway is right")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, text := range s.broken {
		if strings.Contains(text, "gateway tep1 forwards") {
			return
		}
	}
	t.Errorf("nothing was seen: %q", s.broken)
}

// gatewayStand is a stand with a real gateway, which does not run yet, beside another one.
func gatewayStand(t *testing.T, rnd *rand.Rand) (*stand, *gatewayProcess, *process) {
	t.Helper()
	s := emptyStand(t)
	s.config("stand.yaml")
	g := s.realGateway("tep1")
	s.beginWith(16, rnd, "tep2")
	return s, g, s.service("")
}
