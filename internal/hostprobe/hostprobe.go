// Package hostprobe asks the kernel about the connections of this network namespace, and ends them (sock_diag(7)).
package hostprobe

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Sizes in bytes and numbers of linux/inet_diag.h and linux/sock_diag.h.
const (
	sockDiagByFamily = 20
	sockDestroy      = 21
	reqLen           = 56    // struct inet_diag_req_v2
	msgLen           = 72    // struct inet_diag_msg
	idOff, idLen     = 4, 48 // struct inet_diag_sockid in inet_diag_msg
	reqIDOff         = 8     // and in inet_diag_req_v2
	offSrc           = 8     // id.idiag_src: 16 bytes in network order, IPv4 in the first four
	offDst           = 24    // id.idiag_dst likewise
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

// Conn is a connection by its ends. An IPv4 connection on an IPv6 socket has IPv4 addresses here.
type Conn struct{ Local, Remote netip.Addr }

// InUse reports whether there is a TCP connection or a connected UDP socket that match accepts. Listeners and unconnected
// UDP sockets are not asked about. A kernel without inet_diag for one protocol gives an error that is unix.ENOENT.
func InUse(match func(Conn) bool) (bool, error) {
	found, err := find(queries(), match)
	if len(found) > 0 {
		return true, nil
	}
	return false, err
}

// Abort ends the connections that match accepts: their programs get ECONNABORTED, TCP peers a RST while there is a way to
// them. It returns how many. A kernel without CONFIG_INET_DIAG_DESTROY gives an error that is unix.EOPNOTSUPP.
func Abort(match func(Conn) bool) (int, error) {
	found, err := find(queries(), match)
	if len(found) == 0 {
		return 0, err
	}
	fd, err := open()
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	n := 0
	var errs []error
	for i, s := range found {
		switch err := s.destroy(fd, uint32(i+1)); {
		case err == nil:
			n++
		case !errors.Is(err, unix.ENOENT): // it ended by itself
			errs = append(errs, fmt.Errorf("sock_diag: destroy: %w", err))
		}
	}
	return n, errors.Join(errs...)
}

// socket is one that was found, with the kernel's name for it.
type socket struct {
	query
	id [idLen]byte
}

func open() (int, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return -1, fmt.Errorf("sock_diag: %w", err)
	}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: recvSeconds}); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("sock_diag: %w", err)
	}
	return fd, nil
}

func find(qs []query, match func(Conn) bool) ([]socket, error) {
	fd, err := open()
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	var errs []error
	var found []socket
	for i, q := range qs {
		ids, err := q.run(fd, uint32(i+1), match)
		if err != nil {
			errs = append(errs, fmt.Errorf("sock_diag: family %d protocol %d: %w", q.family, q.proto, err))
		}
		for _, id := range ids {
			found = append(found, socket{q, id})
		}
	}
	return found, errors.Join(errs...)
}

func (s socket) destroy(fd int, seq uint32) error {
	b := s.request(seq)
	binary.NativeEndian.PutUint16(b[4:], sockDestroy)
	binary.NativeEndian.PutUint16(b[6:], unix.NLM_F_REQUEST|unix.NLM_F_ACK)
	copy(b[unix.NLMSG_HDRLEN+reqIDOff:], s.id[:])
	if err := unix.Sendto(fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	_, err := receive(fd, seq, nil)
	return err
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

func (q query) run(fd int, seq uint32, match func(Conn) bool) ([][idLen]byte, error) {
	if err := unix.Sendto(fd, q.request(seq), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, err
	}
	return receive(fd, seq, match)
}

// receive reads an answer to its end, or the next query would get the rest.
func receive(fd int, seq uint32, match func(Conn) bool) ([][idLen]byte, error) {
	buf := make([]byte, 64<<10)
	var ids [][idLen]byte
	for {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return ids, err
		}
		more, done, err := parse(buf[:n], seq, match)
		ids = append(ids, more...)
		if done || err != nil {
			return ids, err
		}
	}
}

// parse reads the netlink messages of one datagram: the sockets that match accepts, and whether the answer
// is complete.
func parse(b []byte, seq uint32, match func(Conn) bool) (ids [][idLen]byte, done bool, err error) {
	ne := binary.NativeEndian
	for len(b) >= unix.NLMSG_HDRLEN {
		size, kind := int(ne.Uint32(b[0:])), ne.Uint16(b[4:])
		if size < unix.NLMSG_HDRLEN || size > len(b) {
			return ids, false, fmt.Errorf("netlink message of %d bytes in %d", size, len(b))
		}
		body, current := b[unix.NLMSG_HDRLEN:size], ne.Uint32(b[8:]) == seq
		b = b[min(len(b), (size+unix.NLMSG_ALIGNTO-1)&^(unix.NLMSG_ALIGNTO-1)):]
		switch {
		case !current:
		case kind == unix.NLMSG_DONE:
			return ids, true, nil
		case kind == unix.NLMSG_ERROR && len(body) >= 4:
			if code := int32(ne.Uint32(body)); code != 0 { // 0 is an acknowledgement
				return ids, false, unix.Errno(-code)
			}
			return ids, true, nil
		case kind == sockDiagByFamily && len(body) >= msgLen:
			if match(conn(body)) {
				ids = append(ids, [idLen]byte(body[idOff:]))
			}
		}
	}
	return ids, false, nil
}

// conn returns the ends of an inet_diag_msg.
func conn(m []byte) Conn {
	if m[0] == unix.AF_INET {
		return Conn{netip.AddrFrom4([4]byte(m[offSrc:])), netip.AddrFrom4([4]byte(m[offDst:]))}
	}
	return Conn{netip.AddrFrom16([16]byte(m[offSrc:])).Unmap(), netip.AddrFrom16([16]byte(m[offDst:])).Unmap()}
}
