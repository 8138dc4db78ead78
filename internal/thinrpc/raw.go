package thinrpc

import (
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Raw is a TCP connection to put below TLS. Once it is thin, Read returns instead of waiting, and wait waits: TLS would wait
// with its buffers and the stack of its caller.
type Raw struct {
	*net.TCPConn
	ahead *ahead // nil until it is thin
}

// ahead is what wait has read, and the state of reading. Its functions are made once, or each read would allocate them.
type ahead struct {
	conn    syscall.RawConn
	direct  func(fd uintptr) bool
	fill    func(fd uintptr) bool
	to      []byte // of direct
	n       int
	err     error
	drained bool     // nothing was left at the last read
	small   [64]byte // holds a ping
	from    int
	end     int
}

// NewRaw returns a connection that behaves like c until it is thin. What was sent and not acknowledged for the given time
// ends it (TCP_USER_TIMEOUT, RFC 5482).
func NewRaw(c *net.TCPConn, unacknowledged time.Duration) (*Raw, error) {
	conn, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	var serr error
	err = conn.Control(func(fd uintptr) {
		serr = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(unacknowledged/time.Millisecond))
	})
	if err == nil {
		err = os.NewSyscallError("setsockopt", serr)
	}
	return &Raw{TCPConn: c}, err
}

// errAgain is the error of Read when it would have to wait. TLS takes it for a deadline that passed, and can be asked again.
var errAgain error = again{}

type again struct{}

func (again) Error() string   { return "nothing to read now" }
func (again) Timeout() bool   { return true }
func (again) Temporary() bool { return true }

// thin makes Read return errAgain instead of waiting.
func (r *Raw) thin() error {
	if err := r.SetReadDeadline(time.Time{}); err != nil { // that of the handshake
		return err
	}
	conn, err := r.SyscallConn()
	if err != nil {
		return err
	}
	a := &ahead{conn: conn}
	a.direct = func(fd uintptr) bool {
		a.n, a.err = read(fd, a.to)
		return true
	}
	a.fill = func(fd uintptr) bool {
		a.n, a.err = read(fd, a.small[:])
		return a.err != unix.EAGAIN
	}
	r.ahead = a
	return nil
}

func read(fd uintptr, p []byte) (int, error) {
	for {
		n, err := unix.Read(int(fd), p)
		if err != unix.EINTR {
			return n, err
		}
	}
}

// Read implements net.Conn.
func (r *Raw) Read(p []byte) (int, error) {
	a := r.ahead
	switch {
	case a == nil:
		return r.TCPConn.Read(p)
	case len(p) == 0:
		return 0, nil
	case a.from < a.end:
		n := copy(p, a.small[a.from:a.end])
		a.from += n
		return n, nil
	case a.drained:
		return 0, errAgain
	}
	a.to = p
	err := a.conn.Read(a.direct)
	a.to = nil
	if err != nil {
		return 0, err
	}
	a.drained = a.n < len(p)
	return a.result()
}

// result is what a read came to.
func (a *ahead) result() (int, error) {
	switch {
	case a.err == unix.EAGAIN:
		return 0, errAgain
	case a.err != nil:
		return 0, os.NewSyscallError("read", a.err)
	case a.n == 0:
		return 0, io.EOF
	}
	return a.n, nil
}

// wait waits until there is something to read, or an error, which it returns.
func (r *Raw) wait() error {
	a := r.ahead
	if err := a.conn.Read(a.fill); err != nil {
		return err
	}
	n, err := a.result()
	if err != nil {
		return err
	}
	a.from, a.end = 0, n
	a.drained = n < len(a.small)
	return nil
}
