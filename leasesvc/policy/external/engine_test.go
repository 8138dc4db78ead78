package external

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"

	policyv1 "github.com/dstm-project/dstm/api/policy/v1"
	"github.com/dstm-project/dstm/leasesvc/policy"
)

// seen is a Starter that keeps what it started.
type seen struct {
	policy.Starter
	mu    sync.Mutex
	procs []*process
}

func (s *seen) start(ctx context.Context, c policy.PluginConfig) (policy.Process, error) {
	p, err := s.Starter(ctx, c)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.procs = append(s.procs, p.(*process))
	return p, nil
}

func (s *seen) last() *process {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.procs[len(s.procs)-1]
}

// engine runs plugins as the service does, until the test ends.
func engine(t *testing.T, budget time.Duration, plugins ...policy.PluginConfig) (*policy.Engine, *seen, *prometheus.Registry) {
	t.Helper()
	var log lines
	s := &seen{Starter: Starter(socketDir(t), log.logger())}
	r := prometheus.NewRegistry()
	e := policy.New(policy.Config{Budget: budget, Plugins: plugins}, policy.Deps{Start: s.start, Log: log.logger(), Registry: r})
	ctx, cancel := context.WithCancel(t.Context())
	ready, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		if err := e.Run(ctx, func() { close(ready) }); err != nil {
			t.Error(err)
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
		for _, p := range s.procs {
			select {
			case <-p.Done():
			default:
				t.Errorf("process %d still runs", p.PID())
			}
		}
		if t.Failed() {
			t.Logf("log:\n%s", log.text())
		}
	})
	<-ready
	return e, s, r
}

// TestKill kills a plugin again and again while it is asked 1,000 times a second: only what on_failure says can happen, and
// no call waits.
func TestKill(t *testing.T) {
	for name, c := range map[string]struct {
		onFailure policy.OnFailure
		want      policy.Decision // when the plugin does not answer
	}{
		"open":   {policy.Open, policy.Decision{Verdict: policy.Allow}},
		"closed": {policy.Closed, policy.Decision{Verdict: policy.Deny, Reason: "policy p does not answer"}},
	} {
		t.Run(name, func(t *testing.T) {
			before := goleak.IgnoreCurrent()
			t.Cleanup(func() { goleak.VerifyNone(t, before) })
			testKill(t, c.onFailure, c.want)
		})
	}
}

func testKill(t *testing.T, onFailure policy.OnFailure, want policy.Decision) {
	const budget = 50 * time.Millisecond
	conf := self("plain")
	conf.OnFailure = onFailure
	e, s, r := engine(t, budget, conf)
	var answered, failed, calls atomic.Int64
	var slowest atomic.Int64
	one := func(n int) {
		host := "lap7"
		real := policy.Decision{Verdict: policy.Allow}
		if n%2 == 0 {
			host, real = "nobody", policy.Decision{Verdict: policy.Deny, Reason: "host nobody from 2001:db8:1::7 by TRIGGER_DNS of main"}
		}
		begin := time.Now()
		got := e.Decide(t.Context(), request(host))
		took := int64(time.Since(begin))
		for old := slowest.Load(); took > old && !slowest.CompareAndSwap(old, took); old = slowest.Load() {
		}
		calls.Add(1)
		switch got {
		case real: // with on_failure open an allowed host cannot tell; the metrics can
			answered.Add(1)
		case want:
			failed.Add(1)
		default:
			t.Errorf("decision %+v", got)
		}
	}
	var wg sync.WaitGroup
	kills, tick := 0, time.NewTicker(time.Millisecond)
	defer tick.Stop()
	sent := 0
	for begin, next := time.Now(), 200*time.Millisecond; time.Since(begin) < 3*time.Second; {
		<-tick.C
		for ; sent < int(time.Since(begin)/time.Millisecond); sent++ {
			n := sent
			wg.Go(func() { one(n) })
		}
		if time.Since(begin) > next {
			if err := unix.Kill(s.last().PID(), unix.SIGKILL); err != nil && err != unix.ESRCH {
				t.Fatal(err)
			}
			kills++
			next += 400 * time.Millisecond
		}
	}
	wg.Wait()
	t.Logf("%d calls, %d kills, %d answered, %d by on_failure, slowest %s", calls.Load(), kills, answered.Load(), failed.Load(), time.Duration(slowest.Load()))
	if n := calls.Load(); n < 1000 || kills < 5 || answered.Load() == 0 || failed.Load() == 0 {
		t.Errorf("%d calls, %d kills: want about 3000 and 8, and some of both kinds", n, kills)
	}
	if max := time.Duration(slowest.Load()); max > 10*budget {
		t.Errorf("a call took %s with a budget of %s", max, budget)
	}
	comesBack(t, e)
	if n := testutil.CollectAndCount(r, "dstm_policy_plugin_calls_total"); n < 3 {
		t.Errorf("%d results of calls: want allow, deny and down at least", n)
	}
}

