// Package gobgp speaks BGP with an embedded GoBGP. It is the only importer of github.com/osrg/gobgp/v3.
//
// GoBGP runs here as a pure announcer: it dials its peers and listens on nothing, an import policy rejects whatever peers
// send, and what it announces is the last Set. It belongs into a process of its own (bgp/speaker): a malformed UPDATE can
// panic it (CVE-2026-41643), and a server that was stopped is never started again in the same process.
package gobgp

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"time"

	api "github.com/osrg/gobgp/v3/api"
	"github.com/osrg/gobgp/v3/pkg/server"

	"github.com/dstm-project/dstm/bgp"
)

// Implementation is what Status says of this speaker.
const Implementation = "gobgp 3.37.0"

// drainWait is how long peers get to move their traffic between GRACEFUL_SHUTDOWN and the withdrawal. It is for
// convergence inside of one site; RFC 8326 section 4 leaves the value to the operator.
const drainWait = 10 * time.Second

// Speaker is a bgp.Speaker. Its calls are serialised, and each returns when its context ends, even if GoBGP does not.
type Speaker struct {
	log   *logger
	turn  chan struct{} // holds the one token of whoever works on what follows
	srv   *server.BgpServer
	conf  bgp.Config
	open  bool // a Set was there: peers are added
	ver   uint64
	paths map[netip.Prefix]bgp.Route // announced
	done  bool                       // closed
}

// New returns a speaker that does nothing before Configure.
func New(log *slog.Logger) *Speaker {
	s := &Speaker{log: newLogger(log), turn: make(chan struct{}, 1), paths: map[netip.Prefix]bgp.Route{}}
	s.turn <- struct{}{}
	return s
}

// ErrClosed means that the speaker was closed before.
var ErrClosed = errors.New("the speaker is closed")

// ErrNotConfigured means that Configure has to come first.
var ErrNotConfigured = errors.New("the speaker has no configuration yet")

// do runs f when it is its turn. GoBGP's calls take no notice of contexts, so f goes on behind our back when ctx ends
// first, and whoever comes next waits for it.
func (s *Speaker) do(ctx context.Context, f func() error) error {
	select {
	case <-s.turn:
	case <-ctx.Done():
		return fmt.Errorf("gobgp is busy: %w", ctx.Err())
	}
	res := make(chan error, 1)
	go func() {
		defer func() { s.turn <- struct{}{} }()
		if s.done {
			res <- ErrClosed
			return
		}
		res <- f()
	}()
	select {
	case err := <-res:
		return err
	case <-ctx.Done():
		return fmt.Errorf("gobgp does not answer: %w", ctx.Err())
	}
}

// Configure implements bgp.Speaker. Another autonomous system or router identifier is bgp.ErrRestart.
func (s *Speaker) Configure(ctx context.Context, c bgp.Config) error {
	return s.do(ctx, func() error {
		if s.srv == nil {
			if err := s.start(c); err != nil {
				return err
			}
			s.conf = c
			return nil
		}
		if c.ASN != s.conf.ASN || c.RouterID != s.conf.RouterID {
			return fmt.Errorf("asn %d, router_id %s: now %d, %s: %w", c.ASN, c.RouterID, s.conf.ASN, s.conf.RouterID, bgp.ErrRestart)
		}
		old := s.conf.Peers
		s.conf = c
		if !s.open {
			return nil
		}
		return s.changePeers(old, c.Peers)
	})
}

func (s *Speaker) start(c bgp.Config) error {
	ctx := context.Background()
	srv := server.NewBgpServer(server.LoggerOption(s.log))
	go srv.Serve()
	if err := srv.StartBgp(ctx, &api.StartBgpRequest{Global: &api.Global{
		Asn: c.ASN, RouterId: c.RouterID.String(), ListenPort: -1,
	}}); err != nil {
		return fmt.Errorf("gobgp: start: %w", err)
	}
	// What comes from peers is not for us; what is our own passes.
	policy := &api.Policy{Name: "own", Statements: []*api.Statement{{
		Name:       "own",
		Conditions: &api.Conditions{RouteType: api.Conditions_ROUTE_TYPE_LOCAL},
		Actions:    &api.Actions{RouteAction: api.RouteAction_ACCEPT},
	}}}
	if err := srv.AddPolicy(ctx, &api.AddPolicyRequest{Policy: policy}); err != nil {
		return fmt.Errorf("gobgp: policy: %w", err)
	}
	if err := srv.SetPolicyAssignment(ctx, &api.SetPolicyAssignmentRequest{Assignment: &api.PolicyAssignment{
		Name: "global", Direction: api.PolicyDirection_IMPORT,
		Policies: []*api.Policy{{Name: policy.Name}}, DefaultAction: api.RouteAction_REJECT,
	}}); err != nil {
		return fmt.Errorf("gobgp: policy: %w", err)
	}
	s.srv = srv
	return nil
}

// changePeers ends the sessions of peers that are gone or changed, and opens those of new and changed ones.
func (s *Speaker) changePeers(old, next []bgp.Peer) error {
	var errs []error
	same := func(p bgp.Peer) func(bgp.Peer) bool {
		return func(q bgp.Peer) bool { return reflect.DeepEqual(p, q) }
	}
	for _, p := range old {
		if !slices.ContainsFunc(next, same(p)) {
			if err := s.srv.DeletePeer(context.Background(), &api.DeletePeerRequest{Address: p.Address.String()}); err != nil {
				errs = append(errs, fmt.Errorf("gobgp: remove peer %s: %w", p.Address, err))
			}
		}
	}
	for _, p := range next {
		if !slices.ContainsFunc(old, same(p)) {
			errs = append(errs, s.addPeer(p))
		}
	}
	return errors.Join(errs...)
}

