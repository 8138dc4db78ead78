package dataplanetest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// NeedRoot skips a test that changes the kernel's state, unless DSTM_TEST_ROOT=1 says that it may.
func NeedRoot(t testing.TB) {
	t.Helper()
	if os.Getenv("DSTM_TEST_ROOT") != "1" {
		t.Skip("needs root: DSTM_TEST_ROOT=1 go test ./dataplane/...")
	}
}

// Namespace is a network namespace that lives as long as a test. IPv6 makes no addresses there by itself, so that
// nobody talks but the test.
type Namespace struct {
	t    testing.TB
	name string
}

// NewNamespace makes a namespace whose name ends with the suffix.
func NewNamespace(t testing.TB, suffix string) *Namespace {
	t.Helper()
	n := &Namespace{t, fmt.Sprintf("dp%d%s", os.Getpid()%100000, suffix)}
	command(t, "ip", "netns", "add", n.name)
	t.Cleanup(func() { _ = exec.Command("ip", "netns", "del", n.name).Run() })
	const noAddress = "1" // enum in6_addr_gen_mode
	n.Sysctl("net/ipv6/conf/default/addr_gen_mode", noAddress)
	n.IP("link set lo up")
	return n
}

// String returns the name, for "ip netns exec".
func (n *Namespace) String() string { return n.name }

// Do runs f on a thread that is in the namespace.
func (n *Namespace) Do(f func() error) {
	n.t.Helper()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		done <- func() error {
			h, err := os.Open("/run/netns/" + n.name)
			if err != nil {
				return err
			}
			defer h.Close()
			if err := unix.Setns(int(h.Fd()), unix.CLONE_NEWNET); err != nil {
				return err
			}
			return f()
		}()
	}()
	if err := <-done; err != nil {
		n.t.Fatalf("in %s: %v", n.name, err)
	}
}

// IP runs ip(8) in the namespace, once for each line of arguments.
func (n *Namespace) IP(lines ...string) {
	n.t.Helper()
	for _, l := range lines {
		command(n.t, append([]string{"ip", "-n", n.name}, strings.Fields(l)...)...)
	}
}

// Sysctl sets a file below /proc/sys.
func (n *Namespace) Sysctl(name, value string) {
	n.t.Helper()
	n.Do(func() error { return os.WriteFile(filepath.Join("/proc/sys", name), []byte(value), 0o644) })
}

func command(t testing.TB, args ...string) {
	t.Helper()
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// PinDir returns a directory for pins that nobody else uses, and removes it after the test.
func PinDir(t testing.TB) string {
	t.Helper()
	dir := fmt.Sprintf("/sys/fs/bpf/dstm-test-%d", os.Getpid())
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// BootNS returns the reading of CLOCK_BOOTTIME that far from now, as deadlines are given.
func BootNS(in time.Duration) uint64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic(err) // the clock is there since Linux 2.6.39
	}
	return uint64(ts.Nano() + int64(in))
}
