package dstm

import (
	"net/netip"

	"github.com/miekg/dns"
)

// answer is what the resolver says to one question: a message, or only a code when no message was written.
type answer struct {
	msg   *dns.Msg
	rcode int // counts when msg is nil
}

// none is the answer of a look-up that timed out.
func none() answer { return answer{rcode: dns.RcodeServerFailure} }

func (a answer) code() int {
	if a.msg != nil {
		return a.msg.Rcode
	}
	return a.rcode
}

// lacksIPv6 applies the rule of RFC 6147 §5.1 to the answer for AAAA: empty (§5.1.2, at the end of any chain of CNAME and
// DNAME, §5.1.5), any code but NXDOMAIN (§5.1.2), no answer in time (§5.1.3), or only addresses that DNS64 excludes too
// (§5.1.4). A cut answer proves nothing: the host will ask again over TCP.
func lacksIPv6(a answer) bool {
	switch {
	case a.code() == dns.RcodeNameError:
		return false
	case a.msg == nil || a.code() != dns.RcodeSuccess:
		return true
	}
	for _, rr := range a.msg.Answer {
		if aaaa, ok := rr.(*dns.AAAA); ok && !excluded(aaaa) {
			return false
		}
	}
	return !a.msg.Truncated
}

// excluded: ::ffff/96, the default of RFC 6147 §5.1.4; no host can reach an IPv4-mapped address.
func excluded(rr *dns.AAAA) bool {
	ip, ok := netip.AddrFromSlice(rr.AAAA)
	return ok && ip.Is4In6()
}

// hasUsableIPv4 says whether the answer for A names an address that IPv4 through a gateway would reach.
func hasUsableIPv4(a answer, native []netip.Prefix) bool {
	if a.msg == nil || a.code() != dns.RcodeSuccess {
		return false
	}
	for _, rr := range a.msg.Answer {
		if v, ok := rr.(*dns.A); ok {
			if ip, ok := netip.AddrFromSlice(v.A); ok && usable(ip.Unmap(), native) {
				return true
			}
		}
	}
	return false
}

// usable: not "this network" 0/8, loopback 127/8 (which blocklists answer with, RFC 5782), link-local 169.254/16,
// multicast, reserved and broadcast 224/3 (RFC 6890), nor what the operator reaches natively.
func usable(ip netip.Addr, native []netip.Prefix) bool {
	if !ip.Is4() {
		return false
	}
	b := ip.As4()
	if b[0] == 0 || b[0] == 127 || b[0] >= 224 || b[0] == 169 && b[1] == 254 {
		return false
	}
	for _, p := range native {
		if p.Contains(ip) {
			return false
		}
	}
	return true
}

// recorder keeps the answer back until it is let go.
type recorder struct {
	dns.ResponseWriter
	msg *dns.Msg
	raw []byte
}

// WriteMsg keeps m. An earlier message goes out first: only the last one can wait.
func (w *recorder) WriteMsg(m *dns.Msg) error {
	err := w.flush()
	w.msg = m
	return err
}

// Write keeps b, which stays the caller's.
func (w *recorder) Write(b []byte) (int, error) {
	if err := w.flush(); err != nil {
		return 0, err
	}
	w.raw = append([]byte{}, b...)
	return len(b), nil
}

// flush writes what is kept, as it is.
func (w *recorder) flush() error {
	var err error
	switch {
	case w.msg != nil:
		err = w.ResponseWriter.WriteMsg(w.msg)
	case w.raw != nil:
		_, err = w.ResponseWriter.Write(w.raw)
	}
	w.msg, w.raw = nil, nil
	return err
}
