package lease_test

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/lease/replica"
)

// A sim is one lease service and two gateways over a network that delays, drops, doubles and reorders messages. Every
// choice is drawn, so a schedule replays. After each step the invariants are compared with what the packet paths do.
type sim struct {
	draw func(n int) int // 0 <= draw(n) < n
	bug  string          // the rule that is switched off

	now  time.Duration
	wall time.Time

	// durable
	records map[lease.Resource]lease.Address
	history []lease.Record // history[i] has revision i+1
	members map[string]lease.Member

	// the service
	cell  *lease.Cell
	core  *lease.Core
	fence *lease.FenceSet

	gates []*gate
	net   []packet

	// ghost
	granted map[lease.Resource]lease.Gen // highest generation acknowledged to a client
	gens    map[lease.Resource]lease.Gen // highest generation committed
	leases  map[string]lease.Grant       // as the hosts believe
	until   map[string]time.Duration     // what was promised to them
	reuses  int                          // addresses that changed hands
	alone   int                          // deadlines that a gateway moved without the service
	witness int                          // times that a gateway was fenced by a witness
}

// gate is a gateway: a process, and a packet path that outlives it.
type gate struct {
	name     string
	ppm      int64
	cut      bool // no messages to and from the service
	boots    int
	stream   int // number of the current stream, 0 = none
	process  int
	sent     lease.Rev // by the service on this stream
	session  uint64
	rep      *replica.Replica
	table    map[lease.Resource]lease.Binding
	deadline uint64
}

type packet struct {
	gate   *gate
	stream int
	msg    any
	from   *gate // of a question or an answer
}

// question and answer are what gateways say to each other (F9).
type (
	question struct{ sent uint64 }
	answer   struct {
		sent  uint64
		quiet bool
	}
)

// simQuestion is where gateways answer each other; the simulation goes by name.
var simQuestion = netip.MustParseAddrPort("[2001:db8:3::1]:3546")

const (
	simD    = 12 * time.Second
	simd    = 3 * time.Second
	simHost = "host"
)

func simConfig() lease.Config {
	return lease.Config{
		Pool: lease.Pool{Name: "p", Prefix: netip.MustParsePrefix("198.51.100.0/31"), TEP: netip.MustParseAddr("2001:db8:a::1")},
		Timers: lease.Timers{
			Valid: 8 * time.Second, MinValid: 2 * time.Second, MaxValid: 20 * time.Second, T1: 500, T2: 800,
			Reservation: 3 * time.Second, HoldDown: 2 * time.Second, Grace: 4 * time.Second,
		},
	}
}

func newSim(draw func(n int) int, bug string) *sim {
	s := &sim{
		draw: draw, bug: bug, wall: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC),
		records: map[lease.Resource]lease.Address{}, members: map[string]lease.Member{},
		granted: map[lease.Resource]lease.Gen{}, gens: map[lease.Resource]lease.Gen{}, leases: map[string]lease.Grant{},
		until: map[string]time.Duration{},
	}
	for i, name := range []string{"tep1", "tep2", "tep3"} {
		g := &gate{name: name, ppm: int64(i*200 - 200), table: map[lease.Resource]lease.Binding{}}
		s.gates = append(s.gates, g)
		s.process(g)
	}
	s.start()
	return s
}

func (s *sim) at() lease.Now { return lease.Now{Mono: s.now, Wall: s.wall.Add(s.now)} }

// boot is the gateway's own clock.
func (g *gate) boot(now time.Duration) uint64 {
	return uint64(1+g.boots)*uint64(time.Hour) + uint64(int64(now)+int64(now)/1_000_000*g.ppm)
}

func (g *gate) forwards(now time.Duration) bool { return g.boot(now) <= g.deadline }

// start loads the service from its store.
func (s *sim) start() {
	s.cell = lease.NewCell(1, lease.Rev(len(s.history)), 0)
	core, err := lease.NewCore(simConfig(), s.cell, s.at(), slices.Collect(maps.Values(s.records)))
	if err != nil {
		panic(err)
	}
	core.Weaken(s.bug)
	s.core = core
	cfg := lease.FenceConfig{FailStatic: simD, Session: simd, RatePPM: 500}
	s.fence = lease.NewFenceSet(cfg, s.now, s.cell.Last(), slices.Collect(maps.Values(s.members))...)
	s.fence.Weaken(s.bug)
	for _, g := range s.gates {
		g.stream, g.session = 0, 0
	}
}

func (s *sim) process(g *gate) {
	g.process++
	g.stream = 0
	g.rep = replica.New(replica.Config{TEP: g.name, Instance: fmt.Sprint(g.process), Question: simQuestion})
}

