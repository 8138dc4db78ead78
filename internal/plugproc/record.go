package plugproc

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"time"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"

	"github.com/dstm-project/dstm/internal/proc"
)

// record finds a process again after whoever started it has gone.
type record struct {
	PID      int    `json:"pid"`
	Start    string `json:"start"` // ticks since boot, of /proc/PID/stat: tells a number that was given out again
	Socket   string `json:"socket"`
	Digest   string `json:"sha256"` // of the program
	Protocol uint   `json:"protocol"`
	Program  string `json:"program"`
}

func loadRecord(path string) (record, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return record{}, ErrNone
	}
	var r record
	if err == nil {
		err = json.Unmarshal(b, &r)
	}
	if err != nil {
		// Without it the process cannot be found; it ends by itself when it counts as an orphan.
		return record{}, fmt.Errorf("%w: %s: %w", ErrNone, path, err)
	}
	return r, nil
}

func (r record) save(path string) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return renameio.WriteFile(path, append(b, '\n'), 0o600)
}

func (r record) addr() net.Addr { return &net.UnixAddr{Name: r.Socket, Net: "unix"} }

func (r record) alive() bool {
	start, err := proc.StartTime(r.PID)
	return err == nil && start == r.Start
}

// check compares the process with the record and with what is configured.
func (r record) check(c *Config) error {
	if !r.alive() {
		return ErrNone
	}
	f, err := os.Open(fmt.Sprintf("/proc/%d/exe", r.PID)) // the running program, even if its file was replaced
	if err != nil {
		return fmt.Errorf("%w: process %d: %w", ErrOther, r.PID, err)
	}
	defer f.Close()
	digest, err := hash(f)
	switch {
	case err != nil:
		return err
	case hex.EncodeToString(digest) != r.Digest:
		return fmt.Errorf("%w: process %d runs a program with sha256 %x, recorded is %s", ErrOther, r.PID, digest, r.Digest)
	case c.SHA256 != nil && !bytes.Equal(digest, c.SHA256):
		return fmt.Errorf("%w: process %d runs a program with sha256 %x, configured is %x", ErrOther, r.PID, digest, c.SHA256)
	case r.Program != c.Program:
		return fmt.Errorf("%w: process %d runs %s, configured is %s", ErrOther, r.PID, r.Program, c.Program)
	case r.Protocol != c.Protocol:
		return fmt.Errorf("%w: process %d has protocol %d, want %d", ErrOther, r.PID, r.Protocol, c.Protocol)
	}
	return nil
}

// kill ends the process by a descriptor, so that a number given out again is never hit, and waits for its end.
func (r record) kill() error {
	fd, err := unix.PidfdOpen(r.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("process %d: %w", r.PID, err)
	}
	defer unix.Close(fd)
	if !r.alive() {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill process %d: %w", r.PID, err)
	}
	for end := time.Now().Add(endTimeout); r.alive(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			return fmt.Errorf("process %d does not end", r.PID)
		}
	}
	return nil
}

// openProgram opens a program and compares its digest with want, unless that is nil.
func openProgram(path string, want []byte) (*os.File, string, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, "", err
	}
	digest, err := hash(f)
	if err == nil && want != nil && !bytes.Equal(digest, want) {
		err = fmt.Errorf("%s has sha256 %x, configured is %x", path, digest, want)
	}
	if err != nil {
		f.Close()
		return nil, "", err
	}
	return f, hex.EncodeToString(digest), nil
}

func hash(r io.Reader) ([]byte, error) {
	h := sha256.New()
	if _, err := io.Copy(h, r); err != nil {
		return nil, err
	}
	return h.Sum(nil), nil
}
