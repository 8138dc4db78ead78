package bucket

import (
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestSet(t *testing.T) {
	s := New[string](10, time.Second, 5, 2)
	took := func(at time.Duration, k string, tries int) int {
		n := 0
		for range tries {
			if s.Take(at, k) {
				n++
			}
		}
		return n
	}
	if n := took(0, "a", 20); n != 5 {
		t.Errorf("a burst of %d, want 5", n)
	}
	if n := took(99*time.Millisecond, "a", 3); n != 0 {
		t.Errorf("%d before one is earned", n)
	}
	if n := took(250*time.Millisecond, "a", 3); n != 2 {
		t.Errorf("%d after a quarter of a second, want 2", n)
	}
	if n := took(time.Hour, "a", 20); n != 5 {
		t.Errorf("%d after an hour, want the burst of 5", n)
	}
	took(time.Hour, "b", 1)
	if n := took(time.Hour, "b", 20) + took(time.Hour, "c", 20); n != 4+5 {
		t.Errorf("others took %d, want 9", n)
	}
	// a was dropped for c, and begins afresh.
	if n := took(time.Hour, "a", 20); n != 5 {
		t.Errorf("one that was dropped took %d, want 5", n)
	}
	full, _ := s.Next(time.Hour, "d")
	if !s.Set(time.Hour, "d", full) {
		t.Error("nothing spilled although two buckets were not full")
	}
	if none := New[string](0, time.Second, 1, 1); !none.Take(0, "a") || none.Set(0, "a", 0) {
		t.Error("no limit refuses")
	}
}

// TestEviction: what was forgotten begins with a fresh bucket and not with more, and what was used last is not forgotten.
func TestEviction(t *testing.T) {
	b := New[int](5, time.Minute, 5, 3)
	take := func(k int) (ok, spilled bool) {
		full, ok := b.Next(0, k)
		return ok, ok && b.Set(0, k, full)
	}
	for range 4 {
		take(1)
	}
	take(2)
	take(3)
	take(1) // the fifth: empty now, and the last one used
	if ok, _ := take(1); ok {
		t.Fatal("a sixth was granted")
	}
	if _, spilled := take(4); !spilled {
		t.Error("2 made room and was not full: not said")
	}
	if ok, _ := take(1); ok {
		t.Error("1 was forgotten, though used after 2 and 3")
	}
	n := 0
	for ok, _ := take(2); ok; ok, _ = take(2) {
		n++
	}
	if n != 5 {
		t.Errorf("the forgotten one got %d, want a fresh bucket of 5", n)
	}
	if b.Len() != 3 {
		t.Errorf("%d entries, want 3", b.Len())
	}
	if spilled := b.Set(time.Hour, 9, time.Hour); spilled {
		t.Error("a full bucket made room: nothing is lost")
	}
}

// TestBound: over any time a key gets at most a bucket and what it earns meanwhile, however it spreads its tries.
func TestBound(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		conf := struct {
			n      int
			window time.Duration
		}{rapid.IntRange(1, 50).Draw(t, "n"), time.Duration(rapid.Int64Range(int64(time.Second), int64(time.Hour)).Draw(t, "window"))}
		b := New[string](conf.n, conf.window, conf.n, 2)
		var now time.Duration
		granted := 0
		for _, gap := range rapid.SliceOfN(rapid.Int64Range(0, int64(conf.window)/2), 1, 200).Draw(t, "gaps") {
			now += time.Duration(gap)
			if full, ok := b.Next(now, "a"); ok {
				b.Set(now, "a", full)
				granted++
			}
			// one more for what the division rounds
			if most := conf.n + int(now/(conf.window/time.Duration(conf.n))) + 1; granted > most {
				t.Fatalf("%d granted in %s, want at most %d", granted, now, most)
			}
		}
	})
}
