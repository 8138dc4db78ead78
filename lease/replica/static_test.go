package replica

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/dstm-project/dstm/lease"
)

var (
	at2 = netip.MustParseAddrPort("[2001:db8:3::2]:3546")
	at3 = netip.MustParseAddrPort("[2001:db8:3::3]:3546")
)

// inSession returns a gateway in session 1 whose last answered heartbeat was sent at 100 and answered at 110: d is 1000,
// the heartbeat period 250, D 5000. Its deadline is 1100.
func inSession(t *testing.T, others ...lease.Peer) *Replica {
	t.Helper()
	r := New(Config{TEP: "tep1", Instance: "i"})
	r.Hello(100)
	rep := reply(1, 100, 0)
	rep.NextBeatNS, rep.FailStaticNS, rep.ServiceNS, rep.Others = 250, 5000, 77, others
	if _, err := r.Session(rep, 110); err != nil {
		t.Fatal(err)
	}
	must(t, r.Snapshot, lease.SnapshotChunk{Session: 1, Rev: 10, Last: true})
	if out := r.Applied(10); out.Deadline != 1100 {
		t.Fatalf("deadline %d, want 1100", out.Deadline)
	}
	return r
}

func TestGoOn(t *testing.T) {
	two := []lease.Peer{{TEP: "tep2", Question: at2}, {TEP: "tep3", Question: at3}}
	ask := func(t *testing.T, r *Replica, at uint64) Question {
		t.Helper()
		q, out := r.Ask(at)
		if q.Sent != at || out != (Out{}) {
			t.Fatalf("question %+v, %+v: want one sent at %d", q, out, at)
		}
		return q
	}
	t.Run("nothing to ask while the service answers", func(t *testing.T) {
		r := inSession(t, two...)
		if q, out := r.Ask(360); q.Sent != 0 || out != (Out{}) {
			t.Errorf("question %+v %+v within a heartbeat period", q, out)
		}
	})
	t.Run("all are quiet", func(t *testing.T) {
		r := inSession(t, two...)
		if q := ask(t, r, 400); !cmp.Equal(q.Others, two, equate) {
			t.Errorf("asks %v, want %v", q.Others, two)
		}
		if out := r.Answer("tep2", 400, true, 410); out != (Out{}) {
			t.Errorf("one of two answered: %+v", out)
		}
		if out := r.Answer("tep2", 400, true, 411); out != (Out{}) {
			t.Errorf("the same one again: %+v", out)
		}
		if out := r.Answer("tep3", 400, true, 900); out.Deadline != 1400 {
			t.Errorf("deadline %d, want 1400: d from the sending of the question", out.Deadline)
		}
		if r.Alone() {
			t.Error("alone although nobody has a session")
		}
	})
	t.Run("an older reply comes late", func(t *testing.T) {
		r := inSession(t, two...)
		rep := reply(1, 100, 0)
		rep.NextBeatNS, rep.FailStaticNS, rep.ServiceNS, rep.Others = 250, 5000, 76, two[:1]
		if _, err := r.Session(rep, 120); err != nil {
			t.Fatal(err)
		}
		if q := ask(t, r, 400); !cmp.Equal(q.Others, two, equate) {
			t.Errorf("asks %v, want those of the newest reply: %v", q.Others, two)
		}
	})
	t.Run("answers of an older question", func(t *testing.T) {
		r := inSession(t, two[:1]...)
		ask(t, r, 400)
		ask(t, r, 500)
		if out := r.Answer("tep2", 400, true, 510); out != (Out{}) {
			t.Errorf("an answer to the question before: %+v", out)
		}
	})
	t.Run("one has a session", func(t *testing.T) {
		r := inSession(t, two...)
		ask(t, r, 400)
		if out := r.Answer("tep3", 400, false, 410); out != (Out{}) || !r.Alone() {
			t.Errorf("%+v, alone %t: want no later deadline, and to be alone", out, r.Alone())
		}
		if out := r.Answer("tep2", 400, true, 411); out != (Out{}) {
			t.Errorf("went on although one has a session: %+v", out)
		}
		rep := reply(1, 100, 0)
		if _, err := r.Session(rep, 420); err != nil || r.Alone() {
			t.Errorf("still alone after a session reply, %v", err)
		}
	})
	t.Run("not after the deadline", func(t *testing.T) {
		r := inSession(t, two[:1]...)
		ask(t, r, 1000)
		if out := r.Answer("tep2", 1000, true, 1101); out != (Out{}) {
			t.Errorf("the deadline had passed: %+v", out)
		}
		if q, _ := r.Ask(1101); q.Sent != 0 {
			t.Error("asks although the deadline has passed")
		}
	})
	t.Run("never beyond D", func(t *testing.T) {
		r := inSession(t)
		last := uint64(0)
		for at := uint64(400); at < 8000; at += 100 {
			q, out := r.Ask(at)
			if q.Sent != 0 {
				t.Fatalf("asks %v, nobody is there", q.Others)
			}
			last = max(last, out.Deadline)
		}
		if last != 5100 {
			t.Errorf("went on until %d, want 5100: D after the last answered heartbeat", last)
		}
	})
}

func TestContinuous(t *testing.T) {
	r := inSession(t)
	beat := func(at uint64) [2]uint64 {
		h := r.Heartbeat(at)
		return [2]uint64{h.EchoServiceNS, h.ContinuousNS}
	}
	if got := beat(300); got != [2]uint64{77, 190} {
		t.Errorf("heartbeat says %v, want the reply 77 and 190 in session", got)
	}
	if r.Asked(360) {
		t.Error("quiet within a heartbeat period of the last reply")
	}
	if got := beat(360); got[1] != 250 {
		t.Errorf("answering that there is a session ended it: %v", got)
	}
	if !r.Asked(361) {
		t.Error("not quiet after more than a heartbeat period without a reply")
	}
	if got := beat(362); got[1] != 0 {
		t.Errorf("saying that there is none did not end the session: %v", got)
	}
	rep := reply(1, 362, 0)
	rep.ServiceNS = 90
	if _, err := r.Session(rep, 400); err != nil {
		t.Fatal(err)
	}
	if got := beat(500); got != [2]uint64{90, 100} {
		t.Errorf("heartbeat says %v, want a session that began with the next reply", got)
	}
	if got := beat(1363); got[1] != 0 {
		t.Errorf("the session is over with its grant: %v", got)
	}
	r.Hello(1400)
	if got := beat(1401); got != [2]uint64{0, 0} {
		t.Errorf("a new stream speaks of the session before: %v", got)
	}
}
