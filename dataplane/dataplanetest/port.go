package dataplanetest

import (
	"errors"
	"fmt"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dstm-project/dstm/dataplane/packet"
)

// port is where the suite puts IP packets on an interface and takes them off. It sees what comes in from the link, not
// what the own kernel sends.
type port struct {
	file *os.File
	to   *unix.SockaddrLinklayer // nil = a TUN, where packets are written as they are
}

func (p *port) close() { _ = p.file.Close() }

// openPacket opens a port over a packet socket on the interface dev. Packets go to the link address peer. Packets of
// the protocol, an Ethernet type or 0 for none, are received.
func openPacket(n *Namespace, dev string, peer net.HardwareAddr, protocol uint16) *port {
	n.t.Helper()
	p := &port{}
	n.Do(func() error {
		ifi, err := net.InterfaceByName(dev)
		if err != nil {
			return err
		}
		// SOCK_DGRAM: the kernel takes link headers off and puts them on.
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return fmt.Errorf("packet socket: %w", err)
		}
		p.file = os.NewFile(uintptr(fd), dev)
		p.to = &unix.SockaddrLinklayer{Ifindex: ifi.Index, Halen: uint8(len(peer))}
		copy(p.to.Addr[:], peer)
		if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1); err != nil {
			return fmt.Errorf("packet socket: %w", err)
		}
		return unix.Bind(fd, &unix.SockaddrLinklayer{Ifindex: ifi.Index, Protocol: htons(protocol)})
	})
	n.t.Cleanup(p.close)
	return p
}

// openTUN makes the TUN dev, an interface without link header, and opens its far end.
func openTUN(n *Namespace, dev string) *port {
	n.t.Helper()
	p := &port{}
	n.Do(func() error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return err
		}
		req, err := unix.NewIfreq(dev)
		if err != nil {
			return err
		}
		req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
		if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
			return errors.Join(fmt.Errorf("TUN %s: %w", dev, err), unix.Close(fd))
		}
		p.file = os.NewFile(uintptr(fd), dev) // only now: the poller must not take it before it has a device
		return nil
	})
	n.t.Cleanup(p.close)
	return p
}

func (p *port) send(t *testing.T, pkt []byte) {
	t.Helper()
	var err error
	if p.to == nil {
		_, err = p.file.Write(pkt)
	} else {
		to := *p.to
		to.Protocol = htons(unix.ETH_P_IP)
		if pkt[0]>>4 == 6 {
			to.Protocol = htons(unix.ETH_P_IPV6)
		}
		err = control(p.file, func(fd int) error { return unix.Sendto(fd, pkt, 0, &to) })
	}
	// ENOBUFS: an egress program dropped it. Whether it should, the counters will tell.
	if err != nil && !errors.Is(err, unix.ENOBUFS) {
		t.Fatalf("send %d bytes on %s: %v", len(pkt), p.file.Name(), err)
	}
}

// receive returns the next packet, or nil if none comes in time. What the kernel says by itself is left out: neighbour
// discovery, multicast listener reports, ICMPv6 errors. No engine makes any of them.
func (p *port) receive(t *testing.T, within time.Duration) []byte {
	t.Helper()
	buf := make([]byte, 1<<16)
	for end := time.Now().Add(within); ; {
		n, err := p.read(buf)
		switch {
		case err == nil && !chatter(buf[:n]):
			return buf[:n]
		case err == nil:
			continue
		case !errors.Is(err, unix.EAGAIN):
			t.Fatalf("receive on %s: %v", p.file.Name(), err)
		case time.Now().After(end):
			return nil
		}
		time.Sleep(200 * time.Microsecond)
	}
}

// read never waits.
func (p *port) read(buf []byte) (n int, err error) {
	err = control(p.file, func(fd int) (err error) { n, err = unix.Read(fd, buf); return err })
	return n, err
}

func chatter(pkt []byte) bool {
	const hopByHop = 0 // of MLD
	h, _, err := packet.ParseIPv6(pkt)
	return err == nil && (h.NextHeader == packet.ProtoICMPv6 || h.NextHeader == hopByHop)
}

func control(f *os.File, do func(fd int) error) error {
	c, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var did error
	return errors.Join(c.Control(func(fd uintptr) { did = do(int(fd)) }), did)
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }
