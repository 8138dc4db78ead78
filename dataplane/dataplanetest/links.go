package dataplanetest

import (
	"fmt"
	"net"

	"golang.org/x/sys/unix"
)

// uplinkKind is what tunnels come over.
type uplinkKind string

const (
	ethernet uplinkKind = "ethernet" // with a link header: veth
	point    uplinkKind = "point"    // without one, such as PPP or WireGuard: a TUN
)

const uplinkDev = "up0"

// Link addresses of the two ends of a veth.
var (
	engineMAC = net.HardwareAddr{2, 0, 0, 0, 0, 1}
	suiteMAC  = net.HardwareAddr{2, 0, 0, 0, 0, 2}
)

// addUplink makes the uplink of the engine in e with its address and static neighbours; the suite's end is in s.
func addUplink(e, s *Namespace, kind uplinkKind, address string, neighbours ...string) *port {
	e.t.Helper()
	var p *port
	if kind == point {
		p = openTUN(e, uplinkDev)
		e.IP("link set "+uplinkDev+" up", "addr add "+address+" dev "+uplinkDev+" nodad")
		return p
	}
	p = addVeth(e, s, uplinkDev)
	e.IP("addr add " + address + " dev " + uplinkDev + " nodad")
	addNeighbours(e, uplinkDev, neighbours...)
	return p
}

// addVeth makes a veth of that name at both ends, and opens the suite's end.
func addVeth(e, s *Namespace, dev string) *port {
	e.t.Helper()
	const link = "link add %s address %s type veth peer name %s address %s netns %s"
	e.IP(fmt.Sprintf(link, dev, engineMAC, dev, suiteMAC, s), "link set "+dev+" up")
	s.IP("link set " + dev + " up")
	return openPacket(s, dev, engineMAC, unix.ETH_P_ALL)
}

// addNeighbours spares the engine's kernel from asking: nobody would answer.
func addNeighbours(e *Namespace, dev string, addrs ...string) {
	e.t.Helper()
	for _, a := range addrs {
		e.IP(fmt.Sprintf("neigh add %s lladdr %s dev %s nud permanent", a, suiteMAC, dev))
	}
}
