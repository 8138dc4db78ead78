package bgptest

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/dstm-project/dstm/bgp"
)

var (
	pool   = netip.MustParsePrefix("198.51.100.0/24")
	anchor = netip.MustParsePrefix("2001:db8:a::1/128") // the tunnel address
)

// suite is one speaker with two routers.
type suite struct {
	t       *testing.T
	s       bgp.Speaker
	a, b    *Router
	conf    bgp.Config
	version uint64
}

// Run checks a speaker against the contract. open makes a fresh one; the test is in a namespace of its own then. The parts
// are one story in their order, so that there is one start of sessions.
func Run(t *testing.T, open func(t *testing.T) bgp.Speaker) {
	if !InNamespace(t) {
		return
	}
	s := &suite{t: t, s: open(t), a: NewRouter(t, 1, RouterOptions{}), b: NewRouter(t, 2, RouterOptions{Password: "correct horse", GracefulRestart: true})}
	s.conf = bgp.Config{
		ASN: ASN, RouterID: netip.MustParseAddr("192.0.2.1"), Peers: []bgp.Peer{s.a.Peer, s.b.Peer},
		Allow: []netip.Prefix{pool, anchor}, Orphan: time.Minute,
	}
	for _, p := range []struct {
		name string
		f    func(*testing.T)
	}{
		{"first set opens sessions", s.opens},
		{"attributes", s.attributes},
		{"an equal set sends nothing", s.equal},
		{"differences only", s.differences},
		{"guard", s.guard},
		{"no transit", s.noTransit},
		{"status", s.status},
		{"changed peers", s.changedPeers},
		{"what needs another process", s.restart},
		{"an ended context", s.endedContext},
		{"drain", s.drain},
	} {
		if !t.Run(p.name, func(t *testing.T) { s.use(t); p.f(t) }) {
			return // what follows builds on it
		}
	}
}

func (s *suite) use(t *testing.T) {
	s.t = t
	s.a.For(t)
	s.b.For(t)
}

func (s *suite) ctx() context.Context {
	ctx, cancel := context.WithTimeout(s.t.Context(), 10*time.Second)
	s.t.Cleanup(cancel)
	return ctx
}

func (s *suite) configure() {
	s.t.Helper()
	if err := s.s.Configure(s.ctx(), s.conf); err != nil {
		s.t.Fatal(err)
	}
}

func (s *suite) set(routes ...bgp.Route) bgp.Advertised {
	s.t.Helper()
	s.version++
	adv, err := s.s.Set(s.ctx(), bgp.RouteSet{Version: s.version, Routes: routes, NotAfter: time.Now().Add(time.Hour)})
	if err != nil {
		s.t.Fatal(err)
	}
	return adv
}

func (s *suite) state() bgp.Status {
	s.t.Helper()
	st, err := s.s.Status(s.ctx())
	if err != nil {
		s.t.Fatal(err)
	}
	return st
}

func (s *suite) updates() uint64 {
	s.t.Helper()
	var n uint64
	for _, p := range s.state().Peers {
		n += p.UpdatesSent
	}
	return n
}

func route(p netip.Prefix) bgp.Route { return bgp.Route{Prefix: p, Communities: []string{"64512:1"}} }

func lease(s string) bgp.Route { return route(netip.MustParsePrefix(s)) }

func (s *suite) opens(t *testing.T) {
	if _, err := s.s.Set(s.ctx(), bgp.RouteSet{Version: 1}); err == nil {
		t.Error("Set before Configure: no error")
	}
	s.configure()
	s.configure() // idempotent
	st := s.state()
	if !st.Configured || len(st.Peers) != 2 || st.Peers[0].State != "IDLE" || len(st.Routes) != 0 {
		t.Errorf("before the first Set: %+v", st)
	}
	adv := s.set(route(pool), route(anchor))
	if d := cmp.Diff([]netip.Prefix{pool, anchor}, adv.Prefixes, cmp.Comparer(samePrefix)); d != "" || len(adv.Refused) > 0 {
		t.Errorf("advertised (-want +got):\n%s%v", d, adv.Refused)
	}
	for _, r := range []*Router{s.a, s.b} {
		r.Eventually("session", func() error {
			if !r.Up() {
				return errors.New("not established")
			}
			return nil
		})
	}
}

func samePrefix(a, b netip.Prefix) bool { return a == b }

func (s *suite) attributes(t *testing.T) {
	// IPv4 by an IPv6 next hop (RFC 8950): the session's own address.
	s.a.Learns(pool.String(), "BGP.next_hop: "+s.a.Local().String(), "BGP.community: (64512,1)", "BGP.as_path: 64512")
	s.b.Learns(pool.String(), "BGP.next_hop: "+s.b.Local().String())
	s.a.Learns(anchor.String(), "BGP.next_hop: "+s.a.Local().String())

	full := route(pool)
	full.NextHop = netip.MustParseAddr("2001:db8:3:1::99")
	full.Communities = []string{"64512:1", "no-export"}
	full.LargeCommunities = []string{"64512:4200000000:7"}
	full.MED = 70
	s.set(full, route(anchor))
	s.a.Learns(pool.String(), "BGP.next_hop: 2001:db8:3:1::99", "BGP.community: (64512,1) (65535,65281)",
		"BGP.large_community: (64512, 4200000000, 7)", "BGP.med: 70")
	s.set(route(pool), route(anchor))
	s.a.Learns(pool.String(), "BGP.next_hop: "+s.a.Local().String())
	if got := s.a.Route(pool.String()); strings.Contains(got, "BGP.med") || strings.Contains(got, "large_community") {
		t.Errorf("attributes stayed:\n%s", got)
	}
}

func (s *suite) equal(t *testing.T) {
	before := s.updates()
	if before == 0 {
		t.Fatal("no UPDATE counted so far")
	}
	for range 10 {
		s.set(route(pool), route(anchor))
	}
	// A difference behind them, so that whatever was on its way has been sent.
	s.set(route(pool), route(anchor), lease("198.51.100.7/32"))
	s.a.Learns("198.51.100.7/32")
	s.b.Learns("198.51.100.7/32")
	if got := s.updates() - before; got != 2 {
		t.Errorf("%d UPDATEs to two peers: want one each, for the route that is new", got)
	}
}

func (s *suite) differences(*testing.T) {
	s.set(route(pool), route(anchor), lease("198.51.100.8/32"))
	s.a.Learns("198.51.100.8/32")
	s.a.Forgets("198.51.100.7/32")
	s.a.Learns(pool.String())
	s.set(route(pool), route(anchor))
	s.a.Forgets("198.51.100.8/32")
}

func (s *suite) guard(t *testing.T) {
	outside, host := netip.MustParsePrefix("203.0.113.0/24"), netip.MustParsePrefix("198.51.100.9/24")
	adv := s.set(route(outside), route(pool), bgp.Route{Prefix: host}, route(anchor), lease("198.51.100.9/32"))
	s.a.Learns("198.51.100.9/32")
	if len(adv.Refused) != 2 || adv.Refused[0].Prefix != outside || !strings.Contains(adv.Refused[0].Reason, "allow_advertise") ||
		!strings.Contains(adv.Refused[1].Reason, "host bits") {
		t.Errorf("refused: %+v", adv.Refused)
	}
	if got := s.a.Route(outside.String()); got != "" {
		t.Errorf("announced although not allowed:\n%s", got)
	}
	s.set(route(pool), route(anchor))
}

func (s *suite) noTransit(t *testing.T) {
	// Both routers announce something of their own, which must not come through us.
	for _, r := range []*Router{s.a, s.b} {
		if n := r.Count(); n != 2 {
			t.Errorf("router %d learnt %d routes, want the two of ours:\n%s", r.index, n, r.Show("route"))
		}
	}
}

func (s *suite) status(t *testing.T) {
	st := s.state()
	if st.Version != s.version || st.Implementation == "" || len(st.Routes) != 2 {
		t.Errorf("status %+v", st)
	}
	for i, r := range []*Router{s.a, s.b} {
		p := st.Peers[i]
		if p.Address != r.Peer.Address || p.ASN != r.Peer.ASN || p.State != "ESTABLISHED" || p.Advertised != 2 || p.Since.IsZero() {
			t.Errorf("peer %d: %+v", i, p)
		}
	}
}

func (s *suite) changedPeers(t *testing.T) {
	s.conf.Peers = []bgp.Peer{s.a.Peer}
	s.configure()
	s.b.Eventually("session ends", func() error {
		if s.b.Up() {
			return errors.New("still there")
		}
		return nil
	})
	s.b.Forgets(pool.String())
	if !s.a.Up() || s.a.Route(pool.String()) == "" {
		t.Error("the other session suffered")
	}
	s.conf.Peers = []bgp.Peer{s.a.Peer, s.b.Peer}
	s.configure()
	s.b.Learns(pool.String())
}

func (s *suite) restart(t *testing.T) {
	c := s.conf
	c.ASN = 64999
	if err := s.s.Configure(s.ctx(), c); !errors.Is(err, bgp.ErrRestart) {
		t.Errorf("another autonomous system: error %v, want ErrRestart", err)
	}
	if !s.a.Up() {
		t.Error("the session suffered")
	}
}

func (s *suite) endedContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.s.Status(ctx); err == nil {
		t.Error("Status with an ended context: no error")
	}
	if len(s.state().Routes) != 2 {
		t.Error("the speaker suffered")
	}
}

func (s *suite) drain(t *testing.T) {
	done := make(chan error, 1)
	go func() { done <- s.s.Close(s.ctx(), bgp.Drain) }()
	s.a.Learns(pool.String(), "(65535,0)", "(64512,1)")
	s.a.Learns(anchor.String(), "(65535,0)")
	s.a.Forgets(pool.String())
	s.a.Forgets(anchor.String())
	if err := <-done; err != nil {
		t.Error(err)
	}
	if _, err := s.s.Set(s.ctx(), bgp.RouteSet{Version: 99}); err == nil {
		t.Error("Set after Close: no error")
	}
	if slices.Contains([]int{s.a.Count(), s.b.Count()}, 1) {
		t.Error("routes stay")
	}
}
