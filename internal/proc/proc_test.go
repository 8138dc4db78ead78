package proc

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"testing"
	"time"
)

func TestStartTime(t *testing.T) {
	own, err := StartTime(os.Getpid())
	if err != nil || own == "" {
		t.Fatalf("own: %q, %v", own, err)
	}
	c := exec.Command("true")
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) { // not waited for: a zombie
		if _, err = StartTime(c.Process.Pid); errors.Is(err, fs.ErrNotExist) {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("a process that has ended: %v", err)
		}
	}
	if err := c.Wait(); err != nil {
		t.Fatal(err)
	}
	if _, err := StartTime(c.Process.Pid); err == nil {
		t.Error("a process that is gone: no error")
	}
}

func TestParse(t *testing.T) {
	for stat, want := range map[string]string{
		"7 (a) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20": "4711",
		"7 (a) b) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 42":   "42",
		"7 (a) S 1": "",
		"":          "",
	} {
		if got, err := startTime([]byte(stat)); got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v", stat, got, err)
		}
	}
}

func FuzzStartTime(f *testing.F) {
	f.Add([]byte("7 (a) S 1"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, err := startTime(b); err == nil && s == "" {
			t.Error("nothing without an error")
		}
	})
}
