package labrun

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// netns is a network namespace, told from all others since the machine started. An inode number that is free goes to
// the next namespace, as a process's number goes to the next process; a cookie is given out once.
type netns struct {
	Inode  uint64 `json:"inode"`
	Cookie uint64 `json:"cookie"`
}

// nsPath is where the kernel shows a process's network namespace; nothing is there once the process has ended, not even
// when nobody has waited for it yet.
func nsPath(pid int) string { return fmt.Sprintf("/proc/%d/ns/net", pid) }

// netnsOf returns the namespace that a process is in.
func netnsOf(pid int) (ns netns, err error) {
	f, err := os.Open(nsPath(pid))
	if err != nil {
		return netns{}, err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return netns{}, os.NewSyscallError("fstat", err)
	}
	ns.Inode = st.Ino
	err = inThread(func() (err error) {
		if err := unix.Setns(int(f.Fd()), unix.CLONE_NEWNET); err != nil {
			return os.NewSyscallError("setns", err)
		}
		ns.Cookie, err = cookie()
		return err
	})
	return ns, err
}

// inThread calls f in a thread that ends with it, so that nothing else meets the namespace that f enters. It is not the
// first thread of the process, which never ends and whose namespace is what others take for that of the process.
func inThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() { // kept busy, so that the next one cannot be it
			done <- inThread(f)
			runtime.UnlockOSThread()
			return
		}
		done <- f()
	}()
	return <-done
}

// cookie returns the cookie of the network namespace of the calling thread (socket(7), SO_NETNS_COOKIE, Linux 5.14).
func cookie() (uint64, error) {
	s, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, os.NewSyscallError("socket", err)
	}
	defer unix.Close(s)
	c, err := unix.GetsockoptUint64(s, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	return c, os.NewSyscallError("getsockopt SO_NETNS_COOKIE", err)
}

// processes returns the numbers of all processes in the namespace, none when it has ended.
func (ns netns) processes() []int {
	var out []int
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, d := range dirs {
		pid, err := strconv.Atoi(filepath.Base(d))
		if err != nil {
			continue
		}
		// The inode is cheap to see and leaves few to look at closely.
		var st unix.Stat_t
		if unix.Stat(nsPath(pid), &st) != nil || st.Ino != ns.Inode {
			continue
		}
		if got, err := netnsOf(pid); err == nil && got == ns {
			out = append(out, pid)
		}
	}
	return out
}

// endTimeout is how long processes may take to go after SIGKILL.
const endTimeout = 10 * time.Second

// end ends every process in the namespace, and with the last of them the namespace. It refuses its own.
func (ns netns) end() error {
	own, err := netnsOf(os.Getpid())
	if err != nil {
		return err
	}
	if own == ns {
		return errors.New("is our own network namespace: not a node")
	}
	for until := time.Now().Add(endTimeout); ; time.Sleep(10 * time.Millisecond) {
		pids := ns.processes()
		if len(pids) == 0 {
			return nil
		}
		if time.Now().After(until) {
			return fmt.Errorf("processes %v do not end within %s of SIGKILL", pids, endTimeout)
		}
		for _, pid := range pids {
			_ = unix.Kill(pid, unix.SIGKILL) // has ended meanwhile, or is seen again
		}
	}
}
