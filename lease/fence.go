package lease

import (
	"fmt"
	"net/netip"
	"slices"
	"time"
)

// FenceConfig says how long a gateway may forward without hearing from the service.
type FenceConfig struct {
	// FailStatic is D: as long after its last answered heartbeat a gateway may go on while no other one has a session.
	FailStatic time.Duration
	// Session is d: the deadline granted with every session reply, counted from the gateway's own send time. 0 = D, for a
	// cell with one gateway.
	Session time.Duration
	Epoch   Epoch         // of the store: sessions of a restored one come after all of before
	RatePPM int64         // by how much the clocks of two machines may run apart; 0 = 500
	MaxLag  time.Duration // a gateway whose acknowledgement is this late serves no more; 0 = 1s
}

// FenceSet knows every gateway that may still forward for the cell, and up to which revoke all of them are fenced (F4).
// A gateway joins with its first Hello, before it gets a byte, and stays: membership is durable. Deadlines are not; a
// restarted service assumes the full horizon for every member.
//
// Only its current session speaks for a gateway: a Hello, from a new process (instance) or the same one, ends the
// session before it, and what was acknowledged there counts no more. FenceSet has no clock; like Core it is used by one
// goroutine, and now must never go back.
//
// A gateway that falls silent is fenced by time (F9): at the latest FailStatic after its last heartbeat, and much sooner
// when a witness, another gateway that it would have to ask before it went on, has been in session without a break for
// longer than the silent one's last grant can have lasted.
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
	deadline time.Duration // later than any the gateway can reach by itself
	silent   time.Duration // later than any grant of the service
	long     time.Duration // later than every grant longer than the present ones
	before   bool          // it may still go by a reply of before the start
	far      time.Duration // later than what it can reach by a D longer than the present one
	fenced   fenceCause
	echo     uint64  // ServiceNS that it echoed last, in this session
	replies  []reply // from the last one that it is known to have received on
}

// reply is the list of others that went out with a session reply.
type reply struct {
	session, at uint64
	others      []string
	received    bool // echoed
}

// fenceCause says why a gateway counts as fenced before its deadline.
type fenceCause uint8

const (
	notFenced fenceCause = iota
	byWitness            // F9
	byOrder              // an operator vouches that it is off
)

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
	// FailStatic is the longest D that it was told and may still go by. It outlives a restart with a shorter one, too.
	FailStatic time.Duration
	// Question is where the gateway answers the questions of others (F9), an IPv6 address and a port; zero = nowhere.
	Question netip.AddrPort
	// Witnesses are the gateways, sorted, that may witness against this one: those in every list of others that it may
	// act on (F9).
	Witnesses []string
}

// Restored returns the record of a member as a store that was restored from a copy must take it. Since the copy was made the
// gateway may have got longer grants and lists without those that are witnesses here: nobody may speak against it before it
// has a list again, and its grants may run for failStatic.
func (m Member) Restored(failStatic time.Duration) Member {
	if seeded("witnesses of a copy") {
		return m
	}
	m.Witnesses, m.Horizon, m.FailStatic = nil, max(m.Horizon, failStatic), max(m.FailStatic, failStatic)
	return m
}

// TEPStatus is one member as operators see it.
type TEPStatus struct {
	Member
	Live     bool // its stream is up
	Serving  bool // see FenceSet.Serving
	Acked    Rev  // in this session
	Head     Rev
	Deadline time.Duration // until the service counts it as fenced by time; 0 = it is
	Fenced   string        // why it counts as fenced already: "time", "witness", "order"; empty = it does not
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
	if cfg.Session == 0 || cfg.Session > cfg.FailStatic {
		cfg.Session = cfg.FailStatic
	}
	f := &FenceSet{cfg: cfg, teps: map[string]*member{}, head: head, due: head}
	for _, m := range members {
		granted := now + f.horizon(max(m.Horizon, cfg.Session))
		if seeded("deadlines forgotten at the start") {
			f.teps[m.TEP] = &member{Member: m}
			continue
		}
		if seeded("shorter D at once") {
			m.FailStatic = 0
		}
		deadline := now + f.horizon(max(m.Horizon, m.FailStatic, cfg.FailStatic))
		f.teps[m.TEP] = &member{
			Member: m, deadline: deadline, silent: granted, long: granted, far: deadline, before: m.Question.IsValid() && !seeded("shorter session lease at once"),
		}
	}
	return f
}