// comesBack waits for an answer of the plugin itself.
func comesBack(t *testing.T, e *policy.Engine) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !strings.HasPrefix(e.Decide(t.Context(), request("nobody")).Reason, "host nobody"); {
		if time.Now().After(end) {
			t.Fatal("the plugin does not come back")
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// TestHang: a plugin that does not answer costs five Binds their budget, and then none.
func TestHang(t *testing.T) {
	for _, mode := range []string{"hang", "stop"} {
		t.Run(mode, func(t *testing.T) {
			conf := self(mode)
			conf.OnFailure = policy.Open
			const budget = 50 * time.Millisecond
			e, _, r := engine(t, budget, conf)
			bind := func() {
				begin := time.Now()
				if got := e.Decide(t.Context(), request("nobody")); !got.Allowed() {
					t.Fatalf("%+v, want allow", got)
				}
				if took := time.Since(begin); took > 10*budget {
					t.Errorf("took %s with a budget of %s", took, budget)
				}
			}
			for range 5 {
				bind()
			}
			const want = `
# HELP dstm_policy_plugin_breaker_state Circuit breaker of a plugin: 0 closed, 1 half-open, 2 open.
# TYPE dstm_policy_plugin_breaker_state gauge
dstm_policy_plugin_breaker_state{plugin="p"} 2
# HELP dstm_policy_plugin_calls_total Questions to plugins by result.
# TYPE dstm_policy_plugin_calls_total counter
dstm_policy_plugin_calls_total{plugin="p",result="timeout"} 5
`
			// A call is counted when its own deadline is over, which a Bind does not wait for.
			for end := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
				err := testutil.GatherAndCompare(r, strings.NewReader(want), "dstm_policy_plugin_breaker_state", "dstm_policy_plugin_calls_total")
				if err == nil {
					break
				}
				if time.Now().After(end) {
					t.Fatal(err)
				}
			}
			begin := time.Now()
			for range 95 {
				bind()
			}
			// Without a breaker it would be 4.75 s. A second opens it for one probe.
			if took := time.Since(begin); took > 2*time.Second {
				t.Errorf("95 binds took %s with the breaker open", took)
			}
		})
	}
}

// TestWrongDigest: the service runs without such a plugin, and on_failure decides.
func TestWrongDigest(t *testing.T) {
	conf := self("plain")
	conf.SHA256[31]++
	e, s, _ := engine(t, time.Second, conf)
	if got := e.Decide(t.Context(), request("lap7")); got.Allowed() || got.Reason != "policy p does not answer" || len(s.procs) != 0 {
		t.Errorf("%+v, %d processes", got, len(s.procs))
	}
}

// TestAutoMTLS: who has the socket but not the certificate of this one start gets no answer.
func TestAutoMTLS(t *testing.T) {
	for _, mode := range []string{"plain", "helper"} {
		t.Run(mode, func(t *testing.T) {
			dir := socketDir(t)
			p := mustStart(t, dir, mode, nil)
			sockets, err := filepath.Glob(filepath.Join(dir, "policy-p", "*", "plugin*"))
			if err != nil || len(sockets) != 1 {
				t.Fatalf("sockets %v, %v", sockets, err)
			}
			for name, creds := range map[string]credentials.TransportCredentials{
				"no TLS":              insecure.NewCredentials(),
				"no certificate":      credentials.NewTLS(&tls.Config{InsecureSkipVerify: true}),
				"another certificate": credentials.NewTLS(&tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{stranger()}}),
			} {
				conn, err := grpc.NewClient("unix:"+sockets[0], grpc.WithTransportCredentials(creds))
				if err != nil {
					t.Fatal(err)
				}
				ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
				m, err := policyv1.NewPolicyClient(conn).Decide(ctx, &policyv1.DecideRequest{Host: "lap7"})
				if err == nil || ctx.Err() != nil {
					t.Errorf("%s: answered %v, %v", name, m, err)
				}
				cancel()
				conn.Close()
			}
			if got, err := p.Decide(t.Context(), request("lap7")); err != nil || !got.Allowed() {
				t.Errorf("with the right one: %+v, %v", got, err)
			}
		})
	}
}

// stranger is a certificate as go-plugin makes them, of nobody.
func stranger() tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		panic(err)
	}
	c := &x509.Certificate{
		Subject: pkix.Name{CommonName: "localhost", Organization: []string{"HashiCorp"}}, DNSNames: []string{"localhost"},
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		BasicConstraintsValid: true, IsCA: true, SerialNumber: big.NewInt(1),
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		panic(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// FuzzReply: whatever a plugin sends is a verdict with a clean reason, or an error.
func FuzzReply(f *testing.F) {
	for _, m := range []*policyv1.DecideReply{
		{}, {Verdict: policyv1.Verdict_ALLOW}, {Verdict: policyv1.Verdict_DENY, Reason: "not \x1b[0m today\u202e"}, {Verdict: -1},
	} {
		b, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var m policyv1.DecideReply
		if proto.Unmarshal(b, &m) != nil {
			return
		}
		d, err := fromWire(&m)
		valid := m.GetVerdict() == policyv1.Verdict_ALLOW || m.GetVerdict() == policyv1.Verdict_DENY
		if (err == nil) != valid || valid && fmt.Sprint(d.Verdict) != strings.ToLower(m.GetVerdict().String()) || err != nil && d != (policy.Decision{}) {
			t.Fatalf("verdict %s: %+v, %v", m.GetVerdict(), d, err)
		}
		if len(d.Reason) > policy.MaxReason || !utf8.ValidString(d.Reason) || strings.ContainsFunc(d.Reason, func(r rune) bool { return !unicode.IsGraphic(r) }) {
			t.Errorf("reason %q", d.Reason)
		}
	})
}