// step takes one event of the service: commit, then let it out.
func (s *sim) step(ev lease.Event) (lease.Actions, error) {
	a := s.core.Step(s.at(), ev)
	for _, c := range a.Commits {
		if c.Rev != lease.Rev(len(s.history)+1) {
			return a, fmt.Errorf("revision %d committed after %d", c.Rev, len(s.history))
		}
		s.history = append(s.history, c.Record)
		old := s.records[c.Address.Resource]
		if c.Address.State == lease.Bound && old.State != lease.Bound {
			if c.Address.Gen <= s.gens[c.Address.Resource] {
				return a, fmt.Errorf("I3: %s got generation %s after %s", c.Address.Resource, c.Address.Gen, s.gens[c.Address.Resource])
			}
			s.gens[c.Address.Resource] = c.Address.Gen
			if old.Host != "" && old.Host != c.Address.Host {
				s.reuses++
			}
		}
		s.records[c.Address.Resource] = c.Address
	}
	for _, e := range a.Ended {
		if e.Reason == lease.ReasonExpired && s.now < s.until[e.Host] {
			return a, fmt.Errorf("I2: %s of %s ended at %s, promised until %s", e.Ref, e.Host, s.now, s.until[e.Host])
		}
	}
	s.fence.Publish(s.now, s.cell.Last())
	if a.Grant != nil {
		s.granted[a.Grant.Resource] = max(s.granted[a.Grant.Resource], a.Grant.Gen)
		s.leases[a.Grant.Host] = *a.Grant
		s.until[a.Grant.Host] = s.now + a.Grant.Valid
	}
	return a, nil
}

// valid draws what a host asks for.
func (s *sim) valid() time.Duration { return time.Duration(s.draw(20)) * time.Second }

// bind checks I9 on the way.
func (s *sim) bind(host string, source byte) error {
	st := s.core.Stats()
	a, err := s.step(lease.Bind{Host: host, Source: netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 15: source}), Valid: s.valid(), Hurry: s.draw(2) == 0})
	if err == nil && a.Grant == nil && a.Wait == 0 && st.Free+st.Reserved > 0 {
		return fmt.Errorf("I9: %s was refused (%s) with %d addresses free and %d reserved", host, a.Deny, st.Free, st.Reserved)
	}
	return err
}

// act draws one step of the world.
func (s *sim) act() error {
	host := fmt.Sprint(simHost, s.draw(3))
	g := s.gates[s.draw(len(s.gates))]
	var err error
	switch s.draw(24) {
	case 0, 1:
		err = s.bind(host, host[len(host)-1])
	case 2:
		err = s.bind(host, byte(100+s.draw(2)))
	case 3, 4:
		if l, ok := s.leases[host]; ok {
			_, err = s.step(lease.Release{Host: host, Ref: l.Ref})
		}
	case 5:
		if l, ok := s.leases[host]; ok {
			_, err = s.step(lease.Renew{Host: host, Ref: l.Ref, Source: l.Source, MTU: uint16(1400 + s.draw(2)), Valid: s.valid()})
		}
	case 6:
		_, err = s.step(lease.Reserve{Host: fmt.Sprint("hinted", s.draw(4))})
	case 7:
		s.now += time.Duration(s.draw(3000)) * time.Millisecond
		_, err = s.step(lease.Tick{})
	case 8, 9:
		_, err = s.step(lease.FenceTo{Rev: s.fence.Watermark(s.now)})
	case 10:
		s.hello(g)
	case 11:
		if g.session != 0 {
			s.net = append(s.net, packet{gate: g, stream: g.stream, msg: g.rep.Heartbeat(g.boot(s.now))})
		}
	case 12:
		s.rare(g)
	case 13, 14, 15:
		s.ask(g)
	default:
		s.push()
		err = s.deliver()
	}
	if err != nil {
		return err
	}
	return s.check()
}

func (s *sim) rare(g *gate) {
	switch s.draw(8) {
	case 0: // kill -9 of a gateway: its packet path stays
		s.process(g)
	case 1: // reboot: nothing stays
		g.boots++
		g.table, g.deadline = map[lease.Resource]lease.Binding{}, 0
		s.process(g)
	case 2:
		s.start()
	case 3:
		s.fence.Close(g.name, g.session)
		g.stream, g.session = 0, 0
	case 4:
		s.now += simD
	case 5:
		g.cut = !g.cut
	case 6:
		for _, g := range s.gates {
			g.cut = true // the service is gone for all
		}
	}
}

func (s *sim) hello(g *gate) {
	if g.stream != 0 {
		return
	}
	g.process++ // also numbers streams
	g.stream, g.session, g.sent = g.process, 0, 0
	s.net = append(s.net, packet{gate: g, stream: g.stream, msg: g.rep.Hello(g.boot(s.now))})
}

// check compares the packet paths with the service: I1 and I4.
func (s *sim) check() error {
	for _, g := range s.gates {
		if !g.forwards(s.now) {
			continue
		}
		for r, b := range g.table {
			if b.Gen < s.granted[r] {
				return fmt.Errorf("I4: %s forwards %s@%s, granted is %s", g.name, r, b.Gen, s.granted[r])
			}
			a := s.records[r]
			if a.State != lease.Bound && a.State != lease.Revoking || a.Gen != b.Gen {
				return fmt.Errorf("I1: %s forwards %s@%s, which is %s@%s", g.name, r, b.Gen, a.State, a.Gen)
			}
		}
	}
	return nil
}
