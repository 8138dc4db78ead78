package labrun

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// What Up and a holder say to each other.
const (
	recorded = "recorded\n"
	ready    = "ready\n"
)

// Hold is the process that keeps a node. It is started in namespaces of its own, waits on in until it is recorded (see
// state), makes the mounts of the node, says on out that it is ready, and stays until a signal ends it. binds are
// "source:/target" with an optional ":ro".
func Hold(in io.Reader, out io.Writer, hostname string, binds []string) error {
	if _, err := io.ReadFull(in, make([]byte, len(recorded))); err != nil {
		return fmt.Errorf("who started the node went away: %w", err)
	}
	signal.Ignore(unix.SIGHUP, unix.SIGINT)
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("private mounts: %w", err)
	}
	if err := unix.Sethostname([]byte(hostname)); err != nil {
		return fmt.Errorf("hostname: %w", err)
	}
	// A fresh sysfs shows the interfaces of this namespace.
	if err := unix.Mount("sysfs", "/sys", "sysfs", 0, ""); err != nil {
		return fmt.Errorf("sysfs: %w", err)
	}
	if err := unix.Mount("bpf", "/sys/fs/bpf", "bpf", 0, ""); err != nil {
		return fmt.Errorf("bpffs: %w", err)
	}
	if err := unix.Mount("tmpfs", "/run", "tmpfs", 0, "mode=755"); err != nil {
		return fmt.Errorf("/run: %w", err)
	}
	if err := private("/etc", "/var"); err != nil {
		return err
	}
	for _, b := range binds {
		if err := bind(b); err != nil {
			return fmt.Errorf("bind %s: %w", b, err)
		}
	}
	if _, err := io.WriteString(out, ready); err != nil {
		return err
	}
	for {
		_ = unix.Pause() // the runtime's own signals interrupt it
	}
}

// private makes what is written below the directories the node's own: the machine's files below, a tmpfs above.
func private(dirs ...string) error {
	const base = "/run/.private"
	for _, d := range dirs {
		upper, work := base+d+"/upper", base+d+"/work"
		if err := errors.Join(os.MkdirAll(upper, 0o755), os.MkdirAll(work, 0o755)); err != nil {
			return err
		}
		opts := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", d, upper, work)
		if err := unix.Mount("overlay", d, "overlay", 0, opts); err != nil {
			return fmt.Errorf("private %s: %w", d, err)
		}
	}
	return nil
}

func bind(s string) error {
	b, err := parseBind(s)
	if err != nil {
		return err
	}
	st, err := os.Stat(b.source)
	if err != nil {
		return err
	}
	if st.IsDir() {
		err = os.MkdirAll(b.target, 0o755)
	} else if err = os.MkdirAll(filepath.Dir(b.target), 0o755); err == nil {
		// What is there may be a link to a file of the machine (resolv.conf often is).
		_ = os.Remove(b.target)
		err = os.WriteFile(b.target, nil, 0o644)
	}
	if err != nil {
		return err
	}
	if err := unix.Mount(b.source, b.target, "", unix.MS_BIND, ""); err != nil || !b.readOnly {
		return err
	}
	// The kernel ignores MS_RDONLY when a bind mount is made (mount(2)).
	return unix.Mount("", b.target, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, "")
}