func (s *Speaker) addPeer(p bgp.Peer) error {
	if err := s.srv.AddPeer(context.Background(), &api.AddPeerRequest{Peer: apiPeer(p)}); err != nil {
		return fmt.Errorf("gobgp: peer %s: %w", p.Address, err)
	}
	return nil
}

// Set implements bgp.Speaker. Only differences become UPDATEs.
func (s *Speaker) Set(ctx context.Context, set bgp.RouteSet) (bgp.Advertised, error) {
	var adv bgp.Advertised
	err := s.do(ctx, func() error {
		if s.srv == nil {
			return ErrNotConfigured
		}
		pass, refused := bgp.Guard(s.conf.Allow, set.Routes)
		err := s.announce(pass)
		if err == nil && !s.open {
			// Now, and not before: with graceful restart a peer drops what it does not hear of in time.
			err = s.changePeers(nil, s.conf.Peers)
			s.open = err == nil
		}
		if err != nil {
			return err
		}
		s.ver = set.Version
		adv = bgp.Advertised{Prefixes: s.prefixes(), Refused: refused}
		return nil
	})
	if err != nil { // adv may still be written to when ctx ended first
		return bgp.Advertised{}, err
	}
	return adv, nil
}

// announce makes the announced paths equal to routes: what is new before what goes.
func (s *Speaker) announce(routes []bgp.Route) error {
	var errs []error
	want := map[netip.Prefix]bool{}
	for _, r := range routes {
		want[r.Prefix] = true
		if old, ok := s.paths[r.Prefix]; ok && reflect.DeepEqual(old, r) {
			continue
		}
		path, err := apiPath(r)
		if err == nil {
			_, err = s.srv.AddPath(context.Background(), &api.AddPathRequest{TableType: api.TableType_GLOBAL, Path: path})
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("gobgp: announce %s: %w", r.Prefix, err))
			continue
		}
		r.Communities, r.LargeCommunities = slices.Clone(r.Communities), slices.Clone(r.LargeCommunities)
		s.paths[r.Prefix] = r
	}
	for _, p := range s.prefixes() {
		if want[p] {
			continue
		}
		if err := s.withdraw(s.paths[p]); err != nil {
			errs = append(errs, err)
			continue
		}
		delete(s.paths, p)
	}
	return errors.Join(errs...)
}

func (s *Speaker) withdraw(r bgp.Route) error {
	path, err := apiPath(r)
	if err == nil {
		err = s.srv.DeletePath(context.Background(), &api.DeletePathRequest{TableType: api.TableType_GLOBAL, Path: path})
	}
	if err != nil {
		return fmt.Errorf("gobgp: withdraw %s: %w", r.Prefix, err)
	}
	return nil
}

func (s *Speaker) prefixes() []netip.Prefix {
	return slices.SortedFunc(maps.Keys(s.paths), netip.Prefix.Compare)
}

// Status implements bgp.Speaker.
func (s *Speaker) Status(ctx context.Context) (bgp.Status, error) {
	st := bgp.Status{Implementation: Implementation}
	err := s.do(ctx, func() error {
		st.Configured, st.Version = s.srv != nil, s.ver
		for _, p := range s.prefixes() {
			st.Routes = append(st.Routes, s.paths[p])
		}
		if !s.open {
			for _, p := range s.conf.Peers {
				st.Peers = append(st.Peers, bgp.PeerState{Address: p.Address, ASN: p.ASN, State: "IDLE"})
			}
			return nil
		}
		return s.srv.ListPeer(context.Background(), &api.ListPeerRequest{}, func(p *api.Peer) {
			st.Peers = append(st.Peers, s.peerState(p))
		})
	})
	if err != nil { // st may still be written to when ctx ended first
		return bgp.Status{}, err
	}
	slices.SortFunc(st.Peers, func(a, b bgp.PeerState) int { return a.Address.Compare(b.Address) })
	return st, nil
}

// Close implements bgp.Speaker. After it only the end of the process is left: with Keep the kernel then closes the
// connections without a Cease, and peers with graceful restart keep the routes.
func (s *Speaker) Close(ctx context.Context, mode bgp.CloseMode) error {
	if mode == bgp.Drain {
		if err := s.drain(ctx); err != nil {
			s.log.s.Warn("not drained", "err", err)
		}
	}
	return s.do(ctx, func() error {
		s.done = true
		if s.srv == nil || mode == bgp.Keep {
			return nil
		}
		// A Cease takes all routes of a session with it.
		return s.srv.StopBgp(context.Background(), &api.StopBgpRequest{})
	})
}

// drain marks every route and waits, as long as ctx leaves time for what comes after.
func (s *Speaker) drain(ctx context.Context) error {
	var announced bool
	err := s.do(ctx, func() error {
		if s.srv == nil || len(s.paths) == 0 {
			return nil
		}
		announced = true
		var marked []bgp.Route
		for _, p := range s.prefixes() {
			r := s.paths[p]
			if !slices.Contains(r.Communities, bgp.GracefulShutdown) {
				r.Communities = append(slices.Clone(r.Communities), bgp.GracefulShutdown)
			}
			marked = append(marked, r)
		}
		return s.announce(marked)
	})
	if err != nil || !announced {
		return err
	}
	wait := drainWait
	if end, ok := ctx.Deadline(); ok {
		wait = min(wait, time.Until(end)/2)
	}
	select {
	case <-time.After(wait):
	case <-ctx.Done():
	}
	return nil
}
