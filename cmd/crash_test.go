package cmd

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// points are the failpoints of a service on bbolt. The first start alone sends gateways a table in chunks.
var points = []string{"tep-before-chunk", "store-before-commit", "store-after-commit", "before-reply", "tep-before-batch", "tep-ack"}

// TestKilledAtPoints: a lease service that is killed at any named point loses nothing that it acknowledged and gives
// nothing to two.
func TestKilledAtPoints(t *testing.T) {
	rnd := seeded(t)
	s := newStand(t, 16, rnd)
	for _, point := range points {
		most := 100
		if point == "tep-before-chunk" {
			most = 2
		}
		at := fmt.Sprintf("%s=kill@%d", point, 1+rnd.IntN(most))
		t.Log(at)
		p := s.service(at)
		s.killed(p)
		s.whole()
		p = s.service("")
		s.working(p, 50)
		s.settled()
		p.stop(syscall.SIGKILL)
	}
}

// TestKilledAtRandom: and neither does one that is killed at any time: 2 times here, 20 with DSTM_TEST_FULL=1, 300 with
// DSTM_SOAK=1.
func TestKilledAtRandom(t *testing.T) {
	rounds := 2
	switch {
	case os.Getenv("DSTM_SOAK") == "1":
		rounds = 300
	case os.Getenv("DSTM_TEST_FULL") == "1":
		rounds = 20
	}
	rnd := seeded(t)
	s := newStand(t, 16, rnd)
	for range rounds {
		p := s.service("")
		s.working(p, 1+rnd.IntN(200))
		time.Sleep(time.Duration(rnd.IntN(20)) * time.Millisecond)
		p.stop(syscall.SIGKILL)
		s.whole()
		p = s.service("")
		s.working(p, 20)
		s.settled()
		p.stop(syscall.SIGKILL)
	}
}

// TestKilledFindsBugs: the checks above see a service that acknowledges what is not durable.
func TestKilledFindsBugs(t *testing.T) {
	s := newStand(t, 16, seeded(t))
	for range 20 {
		p := s.service("bug-not-durable=error,store-before-commit=50ms")
		s.working(p, 50)
		p.stop(syscall.SIGKILL)
		p = s.service("")
		s.working(p, 20)
		if err := s.compare(recovery); err != nil {
			t.Fatal(err)
		}
		p.stop(syscall.SIGKILL)
		s.mu.Lock()
		found := len(s.broken)
		s.mu.Unlock()
		if found > 0 {
			return
		}
	}
	t.Error("nothing was found")
}

// TestNoFailpoints: the programs that are installed have none of this.
func TestNoFailpoints(t *testing.T) {
	for file, want := range map[string]bool{
		breakable(t, "leasesvc"): true, filepath.Join(programs, "leasesvc"): false,
		breakable(t, "tepd"): true, filepath.Join(programs, "tepd"): false,
	} {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if got := bytes.Contains(b, []byte("DSTM_FAILPOINTS")); got != want {
			t.Errorf("%s knows failpoints: %t, want %t", file, got, want)
		}
	}
}
