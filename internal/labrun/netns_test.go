package labrun

import (
	"os"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// TestInThread: the first thread of the process never enters a namespace, also when nothing else is free to.
func TestInThread(t *testing.T) {
	before := runtime.GOMAXPROCS(1)
	defer runtime.GOMAXPROCS(before)
	for range 1000 {
		err := inThread(func() error {
			if unix.Gettid() == os.Getpid() {
				t.Error("in the first thread")
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		runtime.Gosched()
	}
}
