package dstm

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/coredns/caddy"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/dstm-project/dstm/internal/tlsid"
)

const must = "clients 2001:db8:1::/64\nto [2001:db8:2::10]:3545\ntls /c /k /a\n"

func TestParse(t *testing.T) {
	want := func(edit func(*config)) *config {
		c := &config{
			clients: []netip.Prefix{netip.MustParsePrefix("2001:db8:1::/64")},
			to:      []netip.AddrPort{netip.MustParseAddrPort("[2001:db8:2::10]:3545")},
			tls:     tlsid.Files{Cert: "/c", Key: "/k", CA: "/a"}, server: "2001:db8:2::10",
			hold: 250 * time.Millisecond, maxHeld: 10000, deny: defaultDeny(),
		}
		edit(c)
		return c
	}
	for _, c := range []struct {
		name, text string
		want       *config
		err        string // part of it
	}{
		{"minimum", "dstm {\n" + must + "}", want(func(*config) {}), ""},
		{
			"everything", "dstm {\n" + must + "tls_servername lease1.example.net\nhold 0s\nmax_held 7\nnative 10.0.0.0/8 192.0.2.0/24\nnative 198.51.100.0/24\ndeny Ads.example x.example.\nclients 2001:db8:9::/48\n}",
			want(func(c *config) {
				c.clients = append(c.clients, netip.MustParsePrefix("2001:db8:9::/48"))
				c.server, c.hold, c.maxHeld = "lease1.example.net", 0, 7
				c.native = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("198.51.100.0/24")}
				c.deny = append(c.deny, "ads.example.", "x.example.")
			}), "",
		},
		{"no block", "dstm", nil, "Corefile:1 - Error during parsing: clients is missing: want one or more IPv6 prefixes"},
		{"argument", "dstm x", nil, `unexpected argument "x"`},
		{"twice", "dstm {\n" + must + "}\ndstm {\n" + must + "}", nil, "second dstm"},
		{"no to", "dstm {\nclients 2001:db8:1::/64\ntls a b c\n}", nil, "to is missing"},
		{"no tls", "dstm {\nclients 2001:db8:1::/64\nto [2001:db8:2::10]:3545\n}", nil, "tls is missing"},
		{"unknown", "dstm {\n" + must + "holds 1s\n}", nil, `Corefile:5 - Error during parsing: unknown property "holds"`},
		{"given twice", "dstm {\n" + must + "hold 1s\nhold 1s\n}", nil, "hold is given twice"},
		{"IPv4 client", "dstm {\nclients 192.0.2.0/24\n}", nil, `clients: "192.0.2.0/24": wrong address family: want one or more IPv6`},
		{"client bits", "dstm {\nclients 2001:db8:1::1/64\n}", nil, "2001:db8:1::/64 was probably meant"},
		{"client no prefix", "dstm {\nclients 2001:db8:1::1\n}", nil, "want one or more IPv6 prefixes"},
		{"mapped client", "dstm {\nclients ::ffff:192.0.2.0/120\n}", nil, "clients"},
		{"name in to", "dstm {\nto lease1.example.net:3545\n}", nil, "would have to be resolved by this very server"},
		{"no port", "dstm {\nto 2001:db8::1\n}", nil, "address"},
		{"port 0", "dstm {\nto [2001:db8::1]:0\n}", nil, "address"},
		{"two files", "dstm {\ntls a b\n}", nil, "tls has 2 arguments: want the files CERT KEY CA"},
		{"long hold", "dstm {\nhold 2s\n}", nil, `hold: "2s": want one duration from 0 (off) to 1s`},
		{"negative hold", "dstm {\nhold -1ms\n}", nil, "from 0"},
		{"no unit", "dstm {\nhold 250\n}", nil, "want one duration"},
		{"none held", "dstm {\nmax_held 0\n}", nil, "want one number from 1 to 1000000"},
		{"IPv6 native", "dstm {\nnative 2001:db8::/32\n}", nil, "wrong address family"},
		{"empty deny", "dstm {\ndeny\n}", nil, "deny has 0 arguments"},
		{"bad deny", "dstm {\ndeny a..b\n}", nil, "want one or more domain names"},
		{"two servers", "dstm {\n" + strings.Replace(must, ":3545", ":3545 [2001:db8:2::11]:3545", 1) + "}", nil, "tls_servername is missing: with 2 servers"},
	} {
		got, err := parse(caddy.NewTestController("dns", c.text))
		switch {
		case c.err == "" && err != nil:
			t.Errorf("%s: %v", c.name, err)
		case c.err != "" && (err == nil || !strings.Contains(strings.Replace(err.Error(), "Testfile", "Corefile", 1), c.err)):
			t.Errorf("%s: error %v, want %q in it", c.name, err, c.err)
		case c.err == "":
			if diff := cmp.Diff(c.want, got, cmp.AllowUnexported(config{}), cmpopts.EquateComparable(netip.Prefix{}, netip.AddrPort{})); diff != "" {
				t.Errorf("%s: %s", c.name, diff)
			}
		}
	}
}

func TestCheckOrder(t *testing.T) {
	for _, c := range []struct {
		order, err string
	}{
		{"log dstm dns64 siit cache forward", ""},
		{"log dstm forward", ""},
		{"log dns64 dstm cache", "dstm stands after dns64"},
		{"log cache forward dstm", "dstm stands after cache"},
		{"dns64 siit dstm", `put the line "dstm:github.com/dstm-project/dstm/plugin/dstm" before "dns64:dns64" in plugin.cfg`},
	} {
		err := checkOrder(strings.Fields(c.order))
		if (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: %v, want %q", c.order, err, c.err)
		}
	}
}