// horizon is a time of d on the slowest clock that is allowed.
func (f *FenceSet) horizon(d time.Duration) time.Duration {
	return d + time.Duration(int64(d)/1_000_000*f.cfg.RatePPM) + time.Millisecond
}

// Hello begins a session and returns the member record, which must be durable before anything is sent to the gateway.
func (f *FenceSet) Hello(now time.Duration, tep, instance string, question netip.AddrPort) Member {
	m := f.teps[tep]
	if m == nil {
		m = &member{Member: Member{TEP: tep}, long: now, far: now}
		f.teps[tep] = m
	}
	m.Session = max(m.Session, f.cfg.Epoch.sessions()) + 1
	m.Instance, m.Question = instance, question
	m.acked, m.heard, m.live, m.echo = 0, false, true, 0
	m.deadline = max(m.deadline, now)
	f.grantable(now, m)
	return m.Member
}

// grantable makes the member record cover what would be granted now, and returns how long that is. One that cannot be
// asked cannot ask either: it would stop after d when the service does, so it gets D, and no witness can speak against it.
func (f *FenceSet) grantable(now time.Duration, m *member) time.Duration {
	grant := f.cfg.Session
	if !m.Question.IsValid() {
		grant = f.cfg.FailStatic
	}
	if now > m.long && !m.before {
		m.Horizon = 0 // whatever was granted for longer has passed
	}
	m.Horizon = max(m.Horizon, grant)
	if now > m.far {
		m.FailStatic = 0
	}
	m.FailStatic = max(m.FailStatic, f.cfg.FailStatic)
	return grant
}

// Granted is what a session reply says.
type Granted struct {
	Session    time.Duration // GrantNS
	FailStatic time.Duration // FailStaticNS
	Floor      Rev
	ServiceNS  uint64
	Others     []Peer
	// Member, when not nil, must be durable before the reply leaves.
	Member *Member
}

// Grant extends the deadline of the gateway on receipt of its Hello or Heartbeat. last is Cell.Last at this very moment:
// every revoke that may already count as fenced because the deadline had run out is at or below it, and the gateway
// applies those before it forwards again (F7).
func (f *FenceSet) Grant(now time.Duration, tep string, session uint64, last Rev) (Granted, error) {
	m, err := f.current(tep, session)
	if err != nil {
		return Granted{}, err
	}
	if m.before && m.echo != 0 {
		// It has a reply of ours now. Before, it may have gone on by the others' silence for as long as an older one said.
		m.before, m.long = false, max(m.long, now+f.horizon(m.Horizon))
	}
	before, far := m.Horizon, m.FailStatic
	grant := f.grantable(now, m)
	if !seeded("fenced for ever") {
		m.fenced = notFenced
	}
	m.deadline = max(m.deadline, now+f.horizon(f.cfg.FailStatic))
	m.silent = max(m.silent, now+f.horizon(grant))
	if grant == m.Horizon {
		m.long = m.silent
	}
	if m.FailStatic == f.cfg.FailStatic {
		m.far = m.deadline
	}
	g := Granted{Session: grant, FailStatic: f.cfg.FailStatic, Floor: last, ServiceNS: uint64(now) + 1}
	var names []string
	if m.Question.IsValid() {
		for _, name := range f.names(func(o *member) bool { return o != m && o.live && o.Question.IsValid() }) {
			names = append(names, name)
			g.Others = append(g.Others, Peer{TEP: name, Question: f.teps[name].Question})
		}
	}
	m.replies = append(m.replies, reply{session: session, at: g.ServiceNS, others: names})
	if f.rewitness(m) || m.Horizon != before || m.FailStatic != far {
		rec := m.Member
		g.Member = &rec
	}
	return g, nil
}

// maxReplies bounds what is kept of replies that were not echoed. Without the oldest the newest must do: their lists count
// all the same, since whoever is missing in one of them stays out.
const maxReplies = 64

// rewitness works out who may witness against a gateway: those in the list of the last reply that it is known to have and
// in all later ones. It reports whether the member record changed.
func (f *FenceSet) rewitness(m *member) bool {
	if len(m.replies) > maxReplies {
		a, b := m.replies[0], m.replies[1]
		b.others = slices.DeleteFunc(slices.Clone(b.others), func(n string) bool { return !slices.Contains(a.others, n) })
		m.replies = slices.Delete(m.replies, 0, 1)
		m.replies[0] = b
	}
	var w []string
	for i, r := range m.replies {
		if i == 0 {
			w = slices.Clone(r.others)
			continue
		}
		w = slices.DeleteFunc(w, func(n string) bool { return !slices.Contains(r.others, n) })
	}
	// Replies of before a restart of the service are not here: until one of ours is echoed, the stored set bounds it.
	if len(m.replies) > 0 && !m.replies[0].received {
		w = slices.DeleteFunc(w, func(n string) bool { return !slices.Contains(m.Witnesses, n) })
	}
	if slices.Equal(w, m.Witnesses) {
		return false
	}
	m.Witnesses = w
	return true
}

// Beat notes what a heartbeat says beside asking for a Grant, which comes after it: which reply it has, and for how long
// it has been in session. It returns the member record, when that changed; it may become durable at leisure.
func (f *FenceSet) Beat(tep string, b Heartbeat) (*Member, error) {
	m, err := f.current(tep, b.Session)
	if err != nil {
		return nil, err
	}
	changed := false
	if i := slices.IndexFunc(m.replies, func(r reply) bool { return r.session == b.Session && r.at == b.EchoServiceNS }); i >= 0 && b.EchoServiceNS != 0 {
		m.replies = slices.Delete(m.replies, 0, i)
		m.replies[0].received = true
		m.echo = b.EchoServiceNS
		changed = f.rewitness(m)
	}
	for _, t := range f.teps {
		f.witness(t, m, time.Duration(b.ContinuousNS))
	}
	if changed {
		rec := m.Member
		return &rec, nil
	}
	return nil, nil
}

// witness fences a silent gateway when w proves that nobody has told it to go on (F9): w has an answer from after the
// last grant of t ran out, and has been in session since before the last question whose answer t could still live on.
func (f *FenceSet) witness(t, w *member, continuous time.Duration) {
	if t == w || t.fenced != notFenced || w.echo == 0 {
		return
	}
	horizon := f.horizon(t.Horizon)
	if seeded("witness without a margin") {
		horizon = t.Horizon
	}
	asked := slices.Contains(t.Witnesses, w.TEP) || seeded("any witness")
	heard := w.echo-1 > uint64(t.silent) || seeded("witness that heard nothing since")
	if asked && heard && (continuous > horizon || seeded("witness of a short session")) {
		t.fenced = byWitness
	}
}

// Order notes that an operator vouches for a gateway being off. It holds until the gateway says Hello.
func (f *FenceSet) Order(tep string) error {
	m := f.teps[tep]
	switch {
	case m == nil:
		return fmt.Errorf("gateway %s is not in the fence set", tep)
	case m.live:
		return fmt.Errorf("gateway %s has a live stream: it is not off", tep)
	}
	m.fenced = byOrder
	return nil
}

// Remove takes a gateway that is fenced out of the set.
func (f *FenceSet) Remove(now time.Duration, tep string) error {
	m := f.teps[tep]
	switch {
	case m == nil:
		return fmt.Errorf("gateway %s is not in the fence set", tep)
	case m.live:
		return fmt.Errorf("gateway %s has a live stream: take it out of service first", tep)
	case m.may(now):
		return fmt.Errorf("gateway %s may still forward for %s: wait, or fence it", tep, (m.deadline - now).Round(time.Second))
	}
	delete(f.teps, tep)
	return nil
}

// may reports whether the gateway may still forward.
func (m *member) may(now time.Duration) bool { return m.fenced == notFenced && now <= m.deadline }

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
// acknowledged it, or is fenced by time, witness or order. MaxRev when no member can forward at all. The answer holds for now only.
func (f *FenceSet) Watermark(now time.Duration) Rev {
	low := MaxRev
	for _, m := range f.teps {
		if m.may(now) {
			low = min(low, m.acked)
		}
	}
	return low
}

// Prompt reports whether every gateway that may forward has a stream, so that a revoke will be fenced in a moment.
func (f *FenceSet) Prompt(now time.Duration) bool {
	for _, m := range f.teps {
		if m.may(now) && !m.live {
			return false
		}
	}
	return true
}

// Waiting returns the members, sorted, that still have to be fenced for a revoke at rev.
func (f *FenceSet) Waiting(now time.Duration, rev Rev) []string {
	return f.names(func(m *member) bool { return m.may(now) && m.acked < rev })
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
		if m.may(now) && (!ok || m.deadline < at) {
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
		st := TEPStatus{Member: m.Member, Live: m.live, Serving: f.serves(m), Acked: m.acked, Head: f.head}
		if m.may(now) {
			st.Deadline = m.deadline - now
		} else {
			st.Fenced = [...]string{notFenced: "time", byWitness: "witness", byOrder: "order"}[m.fenced]
		}
		out = append(out, st)
	}
	return out
}
