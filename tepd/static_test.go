package tepd

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dstm-project/dstm/lease"
)

// fakePeers is the other gateways of a cell, all in the same state.
type fakePeers struct {
	mu    sync.Mutex
	quiet bool
	err   error
	asked func() bool
	asks  int
}

func (p *fakePeers) Ask(_ context.Context, to lease.Peer) (bool, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.asks++
	if to.TEP != "tep2" {
		return false, errors.New("nobody is to be asked but tep2")
	}
	return p.quiet, p.err
}

func (p *fakePeers) Serve(ctx context.Context, asked func() bool) error {
	p.mu.Lock()
	p.asked = asked
	p.mu.Unlock()
	<-ctx.Done()
	return nil
}

const (
	grantFor   = 30 * time.Second // d
	failStatic = time.Hour        // D
)

// cutOff runs a gateway that is up and loses the lease service at the time returned.
func cutOff(t *testing.T, p *fakePeers) (*world, time.Duration) {
	t.Helper()
	w := newWorld(t, testConfig+testBGP+"peers: {listen: \"[2001:db8:3::11]:3546\"}\n")
	w.g.Peers = p
	w.start()
	st := w.stream()
	if want := netip.MustParseAddrPort("[2001:db8:3::11]:3546"); st.hello.Question != want {
		t.Errorf("hello says that it answers at %s, want %s", st.hello.Question, want)
	}
	w.send(st, lease.SessionReply{
		Session: 1, EchoBootNS: st.hello.SentBootNS, GrantNS: uint64(grantFor), Floor: 10, Cluster: cluster, Epoch: 1,
		NextBeatNS: uint64(grantFor / 4), FailStaticNS: uint64(failStatic), ServiceNS: 5,
		Others: []lease.Peer{{TEP: "tep2", Question: netip.MustParseAddrPort("[2001:db8:3::12]:3546")}},
	})
	w.send(st, lease.SnapshotChunk{Session: 1, Rev: 10, Last: true, Records: []lease.Record{
		lease.PoolRecord(1, pool, false), lease.BindRecord(3, binding(1, 3)),
	}})
	time.Sleep(5 * time.Second)
	if err := w.g.Ready(); err != nil {
		t.Fatalf("not up: %v", err)
	}
	w.service.setDown(true)
	close(st.broken)
	return w, time.Duration(st.hello.SentBootNS)
}

// forwards reports whether the packet path forwards at this instant.
func (w *world) forwards() bool {
	synctest.Wait()
	_, deadline := w.path.has()
	return uint64(w.now()) <= deadline
}

// TestServiceGoneForAll: the service is away for longer than any gateway may go on. Until then nothing stops and nothing
// is withdrawn (I10).
func TestServiceGoneForAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &fakePeers{quiet: true}
		w, sent := cutOff(t, p)
		for w.now() < sent+failStatic-time.Second {
			if !w.forwards() || w.g.Ready() != nil || len(w.speaker.announced()) == 0 {
				t.Fatalf("%s after the last answer: forwards %t, ready %v, announces %v", w.now()-sent, w.forwards(), w.g.Ready(), w.speaker.announced())
			}
			time.Sleep(10 * time.Second)
		}
		time.Sleep(sent + failStatic - w.now() + 5*time.Second)
		if w.forwards() || w.g.Ready() == nil || len(w.speaker.announced()) != 0 {
			t.Errorf("after D: forwards %t, ready %v, announces %v", w.forwards(), w.g.Ready(), w.speaker.announced())
		}
		w.end()
	})
}

// TestCutOffAlone: another gateway has a session. This one withdraws at once and stops within d (I10).
func TestCutOffAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, sent := cutOff(t, &fakePeers{})
		time.Sleep(sent + grantFor/2 - w.now() + 4*time.Second) // a heartbeat period, half of one more, and the fall of the self-test
		if err := w.g.Ready(); err == nil || !strings.Contains(err.Error(), "this gateway alone is cut off") || len(w.speaker.announced()) != 0 {
			t.Errorf("ready: %v, announces %v", err, w.speaker.announced())
		}
		if !w.forwards() {
			t.Error("what is under way is not forwarded any more, although the deadline runs")
		}
		time.Sleep(sent + grantFor - w.now() + time.Millisecond)
		if w.forwards() {
			t.Error("forwards after d")
		}
		w.end()
	})
}

// TestNobodyAnswers: a gateway that can ask nobody must take itself for the one that is cut off.
func TestNobodyAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &fakePeers{quiet: true, err: errors.New("no route to host")}
		w, sent := cutOff(t, p)
		time.Sleep(sent + grantFor - w.now() + time.Millisecond)
		if w.forwards() || p.asks == 0 {
			t.Errorf("forwards %t after d, asked %d times", w.forwards(), p.asks)
		}
		w.end()
	})
}

// TestAsked: what others hear from this gateway.
func TestAsked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &fakePeers{quiet: true}
		w, sent := cutOff(t, p)
		if p.asked() {
			t.Error("quiet within a heartbeat period of the last answer")
		}
		time.Sleep(sent + grantFor/4 - w.now() + time.Second)
		if !p.asked() {
			t.Error("not quiet although the service has been silent for more than a heartbeat period")
		}
		w.end()
	})
}

// TestUpload: a service that was restored from a copy is told what the packet path holds; nothing changes meanwhile.
func TestUpload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, testConfig)
		w.start()
		st := w.stream()
		w.sync(st, 1, time.Minute)
		_, deadline := w.path.has()
		close(st.broken)
		time.Sleep(time.Second)
		st = w.stream()
		w.send(st, lease.Upload{})
		if len(st.table) != 1 || !st.table[0].Last || len(st.table[0].Held) != 1 || st.table[0].Held[0] != binding(1, 3) {
			t.Errorf("table %+v, want the one binding", st.table)
		}
		if n, d := w.path.has(); n != 1 || d != deadline {
			t.Errorf("the packet path holds %d entries until %d after the upload, want 1 until %d", n, d, deadline)
		}
		w.end()
	})
}
