package lease

import (
	"fmt"
	"net/netip"
	"slices"
	"time"
)

// FenceConfig says how long a gateway may forward without hearing from the service.
type FenceConfig struct {
	FailStatic time.Duration // D: the deadline granted with every session reply, counted from the gateway's own send time
	RatePPM    int64         // by how much the clocks of two machines may run apart; 0 = 500
	MaxLag     time.Duration // a gateway whose acknowledgement is this late serves no more; 0 = 1s
}

// FenceSet knows every gateway that may still forward for the cell, and up to which revoke all of them are fenced (F4).
// A gateway joins with its first Hello, before it gets a byte, and stays: membership is durable. Deadlines are not; a
// restarted service assumes the full horizon for every member.
//
// Only its current session speaks for a gateway: a Hello, from a new process (instance) or the same one, ends the
// session before it, and what was acknowledged there counts no more. FenceSet has no clock; like Core it is used by one
// goroutine, and now must never go back.
type FenceSet struct {
	cfg   FenceConfig
	teps  map[string]*member
	head  Rev
	due   Rev    // the newest revision that was published MaxLag ago or earlier
	marks []mark // publication times of later revisions, oldest first
}

type member struct {
	Member
	live     bool
	heard    bool // it acknowledged something in this session: the packet path has a table
	acked    Rev
	deadline time.Duration // the service's, later than the gateway's own
}

type mark struct {
	rev Rev
	at  time.Duration
}

// Member is what the store keeps of a gateway.
type Member struct {
	TEP      string
	Instance string
	Session  uint64 // the newest session given out; sessions of one gateway only grow
	// Horizon is the longest grant that may still run. It outlives a restart with a shorter one.
	Horizon time.Duration
	// Question is where the gateway answers the questions of others (F9), an IPv6 address and a port; zero = nowhere.
	Question netip.AddrPort
	// Witnesses are the gateways, sorted, that may witness against this one: those in every member list that it may act
	// on (F9).
	Witnesses []string
}

// TEPStatus is one member as operators see it.
type TEPStatus struct {
	Member
	Live     bool // its stream is up
	Serving  bool // see FenceSet.Serving
	Acked    Rev  // in this session
	Head     Rev
	Deadline time.Duration // until the service counts it as fenced by time; 0 = it is
}

// NewFenceSet returns the fence set of the members that the store knows. Each may have a grant that was made just
// before the restart, so each gets the full horizon of that time or of now, whichever is longer.
func NewFenceSet(cfg FenceConfig, now time.Duration, head Rev, members ...Member) *FenceSet {
	if cfg.RatePPM == 0 {
		cfg.RatePPM = 500
	}
	if cfg.MaxLag == 0 {
		cfg.MaxLag = time.Second
	}
	f := &FenceSet{cfg: cfg, teps: map[string]*member{}, head: head, due: head}
	for _, m := range members {
		f.teps[m.TEP] = &member{Member: m, deadline: now + f.horizon(max(m.Horizon, cfg.FailStatic))}
	}
	return f
}

// horizon is a grant of d on the slowest clock that is allowed.
func (f *FenceSet) horizon(d time.Duration) time.Duration {
	return d + time.Duration(int64(d)/1_000_000*f.cfg.RatePPM) + time.Millisecond
}

// Hello begins a session and returns the member record, which must be durable before anything is sent to the gateway.
func (f *FenceSet) Hello(now time.Duration, tep, instance string) Member {
	m := f.teps[tep]
	if m == nil {
		m = &member{Member: Member{TEP: tep}}
		f.teps[tep] = m
	}
	if m.Session++; now > m.deadline {
		m.Horizon = 0 // whatever was granted has passed
	}
	m.Horizon = max(m.Horizon, f.cfg.FailStatic)
	m.Instance = instance
	m.acked, m.heard, m.live = 0, false, true
	m.deadline = max(m.deadline, now)
	return m.Member
}

// Grant extends the deadline of the gateway on receipt of its Hello or Heartbeat and returns the reply's GrantNS and
// Floor. last is Cell.Last at this very moment: every revoke that may already count as fenced because the deadline had
// run out is at or below it, and the gateway applies those before it forwards again (F7).
func (f *FenceSet) Grant(now time.Duration, tep string, session uint64, last Rev) (grant time.Duration, floor Rev, err error) {
	m, err := f.current(tep, session)
	if err != nil {
		return 0, 0, err
	}
	m.deadline = max(m.deadline, now+f.horizon(f.cfg.FailStatic))
	return f.cfg.FailStatic, last, nil
}

