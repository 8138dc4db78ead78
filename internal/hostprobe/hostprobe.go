// Package hostprobe asks the kernel which sockets of this network namespace use an address (sock_diag(7), inet_diag).
package hostprobe

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// Sizes in bytes and numbers of linux/inet_diag.h and linux/sock_diag.h.
const (
	sockDiagByFamily = 20
	reqLen           = 56 // struct inet_diag_req_v2
	msgLen           = 72 // struct inet_diag_msg
	offSrc           = 8  // id.idiag_src: 16 bytes in network order, IPv4 in the first four
)

// TCP states (net/tcp_states.h); a connected UDP socket is in stateEstablished.
const (
	stateEstablished = 1
	stateSynSent     = 2
	stateFinWait1    = 4
	stateFinWait2    = 5
	stateCloseWait   = 8
	stateLastAck     = 9
	stateClosing     = 11
)

// recvSeconds bounds the wait for the kernel's answer, which is immediate.
const recvSeconds = 2

// query is one dump. The states leave out what does not keep a lease: listeners and unbound sockets say nothing about
// use, half-open connections are made by strangers, TIME_WAIT belongs to nobody.
type query struct {
	family, proto uint8
	states        uint32
}

func queries() []query {
	const tcp = 1<<stateEstablished | 1<<stateSynSent | 1<<stateFinWait1 | 1<<stateFinWait2 | 1<<stateCloseWait |
		1<<stateLastAck | 1<<stateClosing
	// AF_INET6 sockets hold IPv4 connections too, as ::ffff:a.b.c.d.
	return []query{
		{unix.AF_INET, unix.IPPROTO_TCP, tcp},
		{unix.AF_INET6, unix.IPPROTO_TCP, tcp},
		{unix.AF_INET, unix.IPPROTO_UDP, 1 << stateEstablished},
		{unix.AF_INET6, unix.IPPROTO_UDP, 1 << stateEstablished},
	}
}

// InUse reports whether a TCP connection or a connected UDP socket has one of the IPv4 addresses as its local address.
// Listeners and unconnected UDP sockets do not count. A kernel without inet_diag for one protocol gives an error that is
// unix.ENOENT.
func InUse(addrs ...netip.Addr) (bool, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return false, fmt.Errorf("sock_diag: %w", err)
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: recvSeconds}); err != nil {
		return false, fmt.Errorf("sock_diag: %w", err)
	}
	var errs []error
	for i, q := range queries() {
		used, err := q.run(fd, uint32(i+1), addrs)
		if err != nil {
			errs = append(errs, fmt.Errorf("sock_diag: family %d protocol %d: %w", q.family, q.proto, err))
			continue
		}
		if used {
			return true, nil
		}
	}
	return false, errors.Join(errs...)
}

func (q query) request(seq uint32) []byte {
	ne := binary.NativeEndian
	b := make([]byte, unix.NLMSG_HDRLEN+reqLen)
	ne.PutUint32(b[0:], uint32(len(b)))
	ne.PutUint16(b[4:], sockDiagByFamily)
	ne.PutUint16(b[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	ne.PutUint32(b[8:], seq)
	b[16], b[17] = q.family, q.proto
	ne.PutUint32(b[20:], q.states)
	return b
}

func (q query) run(fd int, seq uint32, addrs []netip.Addr) (bool, error) {
	if err := unix.Sendto(fd, q.request(seq), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return false, err
	}
	buf := make([]byte, 64<<10)
	used := false
	for {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return false, err
		}
		// The answer is read to its end even when it is known, or the next query would get the rest.
		hit, done, err := parse(buf[:n], seq, addrs)
		used = used || hit
		if done || err != nil {
			return used, err
		}
	}
}

// parse reads the netlink messages of one datagram: whether one of the sockets has one of the addresses, and whether
// the dump is complete.
func parse(b []byte, seq uint32, addrs []netip.Addr) (hit, done bool, err error) {
	ne := binary.NativeEndian
	for len(b) >= unix.NLMSG_HDRLEN {
		size, kind := int(ne.Uint32(b[0:])), ne.Uint16(b[4:])
		if size < unix.NLMSG_HDRLEN || size > len(b) {
			return hit, false, fmt.Errorf("netlink message of %d bytes in %d", size, len(b))
		}
		body, current := b[unix.NLMSG_HDRLEN:size], ne.Uint32(b[8:]) == seq
		b = b[min(len(b), (size+unix.NLMSG_ALIGNTO-1)&^(unix.NLMSG_ALIGNTO-1)):]
		switch {
		case !current:
		case kind == unix.NLMSG_DONE:
			return hit, true, nil
		case kind == unix.NLMSG_ERROR && len(body) >= 4:
			return hit, false, unix.Errno(-int32(ne.Uint32(body)))
		case kind == sockDiagByFamily && len(body) >= msgLen:
			hit = hit || slices.Contains(addrs, source(body))
		}
	}
	return hit, false, nil
}

// source returns the local address of an inet_diag_msg, IPv4 as such even on an IPv6 socket.
func source(m []byte) netip.Addr {
	if m[0] == unix.AF_INET {
		return netip.AddrFrom4([4]byte(m[offSrc:]))
	}
	return netip.AddrFrom16([16]byte(m[offSrc:])).Unmap()
}
