package bucket

import (
	"testing"
	"time"
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
