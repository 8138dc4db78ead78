package bgp

import (
	"fmt"
	"strconv"
	"strings"
)

// GracefulShutdown marks routes that are about to go (RFC 8326).
const GracefulShutdown = "graceful-shutdown"

// wellKnown are the communities that go by a name (the IANA registry of RFC 1997).
var wellKnown = map[string]uint32{
	GracefulShutdown: 0xFFFF0000, // RFC 8326
	"blackhole":      0xFFFF029A, // RFC 7999
	"no-export":      0xFFFFFF01, // RFC 1997
	"no-advertise":   0xFFFFFF02, // RFC 1997
	"no-peer":        0xFFFFFF04, // RFC 3765
}

// ParseCommunity reads "asn:value", both up to 65535, or a well-known name.
func ParseCommunity(s string) (uint32, error) {
	if v, ok := wellKnown[s]; ok {
		return v, nil
	}
	n, err := numbers(s, 2, 16)
	if err != nil {
		return 0, fmt.Errorf("community %q: want two numbers up to 65535 such as \"64512:1\", or a name such as no-export", s)
	}
	return n[0]<<16 | n[1], nil
}

// ParseLargeCommunity reads "global:local1:local2", each up to 4294967295 (RFC 8092).
func ParseLargeCommunity(s string) ([3]uint32, error) {
	n, err := numbers(s, 3, 32)
	if err != nil {
		return [3]uint32{}, fmt.Errorf("large community %q: want three numbers up to 4294967295 such as \"64512:1:2\"", s)
	}
	return [3]uint32(n), nil
}

func numbers(s string, count, bits int) ([]uint32, error) {
	parts := strings.Split(s, ":")
	if len(parts) != count {
		return nil, strconv.ErrSyntax
	}
	out := make([]uint32, count)
	for i, p := range parts {
		v, err := strconv.ParseUint(p, 10, bits)
		if err != nil {
			return nil, err
		}
		out[i] = uint32(v)
	}
	return out, nil
}
