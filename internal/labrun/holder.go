package labrun

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Hold is the process that keeps a node: it is started in namespaces of its own, makes their mounts, says "ready" on
// standard output and sleeps. args are "source:/target" binds.
func Hold(hostname string, binds []string) error {
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
	fmt.Println("ready")
	signal.Ignore(unix.SIGHUP, unix.SIGINT)
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, unix.SIGTERM)
	<-stop
	return nil
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

func bind(b string) error {
	src, dst, _ := strings.Cut(b, ":/")
	dst, _, _ = strings.Cut("/"+dst, ":") // a mode such as ":ro" may follow
	st, err := os.Stat(src)
	if err != nil {
		return err
	}
	if st.IsDir() {
		err = os.MkdirAll(dst, 0o755)
	} else if err = os.MkdirAll(filepath.Dir(dst), 0o755); err == nil {
		// What is there may be a link to a file of the machine (resolv.conf often is).
		_ = os.Remove(dst)
		err = os.WriteFile(dst, nil, 0o644)
	}
	if err != nil {
		return err
	}
	return unix.Mount(src, dst, "", unix.MS_BIND, "")
}

// enter returns a command inside a node.
func enter(pid int, env []string, args ...string) *exec.Cmd {
	c := exec.Command("nsenter", append([]string{"-t", fmt.Sprint(pid), "-n", "-m", "-u", "--"}, args...)...)
	c.Env = append(os.Environ(), env...)
	return c
}
