package hostprobe

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

func from(addr string) func(Conn) bool {
	return func(c Conn) bool { return c.Local == netip.MustParseAddr(addr) && c.Remote.Is4() }
}

// Loopback addresses stand for leased ones: sock_diag needs no privilege and no interface of our own.
func TestInUse(t *testing.T) {
	dial := func(network, addr string) func(t *testing.T) {
		return func(t *testing.T) {
			l, err := net.Listen("tcp4", addr)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { l.Close() })
			local, err := net.ResolveTCPAddr("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			local.Port = 0
			c, err := (&net.Dialer{LocalAddr: local}).Dial(network, l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close() })
		}
	}
	for _, c := range []struct {
		name  string
		addr  string
		setup func(t *testing.T)
		want  bool
	}{
		{"nothing", "127.7.1.1", func(*testing.T) {}, false},
		{"bare tcp listener", "127.7.1.2", func(t *testing.T) {
			l, err := net.Listen("tcp4", "127.7.1.2:0")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { l.Close() })
		}, false},
		{"tcp connection", "127.7.1.3", dial("tcp4", "127.7.1.3:0"), true},
		{"ipv4 on an ipv6 socket", "127.7.1.4", mapped, true},
		{"connected udp", "127.7.1.5", func(t *testing.T) {
			c, err := net.DialUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 7, 1, 5)}, &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 9})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close() })
		}, true},
		{"unconnected udp", "127.7.1.6", func(t *testing.T) {
			c, err := net.ListenPacket("udp4", "127.7.1.6:0")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close() })
		}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.setup(t)
			got, err := InUse(from(c.addr))
			if err != nil {
				t.Fatal(err)
			}
			if got != c.want {
				t.Errorf("in use %v, want %v", got, c.want)
			}
		})
	}
}

// mapped connects 127.7.1.4 to itself from an AF_INET6 socket.
func mapped(t *testing.T) {
	l, err := net.Listen("tcp4", "127.7.1.4:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	v4 := netip.MustParseAddr("::ffff:127.7.1.4").As16()
	if err := unix.Connect(fd, &unix.SockaddrInet6{Addr: v4, Port: l.Addr().(*net.TCPAddr).Port}); err != nil {
		t.Fatal(err)
	}
}

func message(kind uint16, seq uint32, body []byte) []byte {
	b := make([]byte, unix.NLMSG_HDRLEN, unix.NLMSG_HDRLEN+len(body))
	binary.NativeEndian.PutUint32(b, uint32(unix.NLMSG_HDRLEN+len(body)))
	binary.NativeEndian.PutUint16(b[4:], kind)
	binary.NativeEndian.PutUint32(b[8:], seq)
	return append(b, body...)
}

func FuzzParse(f *testing.F) {
	m := make([]byte, msgLen)
	m[0], m[1] = unix.AF_INET, stateEstablished
	copy(m[offSrc:], []byte{192, 0, 2, 1})
	f.Add(append(message(sockDiagByFamily, 1, m), message(unix.NLMSG_DONE, 1, make([]byte, 4))...))
	f.Add(message(unix.NLMSG_ERROR, 1, []byte{254, 255, 255, 255}))
	f.Fuzz(func(t *testing.T, b []byte) {
		if hit, _, _ := parse(b, 1, func(Conn) bool { return false }); len(hit) > 0 {
			t.Error("hit that nobody accepted")
		}
		_, _, _ = parse(b, 1, from("192.0.2.1")) // must not panic
	})
}

func TestParse(t *testing.T) {
	m := make([]byte, msgLen)
	m[0] = unix.AF_INET
	copy(m[offSrc:], []byte{192, 0, 2, 1})
	copy(m[offDst:], []byte{198, 51, 100, 1})
	want := func(c Conn) bool {
		return c == Conn{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("198.51.100.1")}
	}
	done := message(unix.NLMSG_DONE, 7, make([]byte, 4))
	for _, c := range []struct {
		name      string
		in        []byte
		hit, done bool
		err       string
	}{
		{"hit and end", append(message(sockDiagByFamily, 7, m), done...), true, true, ""},
		{"of another query", append(message(sockDiagByFamily, 6, m), done...), false, true, ""},
		{"kernel error", message(unix.NLMSG_ERROR, 7, []byte{0xfe, 0xff, 0xff, 0xff}), false, false, "no such file or directory"},
		{"length lies", message(sockDiagByFamily, 7, m)[:40], false, false, "netlink message of 88 bytes in 40"},
	} {
		hit, end, err := parse(c.in, 7, want)
		text := ""
		if err != nil {
			text = err.Error()
		}
		if hit := len(hit) > 0; hit != c.hit || end != c.done || text != c.err {
			t.Errorf("%s: %v %v %q, want %v %v %q", c.name, hit, end, text, c.hit, c.done, c.err)
		}
	}
}

// Abort ends the program's socket; the listener next to it stays.
func TestAbort(t *testing.T) {
	if os.Getenv("DSTM_TEST_ROOT") != "1" {
		t.Skip("needs root: sudo DSTM_TEST_ROOT=1 go test ./internal/hostprobe/")
	}
	l, err := net.Listen("tcp4", "127.7.1.9:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 7, 1, 9)}}).Dial("tcp4", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	n, err := Abort(from("127.7.1.9"))
	if err != nil || n == 0 {
		t.Fatalf("Abort: %d %v, want the connection ended", n, err)
	}
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNABORTED) && !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("read after Abort: %v, want the connection aborted", err)
	}
	if used, err := InUse(from("127.7.1.9")); used || err != nil {
		t.Errorf("in use after Abort: %v %v", used, err)
	}
	if n, err := Abort(from("127.7.1.9")); n != 0 || err != nil {
		t.Errorf("Abort of nothing: %d %v", n, err)
	}
}
