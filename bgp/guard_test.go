package bgp

import (
	"net/netip"
	"strings"
	"testing"
)

func TestGuard(t *testing.T) {
	allow := []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24"), netip.MustParsePrefix("2001:db8:a::1/128")}
	for _, c := range []struct {
		name    string
		prefix  string
		nextHop string
		why     string // empty = passes
	}{
		{"pool", "198.51.100.0/24", "", ""},
		{"part of a pool", "198.51.100.128/25", "", ""},
		{"lease", "198.51.100.7/32", "", ""},
		{"tunnel address", "2001:db8:a::1/128", "", ""},
		{"IPv6 next hop for IPv4 (RFC 8950)", "198.51.100.0/24", "2001:db8:3::2", ""},
		{"larger than allowed", "198.51.100.0/23", "", "outside of allow_advertise [198.51.100.0/24 2001:db8:a::1/128]"},
		{"default route", "0.0.0.0/0", "", "outside of allow_advertise"},
		{"somebody else's", "203.0.113.0/24", "", "outside of allow_advertise"},
		{"neighbour of the tunnel address", "2001:db8:a::2/128", "", "outside of allow_advertise"},
		{"host bits", "198.51.100.7/24", "", "has host bits set: want 198.51.100.0/24"},
		{"IPv4 in IPv6", "::ffff:198.51.100.7/128", "", "not a prefix"},
		{"IPv4 next hop for IPv6", "2001:db8:a::1/128", "192.0.2.1", "want an IPv6 one"},
	} {
		r := Route{Prefix: netip.MustParsePrefix(c.prefix)}
		if c.nextHop != "" {
			r.NextHop = netip.MustParseAddr(c.nextHop)
		}
		pass, refused := Guard(allow, []Route{r})
		switch {
		case c.why == "" && (len(pass) != 1 || len(refused) != 0):
			t.Errorf("%s: refused: %v", c.name, refused)
		case c.why != "" && (len(pass) != 0 || len(refused) != 1 || !strings.Contains(refused[0].Reason, c.why)):
			t.Errorf("%s: pass %v, refused %v: want %q", c.name, pass, refused, c.why)
		}
	}
	r := Route{Prefix: allow[0]}
	if pass, refused := Guard(allow, []Route{r, r, {}}); len(pass) != 1 || len(refused) != 2 {
		t.Errorf("one route twice and none: pass %v, refused %v", pass, refused)
	}
	if pass, _ := Guard(nil, []Route{r}); len(pass) != 0 {
		t.Error("nothing is allowed, yet it passes")
	}
}

func TestParseCommunity(t *testing.T) {
	for s, want := range map[string]uint32{"64512:1": 64512<<16 | 1, "0:0": 0, "65535:65535": 0xFFFFFFFF, "no-export": 0xFFFFFF01, GracefulShutdown: 0xFFFF0000} {
		if got, err := ParseCommunity(s); err != nil || got != want {
			t.Errorf("%s: %#x, %v: want %#x", s, got, err, want)
		}
	}
	for _, s := range []string{"", "1", "1:2:3", "65536:1", "1:65536", "-1:2", "a:b", ":"} {
		if _, err := ParseCommunity(s); err == nil || !strings.Contains(err.Error(), `community "`+s+`": want`) {
			t.Errorf("%q: error %v", s, err)
		}
	}
	if got, err := ParseLargeCommunity("4294967295:0:7"); err != nil || got != [3]uint32{1<<32 - 1, 0, 7} {
		t.Errorf("large community: %v, %v", got, err)
	}
	for _, s := range []string{"1:2", "4294967296:1:1", "1:2:3:4"} {
		if _, err := ParseLargeCommunity(s); err == nil {
			t.Errorf("large community %q: no error", s)
		}
	}
}
