package speaker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"

	speakerv1 "github.com/dstm-project/dstm/api/speaker/v1"
	"github.com/dstm-project/dstm/bgp"
)

var (
	pool   = netip.MustParsePrefix("198.51.100.0/24")
	anchor = netip.MustParsePrefix("2001:db8:a::1/128")
)

func testConf() bgp.Config {
	return bgp.Config{
		ASN: 64512, RouterID: netip.MustParseAddr("192.0.2.1"), Allow: []netip.Prefix{pool, anchor}, Orphan: 5 * time.Minute,
		Peers: []bgp.Peer{{
			Address: netip.MustParseAddr("2001:db8:3::1"), LocalAddress: netip.MustParseAddr("2001:db8:3::2"), Port: 1790,
			ASN: 64513, HoldTime: 9 * time.Second, Password: "secret", GracefulRestart: true, RestartTime: time.Minute,
		}},
	}
}

// fakeSpeaker writes down what it is told.
type fakeSpeaker struct {
	mu    sync.Mutex
	trace []string
	conf  bgp.Config
	set   bgp.RouteSet
	err   error
}

func (f *fakeSpeaker) note(format string, a ...any) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.trace = append(f.trace, fmt.Sprintf(format, a...))
	return f.err
}

func (f *fakeSpeaker) Configure(_ context.Context, c bgp.Config) error {
	f.conf = c
	return f.note("configure %d", c.ASN)
}

func (f *fakeSpeaker) Set(ctx context.Context, s bgp.RouteSet) (bgp.Advertised, error) {
	if _, ok := ctx.Deadline(); !ok {
		panic("Set without a deadline")
	}
	f.set = s
	var adv bgp.Advertised
	for _, r := range s.Routes {
		adv.Prefixes = append(adv.Prefixes, r.Prefix)
	}
	return adv, f.note("set %v", adv.Prefixes)
}

func (f *fakeSpeaker) Status(context.Context) (bgp.Status, error) {
	return bgp.Status{Configured: true, Routes: f.set.Routes, Implementation: "fake"}, f.err
}

func (f *fakeSpeaker) Close(_ context.Context, m bgp.CloseMode) error { return f.note("close %d", m) }

func (f *fakeSpeaker) take() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	defer func() { f.trace = nil }()
	return f.trace
}

type world struct {
	t   *testing.T
	f   *fakeSpeaker
	s   *Server
	ctx context.Context
}

func newWorld(t *testing.T) *world {
	f := &fakeSpeaker{}
	ctx, cancel := context.WithTimeout(t.Context(), 1000*time.Hour)
	t.Cleanup(cancel)
	w := &world{t: t, f: f, s: NewServer(f, slog.New(slog.DiscardHandler)), ctx: ctx}
	t.Cleanup(func() { w.s.orphan.Stop() })
	return w
}

func (w *world) configure(c bgp.Config) {
	w.t.Helper()
	if _, err := w.s.Configure(w.ctx, configToWire(c)); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) announce(notAfter time.Time, ps ...netip.Prefix) bgp.Advertised {
	w.t.Helper()
	var set bgp.RouteSet
	for _, p := range ps {
		set.Routes = append(set.Routes, bgp.Route{Prefix: p})
	}
	set.Version, set.NotAfter = 7, notAfter
	m, err := w.s.Set(w.ctx, setToWire(set))
	if err != nil {
		w.t.Fatal(err)
	}
	adv, err := advertisedFromWire(m)
	if err != nil {
		w.t.Fatal(err)
	}
	return adv
}

func (w *world) want(what string, lines ...string) {
	w.t.Helper()
	synctest.Wait()
	if d := cmp.Diff(lines, w.f.take()); d != "" {
		w.t.Errorf("%s (-want +got):\n%s", what, d)
	}
}

func TestOrphan(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.configure(testConf())
		w.announce(time.Time{}, pool)
		w.want("start", "configure 64512", "set [198.51.100.0/24]")
		for range 10 { // signs of life
			time.Sleep(5*time.Minute - time.Second)
			if _, err := w.s.Beat(w.ctx, nil); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(5*time.Minute - time.Second)
		w.want("just before")
		time.Sleep(time.Second)
		w.want("orphaned", "close 3")
		if why := <-w.s.Done(); !strings.Contains(why, "nothing from tepd for 5m0s") {
			t.Errorf("ended because %q", why)
		}
		if _, err := w.s.Beat(w.ctx, nil); err == nil {
			t.Error("a call after the end: no error")
		}
	})
}

func TestOrphanBeforeConfigure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		time.Sleep(firstOrphan)
		w.want("never configured", "close 3")
	})
}

func TestNotAfter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		c := testConf()
		c.Orphan = 24 * time.Hour
		w.configure(c)
		w.announce(time.Now().Add(time.Minute), pool, anchor)
		time.Sleep(50 * time.Second)
		w.announce(time.Now().Add(time.Minute), pool, anchor) // renewed
		w.f.take()
		time.Sleep(time.Minute - time.Millisecond)
		w.want("within its time")
		time.Sleep(time.Millisecond)
		w.want("past its time", "set []")
		w.announce(time.Now().Add(-time.Second), pool)
		w.want("already past", "set []")
		w.announce(time.Time{}, pool)
		time.Sleep(time.Hour)
		w.want("without a limit", "set [198.51.100.0/24]")
	})
}

func TestServerGuards(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		outside := netip.MustParsePrefix("203.0.113.0/24")
		w.configure(testConf())
		adv := w.announce(time.Time{}, outside, pool, anchor)
		w.want("guarded", "configure 64512", "set [198.51.100.0/24 2001:db8:a::1/128]")
		if len(adv.Refused) != 1 || adv.Refused[0].Prefix != outside {
			t.Errorf("refused %+v", adv.Refused)
		}
		narrow := testConf()
		narrow.Allow = narrow.Allow[1:]
		w.configure(narrow)
		w.want("allowed is less", "configure 64512", "set [2001:db8:a::1/128]")
	})
}

func TestServerErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.f.err = fmt.Errorf("asn: %w", bgp.ErrRestart)
		_, err := w.s.Configure(w.ctx, configToWire(testConf()))
		if err = fromStatus(err); !errors.Is(err, bgp.ErrRestart) || !strings.Contains(err.Error(), "asn") {
			t.Errorf("error %v: want ErrRestart with its reason", err)
		}
		w.f.err = nil
		for _, c := range []struct {
			name string
			edit func(*speakerv1.ConfigureRequest)
			want string
		}{
			{"router id", func(m *speakerv1.ConfigureRequest) { m.RouterId = "2001:db8::1" }, `router_id "2001:db8::1": want an IPv4 address`},
			{"asn", func(m *speakerv1.ConfigureRequest) { m.Asn = 0 }, "asn 0"},
			{"orphan", func(m *speakerv1.ConfigureRequest) { m.OrphanMs = 0 }, "orphan_ms 0"},
			{"allow", func(m *speakerv1.ConfigureRequest) { m.Allow = []string{"x"} }, "allow: "},
			{"peer", func(m *speakerv1.ConfigureRequest) { m.Peers[0].Address = "" }, "peer address"},
			{"port", func(m *speakerv1.ConfigureRequest) { m.Peers[0].Port = 65536 }, "port 65536: want 0 to 65535"},
		} {
			m := configToWire(testConf())
			c.edit(m)
			if _, err := w.s.Configure(w.ctx, m); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%s: error %v, want %q", c.name, err, c.want)
			}
		}
		if _, err := w.s.Close(w.ctx, &speakerv1.CloseRequest{Mode: 9}); err == nil || !strings.Contains(err.Error(), "close mode 9") {
			t.Errorf("close mode: error %v", err)
		}
		w.f.take()
		if _, err := w.s.Close(w.ctx, &speakerv1.CloseRequest{Mode: speakerv1.CloseRequest_KEEP}); err != nil {
			t.Error(err)
		}
		w.want("close", "close 2")
	})
}

var cmpNet = cmp.Options{
	cmp.Comparer(func(a, b netip.Addr) bool { return a == b }), cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
}

func TestRoundTrips(t *testing.T) {
	conf, err := configFromWire(configToWire(testConf()))
	if d := cmp.Diff(testConf(), conf, cmpNet); d != "" || err != nil {
		t.Errorf("config: %v (-want +got):\n%s", err, d)
	}
	set := bgp.RouteSet{Version: 9, NotAfter: time.UnixMilli(1700000000123), Routes: []bgp.Route{{
		Prefix: pool, NextHop: netip.MustParseAddr("2001:db8:3::2"), Communities: []string{"64512:1"},
		LargeCommunities: []string{"1:2:3"}, MED: 5, LocalPref: 6,
	}}}
	gotSet, err := setFromWire(setToWire(set))
	if d := cmp.Diff(set, gotSet, cmpNet); d != "" || err != nil {
		t.Errorf("set: %v (-want +got):\n%s", err, d)
	}
	adv := bgp.Advertised{Prefixes: []netip.Prefix{pool}, Refused: []bgp.Refused{{Prefix: anchor, Reason: "no"}}}
	gotAdv, err := advertisedFromWire(advertisedToWire(adv))
	if d := cmp.Diff(adv, gotAdv, cmpNet); d != "" || err != nil {
		t.Errorf("advertised: %v (-want +got):\n%s", err, d)
	}
	st := bgp.Status{
		Configured: true, Version: 9, Routes: set.Routes, BeatAge: time.Second, Implementation: "x",
		Peers: []bgp.PeerState{{
			Address: anchor.Addr(), ASN: 1, State: "IDLE", Since: time.UnixMilli(5), LastError: "e", Advertised: 2, UpdatesSent: 3,
		}},
	}
	gotSt, err := statusFromWire(statusToWire(st))
	if d := cmp.Diff(st, gotSt, cmpNet); d != "" || err != nil {
		t.Errorf("status: %v (-want +got):\n%s", err, d)
	}
}

// FuzzWire gives bytes to every parser: none may panic, and what comes through a Set stays inside of what is allowed.
func FuzzWire(f *testing.F) {
	for _, m := range []proto.Message{configToWire(testConf()), setToWire(bgp.RouteSet{Routes: []bgp.Route{{Prefix: pool}}})} {
		b, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var c speakerv1.ConfigureRequest
		if proto.Unmarshal(b, &c) == nil {
			if conf, err := configFromWire(&c); err == nil && (conf.Orphan <= 0 || !conf.RouterID.Is4()) {
				t.Errorf("accepted %+v", conf)
			}
		}
		var a speakerv1.SetReply
		if proto.Unmarshal(b, &a) == nil {
			_, _ = advertisedFromWire(&a)
		}
		var st speakerv1.StatusReply
		if proto.Unmarshal(b, &st) == nil {
			_, _ = statusFromWire(&st)
		}
		var m speakerv1.SetRequest
		if proto.Unmarshal(b, &m) != nil {
			return
		}
		set, err := setFromWire(&m)
		if err != nil {
			return
		}
		pass, _ := bgp.Guard([]netip.Prefix{pool, anchor}, set.Routes)
		for _, r := range pass {
			if !(r.Prefix.Bits() >= pool.Bits() && pool.Contains(r.Prefix.Addr()) || r.Prefix == anchor) {
				t.Errorf("%s passed", r.Prefix)
			}
		}
	})
}
