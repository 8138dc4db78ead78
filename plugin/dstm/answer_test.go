package dstm

import (
	"net"
	"net/netip"
	"testing"

	"github.com/miekg/dns"
)

// reply builds an answer from records in presentation form.
func reply(t testing.TB, rcode int, rrs ...string) answer {
	t.Helper()
	m := new(dns.Msg)
	m.Rcode = rcode
	for _, s := range rrs {
		rr, err := dns.NewRR(s)
		if err != nil {
			t.Fatal(err)
		}
		m.Answer = append(m.Answer, rr)
	}
	return answer{msg: m}
}

func mapped(t testing.TB) answer {
	a := reply(t, dns.RcodeSuccess, "n.example. AAAA 2001:db8::1")
	a.msg.Answer[0].(*dns.AAAA).AAAA = net.ParseIP("::ffff:203.0.113.1")
	return a
}

func TestLacksIPv6(t *testing.T) {
	cut := reply(t, dns.RcodeSuccess)
	cut.msg.Truncated = true
	both := mapped(t)
	both.msg.Answer = append(both.msg.Answer, reply(t, 0, "n.example. AAAA 2001:db8::1").msg.Answer...)
	for _, c := range []struct {
		name string
		a    answer
		want bool
	}{
		{"5.1.2 empty", reply(t, dns.RcodeSuccess), true},
		{"5.1.2 address", reply(t, dns.RcodeSuccess, "n.example. AAAA 2001:db8::1"), false},
		{"5.1.2 NXDOMAIN", reply(t, dns.RcodeNameError), false},
		{"5.1.2 NXDOMAIN after CNAME", reply(t, dns.RcodeNameError, "n.example. CNAME m.example."), false},
		{"5.1.2 SERVFAIL", reply(t, dns.RcodeServerFailure), true},
		{"5.1.2 NOTIMP", reply(t, dns.RcodeNotImplemented), true},
		{"5.1.2 REFUSED", reply(t, dns.RcodeRefused), true},
		{"5.1.3 no answer", none(), true},
		{"no message but NXDOMAIN", answer{rcode: dns.RcodeNameError}, false},
		{"5.1.4 mapped only", mapped(t), true},
		{"5.1.4 mapped and real", both, false},
		{"5.1.5 CNAME to nothing", reply(t, 0, "n.example. CNAME m.example."), true},
		{"5.1.5 CNAME to address", reply(t, 0, "n.example. CNAME m.example.", "m.example. AAAA 2001:db8::1"), false},
		{"5.1.5 DNAME to nothing", reply(t, 0, "example. DNAME example.net.", "n.example. CNAME n.example.net."), true},
		{"cut", cut, false},
	} {
		if got := lacksIPv6(c.a); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

func TestUsableIPv4(t *testing.T) {
	native := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
	for addr, want := range map[string]bool{
		"203.0.113.1": true, "128.0.0.1": true, "126.255.255.255": true, "223.255.255.255": true, "169.253.0.1": true, "1.0.0.0": true,
		"0.0.0.0": false, "0.255.255.255": false, "127.0.0.2": false, "127.255.255.255": false, "169.254.0.1": false,
		"224.0.0.1": false, "240.0.0.1": false, "255.255.255.255": false, "10.1.2.3": false, "11.0.0.0": true,
	} {
		if got := hasUsableIPv4(reply(t, 0, "n.example. A "+addr), native); got != want {
			t.Errorf("%s: %v, want %v", addr, got, want)
		}
	}
	for name, a := range map[string]answer{
		"none": none(), "empty": reply(t, 0), "code": reply(t, dns.RcodeNameError, "n.example. A 203.0.113.1"),
		"no length": {msg: &dns.Msg{Answer: []dns.RR{&dns.A{}}}},
	} {
		if hasUsableIPv4(a, nil) {
			t.Errorf("%s: usable", name)
		}
	}
	if !hasUsableIPv4(reply(t, 0, "n.example. CNAME m.example.", "m.example. A 127.0.0.1", "m.example. A 203.0.113.1"), nil) {
		t.Error("one usable address of two is not enough")
	}
}