// Ack notes what the gateway's packet path holds.
func (f *FenceSet) Ack(tep string, session uint64, applied Rev) error {
	m, err := f.current(tep, session)
	if err != nil {
		return err
	}
	if applied > f.head {
		return fmt.Errorf("gateway %s acknowledges revision %d, the newest is %d", tep, applied, f.head)
	}
	m.acked, m.heard = max(m.acked, applied), true
	return nil
}

func (f *FenceSet) current(tep string, session uint64) (*member, error) {
	m := f.teps[tep]
	switch {
	case m == nil:
		return nil, fmt.Errorf("gateway %s has no session", tep)
	case m.Session != session:
		return nil, fmt.Errorf("gateway %s speaks in session %d, its session is %d", tep, session, m.Session)
	}
	return m, nil
}

// Close notes that the stream of a session ended. The gateway goes on forwarding until its deadline.
func (f *FenceSet) Close(tep string, session uint64) {
	if m, err := f.current(tep, session); err == nil {
		m.live = false
	}
}

// Publish notes that revisions up to head were sent out at now.
func (f *FenceSet) Publish(now time.Duration, head Rev) {
	if head <= f.head {
		return
	}
	f.head = head
	if n := len(f.marks); n > 0 && now-f.marks[n-1].at < f.cfg.MaxLag/16 {
		f.marks[n-1].rev = head // one mark per 1/16 of the lag bounds the list; the revision counts as that much older
		return
	}
	f.marks = append(f.marks, mark{rev: head, at: now})
}

// advance moves due to the newest revision that was published MaxLag ago or earlier.
func (f *FenceSet) advance(now time.Duration) {
	n := 0
	for n < len(f.marks) && now-f.marks[n].at >= f.cfg.MaxLag {
		f.due = f.marks[n].rev
		n++
	}
	f.marks = slices.Delete(f.marks, 0, n)
}

// Watermark returns the newest revision whose revoke is fenced at now: every member has, in its current session,
// acknowledged it, or is fenced by time. MaxRev when no member can forward at all. The answer holds for now only.
func (f *FenceSet) Watermark(now time.Duration) Rev {
	low := MaxRev
	for _, m := range f.teps {
		if now <= m.deadline {
			low = min(low, m.acked)
		}
	}
	return low
}

// Waiting returns the members, sorted, that still have to be fenced for a revoke at rev.
func (f *FenceSet) Waiting(now time.Duration, rev Rev) []string {
	return f.names(func(m *member) bool { return now <= m.deadline && m.acked < rev })
}

// Serving returns the gateways, sorted, that a Bind waits for: a live stream, and no revision unacknowledged for MaxLag.
func (f *FenceSet) Serving(now time.Duration) []string {
	f.advance(now)
	return f.names(f.serves)
}

// Lagging returns the gateways, sorted, with a live stream that are not serving.
func (f *FenceSet) Lagging(now time.Duration) []string {
	f.advance(now)
	return f.names(func(m *member) bool { return m.live && !f.serves(m) })
}

// Acked returns what the gateway has acknowledged in its current session.
func (f *FenceSet) Acked(tep string) Rev {
	if m := f.teps[tep]; m != nil {
		return m.acked
	}
	return 0
}

func (f *FenceSet) serves(m *member) bool { return m.live && m.heard && m.acked >= f.due }

func (f *FenceSet) names(want func(*member) bool) []string {
	var out []string
	for name, m := range f.teps {
		if want(m) {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}

// Next returns when the next member will be fenced by time, if it says nothing until then.
func (f *FenceSet) Next(now time.Duration) (time.Duration, bool) {
	at, ok := time.Duration(0), false
	for _, m := range f.teps {
		if m.deadline >= now && (!ok || m.deadline < at) {
			at, ok = m.deadline, true
		}
	}
	return at + 1, ok // a member forwards up to and including its deadline
}

// Status lists the members by name.
func (f *FenceSet) Status(now time.Duration) []TEPStatus {
	f.advance(now)
	out := make([]TEPStatus, 0, len(f.teps))
	for _, name := range f.names(func(*member) bool { return true }) {
		m := f.teps[name]
		out = append(out, TEPStatus{
			Member: m.Member, Live: m.live, Serving: f.serves(m), Acked: m.acked, Head: f.head,
			Deadline: max(0, m.deadline-now),
		})
	}
	return out
}
