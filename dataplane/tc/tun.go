package tc

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/dstm-project/dstm/dataplane/packet"
)

// alias marks a device as ours.
const alias = "dstm"

// vnetHeader is the length of struct virtio_net_hdr, which stands in front of every packet on the descriptor.
const vnetHeader = 10

// openTUN opens the device, making it if need be. A device of that name that is not ours is refused. Offloads are on,
// so that super-packets reach the programs whole.
func openTUN(nl *netlink.Handle, name string, persistent bool) (*os.File, error) {
	if len(name) >= unix.IFNAMSIZ {
		return nil, fmt.Errorf("device name %q: want at most %d bytes", name, unix.IFNAMSIZ-1)
	}
	var gone netlink.LinkNotFoundError
	l, err := nl.LinkByName(name)
	switch {
	case err == nil && (l.Type() != "tuntap" || l.Attrs().Alias != alias):
		return nil, fmt.Errorf("device %s exists and is not ours (type %s, alias %q): remove it or configure another name",
			name, l.Type(), l.Attrs().Alias)
	case err != nil && !errors.As(err, &gone):
		return nil, fmt.Errorf("device %s: %w", name, err)
	}
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("/dev/net/tun: %w", err)
	}
	if err := setup(nl, fd, name, persistent); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("device %s: %w", name, err)
	}
	// Only now: a descriptor that the poller takes before it belongs to a device is never woken.
	return os.NewFile(uintptr(fd), "/dev/net/tun"), nil
}

func setup(nl *netlink.Handle, fd int, name string, persistent bool) error {
	req, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
		if errors.Is(err, unix.EBUSY) {
			return errors.New("another process has it open")
		}
		return err
	}
	const offloads = unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6 | unix.TUN_F_TSO_ECN
	if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, offloads); err != nil {
		return fmt.Errorf("offloads: %w", err)
	}
	if persistent {
		if err := unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 1); err != nil {
			return fmt.Errorf("persistence: %w", err)
		}
	}
	l, err := nl.LinkByName(name)
	if err != nil {
		return err
	}
	return nl.LinkSetAlias(l, alias)
}

func setPersistent(f *os.File, on bool) error {
	v := 0
	if on {
		v = 1
	}
	c, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var ierr error
	if err := c.Control(func(fd uintptr) { ierr = unix.IoctlSetInt(int(fd), unix.TUNSETPERSIST, v) }); err != nil {
		return err
	}
	return ierr
}

// readPacket reads one IPv4 packet and completes its checksum. Packets that cannot be used are left out: ok is false.
func readPacket(f *os.File, buf []byte) (pkt []byte, ok bool, err error) {
	n, err := f.Read(buf)
	if err != nil {
		return nil, false, err
	}
	if n < vnetHeader+20 {
		return nil, false, nil
	}
	hdr, pkt := buf[:vnetHeader], buf[vnetHeader:n]
	if pkt[0]>>4 != 4 {
		return nil, false, nil
	}
	const needsChecksum = 1
	if hdr[0]&needsChecksum != 0 {
		start, offset := int(binary.NativeEndian.Uint16(hdr[6:])), int(binary.NativeEndian.Uint16(hdr[8:]))
		if start+offset+2 > len(pkt) {
			return nil, false, nil
		}
		// The field holds the sum of the pseudo header already.
		sum := packet.Checksum(pkt[start:])
		if sum == 0 {
			sum = 0xffff // 0 means none in UDP (RFC 768)
		}
		binary.BigEndian.PutUint16(pkt[start+offset:], sum)
	}
	return pkt, true, nil
}
