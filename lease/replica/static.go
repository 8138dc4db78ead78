package replica

import (
	"slices"

	"github.com/dstm-project/dstm/lease"
)

// static is how a gateway goes on while the lease service is away (design rule F9). All times are boot times in ns.
//
// A session reply lets it forward for d. From one heartbeat period of silence on it asks every other gateway that the last
// reply named whether it has a session. While all say no, and its own deadline still runs, it may go on for d from the
// sending of the question, but never beyond D from its last answered heartbeat. Who says no ends its own continuous
// session with that, and is for as long no witness that the asking one has stopped.
type static struct {
	others []lease.Peer
	grant  uint64 // d
	limit  uint64 // send time of the last answered heartbeat + D
	period uint64 // between heartbeats
	heard  uint64 // when the last reply came; 0 = never
	until  uint64 // own session: send time of the last answered heartbeat + d
	began  uint64 // continuous session; 0 = none
	echo   uint64 // ServiceNS of the newest reply of this session

	asked uint64          // send time of the question under way; 0 = none
	wait  map[string]bool // who has not answered it yet
	alone bool            // one of them has a session, and this one does not
}

// answered notes a session reply.
func (s *static) answered(m lease.SessionReply, now uint64) {
	if m.ServiceNS >= s.echo || seeded("others of an older reply") {
		// The heartbeats say which reply is the newest: the service counts on its list, also if an older one comes late.
		s.others, s.grant, s.period = slices.Clone(m.Others), m.GrantNS, m.NextBeatNS
	}
	s.limit, s.heard = max(s.limit, m.EchoBootNS+m.FailStaticNS), now
	if s.began == 0 || now > s.until {
		s.began = now
	}
	s.until = max(s.until, m.EchoBootNS+m.GrantNS)
	s.echo = max(s.echo, m.ServiceNS)
	s.asked, s.wait, s.alone = 0, nil, false
}

func (s *static) continuous(now uint64) uint64 {
	if s.began == 0 || now > s.until {
		return 0
	}
	return now - s.began
}

// quiet reports whether the service has been silent for longer than one heartbeat period.
func (s *static) quiet(now uint64) bool { return s.heard == 0 || now-s.heard > s.period }

// Asked answers the question of another gateway whether this one has no session with the service. Saying yes, that it has
// none, ends its continuous session.
func (r *Replica) Asked(bootNS uint64) (quiet bool) {
	if !r.static.quiet(bootNS) {
		return false
	}
	if !seeded("quiet and in session") {
		r.static.began = 0
	}
	return true
}

// Question is what to ask every one of Others now.
type Question struct {
	Sent   uint64 // CLOCK_BOOTTIME ns; comes back in Answer
	Others []lease.Peer
}

// Ask returns the question to ask now, when one is due: there is none while the service answers or once the own deadline
// has passed. Without others there is nobody to ask, and Out extends the deadline at once.
func (r *Replica) Ask(bootNS uint64) (Question, Out) {
	s := &r.static
	if s.heard == 0 || !s.quiet(bootNS) || bootNS > r.deadline && !seeded("back after the deadline") || bootNS > s.limit {
		return Question{}, Out{}
	}
	s.asked, s.wait = bootNS, map[string]bool{}
	for _, p := range s.others {
		s.wait[p.TEP] = true
	}
	if len(s.wait) == 0 {
		return Question{}, r.goOn(bootNS)
	}
	return Question{Sent: bootNS, Others: slices.Clone(s.others)}, Out{}
}

// Answer takes what another gateway said to the question sent at a boot time.
func (r *Replica) Answer(tep string, sent uint64, quiet bool, bootNS uint64) Out {
	s := &r.static
	stranger := !s.wait[tep]
	if sent == 0 || sent != s.asked && !seeded("answer to an earlier question") || stranger && !seeded("answer of a stranger") {
		return Out{}
	}
	if !quiet {
		s.asked, s.wait, s.alone = 0, nil, true
		return Out{}
	}
	delete(s.wait, tep)
	if open := len(s.wait); open > 1 || open == 1 && !stranger && !seeded("counts itself") {
		return Out{}
	}
	s.alone = false
	return r.goOn(bootNS)
}

// goOn extends the deadline by the question that everybody answered, while it still runs: once it has passed, the service
// may count this gateway as stopped.
func (r *Replica) goOn(bootNS uint64) Out {
	s := &r.static
	to := min(s.asked+s.grant, s.limit)
	if seeded("from the answer") {
		to = min(bootNS+s.grant, s.limit)
	}
	if seeded("without end") {
		to = s.asked + s.grant
	}
	s.asked, s.wait = 0, nil
	if bootNS > r.deadline && !seeded("back after the deadline") || to <= r.deadline {
		return Out{}
	}
	r.deadline = to
	return Out{Deadline: to}
}

// QuestionEvery is how often Ask wants to be called, in ns; 0 before the first session.
func (r *Replica) QuestionEvery() uint64 { return r.static.period / 2 }

// Alone reports whether another gateway has a session while this one has none: it must not attract traffic (I10).
func (r *Replica) Alone() bool { return r.static.alone }
