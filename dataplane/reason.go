package dataplane

import "fmt"

// DropReason is why a packet was dropped. The numbers are shared with dataplane/bpf/c/dstm.h; a test compares them. A
// number is never used again for another reason.
type DropReason uint8

// The reasons.
const (
	DropMalformed        DropReason = 1
	DropSessionExpired   DropReason = 2
	DropNoBinding        DropReason = 3
	DropOuterSource      DropReason = 4
	DropOuterDestination DropReason = 5
	DropInnerAddress     DropReason = 6
	DropECN              DropReason = 7
	DropHairpin          DropReason = 8
	DropTooBig           DropReason = 9
	DropNoRoute          DropReason = 10
	DropNotIPv4          DropReason = 11
	DropOption           DropReason = 12
	DropInternal         DropReason = 13
)

// maxReasons is the size of the counters' table in the packet path; reasons lie below it.
const maxReasons = 32

var reasons = [maxReasons]struct{ name, explain string }{
	DropMalformed:        {"malformed", "headers are cut short or contradict each other"},
	DropSessionExpired:   {"session_expired", "the deadline has passed: no word from the lease service, or the lease ended"},
	DropNoBinding:        {"no_binding", "nobody has leased the inner address"},
	DropOuterSource:      {"outer_source", "the packet came from another tunnel source than the binding's"},
	DropOuterDestination: {"outer_destination", "the packet came to another gateway address than the one of the binding"},
	DropInnerAddress:     {"inner_address", "the inner source or destination is none that may go through a tunnel"},
	DropECN:              {"ecn", "congestion was marked outside on a packet that is not ECN-capable inside (RFC 6040)"},
	DropHairpin:          {"hairpin", "from one host to another through this gateway: switched off, or out of hops"},
	DropTooBig:           {"too_big", "larger than what fits through the tunnel"},
	DropNoRoute:          {"no_route", "no IPv6 route to the other end of the tunnel"},
	DropNotIPv4:          {"not_ipv4", "only IPv4 goes through the tunnel"},
	DropOption:           {"option", "IPv6 options that must not be ignored (RFC 8200 section 4.2), or over 8 bytes"},
	DropInternal:         {"internal", "the kernel refused to change the packet"},
}

// String returns the metric label.
func (r DropReason) String() string {
	if r < maxReasons && reasons[r].name != "" {
		return reasons[r].name
	}
	return fmt.Sprintf("reason_%d", uint8(r))
}

// Explain returns a sentence for people.
func (r DropReason) Explain() string {
	if r < maxReasons && reasons[r].name != "" {
		return reasons[r].explain
	}
	return "a reason that this version does not know"
}

// Reasons lists every reason in order of its number.
func Reasons() []DropReason {
	var out []DropReason
	for i, r := range reasons {
		if r.name != "" {
			out = append(out, DropReason(i))
		}
	}
	return out
}
