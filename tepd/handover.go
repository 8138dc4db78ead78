package tepd

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"strings"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"

	"github.com/dstm-project/dstm/internal/netcfg"
)

// handover is what one tepd process leaves to the next, where a reboot forgets it.
type handover struct {
	Device string         `json:"device"` // the TUN that we made
	Index  int            `json:"index"`  // its interface index, not given out again before a reboot; 0 = being made
	Pools  []netip.Prefix `json:"pools"`  // served last
}

func handoverPath(p Paths) string { return p.statePath("tepd.json") }

// loadHandover returns what the last process left; nothing when there was none.
func loadHandover(p Paths) (handover, error) {
	b, err := os.ReadFile(handoverPath(p))
	if errors.Is(err, fs.ErrNotExist) {
		return handover{}, nil
	}
	var h handover
	if err == nil {
		err = json.Unmarshal(b, &h)
	}
	if err != nil {
		return handover{}, fmt.Errorf("%s: %w", handoverPath(p), err)
	}
	return h, nil
}

// owns reports whether the interface is the one that we made, or were about to make.
func (h handover) owns(l netcfg.Link) bool {
	return h.Device == l.Name && (h.Index == 0 || h.Index == l.Index)
}

func (h handover) save(p Paths) error {
	b, err := json.Marshal(h)
	if err == nil {
		err = renameio.WriteFile(handoverPath(p), append(b, '\n'), 0o600)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", handoverPath(p), err)
	}
	return nil
}

// ErrRunning says that another tepd works in the same run directory.
var ErrRunning = errors.New("another tepd is running")

// lock takes the lock of the run directory until unlock is called or the process ends.
func lock(p Paths) (unlock func(), err error) {
	if err := os.MkdirAll(p.Run, 0o755); err != nil {
		return nil, fmt.Errorf("run directory: %w", err)
	}
	path := p.statePath("tepd.lock")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%w: it holds %s; stop it, or set paths.run to another directory", ErrRunning, path)
		}
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return func() { f.Close() }, nil
}

// readPassword reads the first line of a password file.
func readPassword(path string) (string, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("password_file: %w", err)
	}
	line, _, _ := strings.Cut(string(b), "\n")
	line = strings.TrimSuffix(line, "\r")
	if line == "" || len(line) > maxPassword {
		return "", fmt.Errorf("password_file %s: %d bytes in its first line: want 1 to %d", path, len(line), maxPassword)
	}
	return line, nil
}

// maxPassword is the kernel's limit (TCP_MD5SIG_MAXKEYLEN), in bytes.
const maxPassword = 80
