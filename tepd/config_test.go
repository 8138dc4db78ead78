package tepd

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/dstm-project/dstm/bgp"
	"github.com/dstm-project/dstm/internal/daemon"
	"github.com/dstm-project/dstm/internal/tlsid"
)

// The reference file says what its comments claim.
func TestReferenceConfig(t *testing.T) {
	got, err := LoadConfig("../deploy/tepd.yaml")
	if err != nil {
		t.Fatal(err)
	}
	want := &Config{
		Cell: "lab", ID: "tep1",
		LeaseService: LeaseService{
			Servers: []netip.AddrPort{netip.MustParseAddrPort("[2001:db8:2::10]:3545")}, Name: "lease1.example.net",
			TLS: tlsid.Files{Cert: "/etc/dstm/tep.pem", Key: "/etc/dstm/tep.key", CA: "/etc/dstm/ca.pem"},
		},
		Peers: PeersConfig{netip.MustParseAddrPort("[2001:db8:3::11]:3546")},
		Tunnel: Tunnel{
			Address: tepAddr, Uplinks: []string{"eth1"}, Device: "dstm0", IPv4Address: netip.MustParseAddr("192.0.2.1"),
			Engine: "auto", HopLimit: 64, Hairpin: true,
		},
		BGP: BGP{
			ASN: 64512, RouterID: netip.MustParseAddr("192.0.2.1"), AllowAdvertise: []netip.Prefix{poolPfx, pfx("2001:db8:a::1/128")},
			Peers:    []Peer{{Address: netip.MustParseAddr("2001:db8:3::1"), ASN: 64513, HoldTime: 9 * time.Second}},
			Announce: Announce{Pool: PoolAggregate, TEP: true, Community: []string{"64512:1"}, MaxHostRoutes: 10_000},
			Speaker:  SpeakerConfig{Type: "gobgp", Grace: time.Minute, Orphan: 5 * time.Minute},
		},
		Health: HealthConfig{time.Second, 3, 3, netip.MustParseAddr("192.0.0.8")},
		Paths:  Paths{"/run/dstm", "/sys/fs/bpf/dstm"},
		Admin:  netip.MustParseAddrPort("[::1]:9546"),
		Log:    daemon.LogConfig{Level: "info", Format: "text"},
	}
	cmpAP := cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })
	if d := cmp.Diff(want, got, cmpAddr, cmpPrefix, cmpAP); d != "" {
		t.Errorf("reference configuration (-want +got):\n%s", d)
	}
	b, err := os.ReadFile("../deploy/tepd.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, shown := range []string{
		"# device: dstm0", "# engine: auto", "# hop_limit: 64", "# mtu: 0", "# hairpin: true", "# max_host_routes: 10000",
		"# speaker: {type: gobgp, grace: 60s, orphan: 5m}", "# health: {interval: 1s, rise: 3, fall: 3, exit: 192.0.0.8}",
		"# paths: {run: /run/dstm, bpf: /sys/fs/bpf/dstm}",
	} {
		if !strings.Contains(string(b), shown) {
			t.Errorf("reference configuration does not show the default %q", shown)
		}
	}
}

func TestWithoutBGP(t *testing.T) {
	c, err := ParseConfig("c.yaml", []byte(testConfig))
	if err != nil || c.BGP.Enabled() {
		t.Errorf("enabled %t, error %v: want no BGP and no error", c.BGP.Enabled(), err)
	}
}

func TestConfigErrors(t *testing.T) {
	full := testConfig + testBGP
	edit := func(old, with string) string { return strings.Replace(full, old, with, 1) }
	for _, c := range []struct{ name, text, want string }{
		{"nothing", "", "c.yaml: cell is missing"},
		{"unknown key", full + "tunel: {}\n", `c.yaml:9:1: unknown key "tunel" (did you mean "tunnel"?)`},
		{"unknown key inside", edit("tunnel: {", "tunnel: {uplink: eth1, "), `c.yaml:4:10: unknown key "uplink"`},
		{"key twice", full + "id: tep2\n", "c.yaml:9:1: "},
		{"syntax", full + "admin: [\n", "c.yaml:9"},
		{"no id", edit("id: tep1\n", ""), "id is missing"},
		{"no server", edit(`servers: ["[2001:db8:2::10]:3545"], `, ""), "servers is missing"},
		{"server over ipv4", edit("[2001:db8:2::10]", "192.0.2.1"), "c.yaml:3:27: server 192.0.2.1:3545: want an IPv6 address and a port"},
		{"server without port", edit("[2001:db8:2::10]:3545", "2001:db8:2::10"), `is not an address and port`},
		{"no tls key", edit("key: tep.key, ", ""), "key is missing: want the path of a PEM file"},
		{"tunnel over ipv4", edit(`address: "2001:db8:a::1"`, "address: 192.0.2.7"), "c.yaml:4:19: address 192.0.2.7: want the global IPv6 address"},
		{"no tunnel address", edit(`address: "2001:db8:a::1", `, ""), "address is missing: want the global IPv6 address"},
		{"ipv6 as ipv4", edit("192.0.2.1}", `"2001:db8::1"}`), "ipv4_address 2001:db8::1: want an IPv4 address"},
		{"device", edit("tunnel: {", "tunnel: {device: lo, "), `c.yaml:4:18: device "lo": want an interface name`},
		{"uplink is the device", edit("tunnel: {", "tunnel: {uplinks: [dstm0], "), `c.yaml:4:20: uplink "dstm0": want an interface name of 1 to 15 characters, other than tunnel.device`},
		{"engine", edit("tunnel: {", "tunnel: {engine: xdp, "), `engine "xdp": want auto or tc`},
		{"hop limit", edit("tunnel: {", "tunnel: {hop_limit: 0, "), "hop_limit 0: want 1 to 255"},
		{"mtu", edit("tunnel: {", "tunnel: {mtu: 1239, "), "mtu 1239: want 1240"},
		{"no asn", edit("  asn: 64512\n", ""), "asn is missing: want this gateway's"},
		{"allow with host bits", edit("198.51.100.0/24", "198.51.100.1/24"), "c.yaml:7:21: prefix 198.51.100.1/24 has host bits set: want 198.51.100.0/24"},
		{"tunnel address outside", edit(`, "2001:db8:a::1/128"]`, "]"), "tunnel address 2001:db8:a::1/128 is outside of allow_advertise: add it, or set announce.tep to false"},
		{"no peers", testConfig + "bgp: {asn: 64512, allow_advertise: [198.51.100.0/24], announce: {tep: false}}\n", "peers is missing"},
		{"no peer asn", edit(", asn: 64513", ""), "asn is missing: want the neighbour's"},
		{"hold time", edit("hold_time: 9s", "hold_time: 2s"), "c.yaml:8:61: hold_time 2s: want whole seconds from 3s to 65535s"},
		{"restart time", edit("hold_time: 9s", "restart_time: 2h"), "restart_time 2h0m0s: want whole seconds up to 4095s"},
		{"duration", edit("hold_time: 9s", "hold_time: 9"), `c.yaml:8:61: "9" is not a duration`},
		{"pool mode", full + "  announce: {pool: all}\n", `c.yaml:9:20: pool "all": want aggregate or lease`},
		{"cap", full + "  announce: {max_host_routes: 0}\n", "max_host_routes 0: want 1 to 1000000"},
		{"community", full + "  announce: {community: [\"70000:1\"]}\n", `c.yaml:9:26: community "70000:1": want two numbers up to 65535`},
		{"speaker type", full + "  speaker: {type: bird}\n", `type "bird": want gobgp, or give the path`},
		{"speaker digest", full + "  speaker: {path: /usr/bin/speaker, sha256: abc}\n", `sha256 "abc": want 64 hexadecimal digits`},
		{"digest alone", full + "  speaker: {sha256: abc}\n", "sha256 without path: want both or neither"},
		{"speaker path", full + "  speaker: {path: speaker}\n", `path "speaker": want an absolute path`},
		{"grace", full + "  speaker: {grace: 2h}\n", "grace 2h0m0s: want 0s to 1h"},
		{"orphan", full + "  speaker: {orphan: 10ms}\n", "orphan 10ms: want 1s to 24h"},
		{"interval", full + "health: {interval: 1ms}\n", "interval 1ms: want 10ms to 1m"},
		{"rise", full + "health: {rise: 0}\n", "c.yaml:9:16: rise 0: want 1 to 100"},
		{"fall", full + "health: {fall: 101}\n", "fall 101: want 1 to 100"},
		{"exit", full + "health: {exit: \"2001:db8::1\"}\n", "exit 2001:db8::1: want an IPv4 address"},
		{"admin", full + "admin: \"[2001:db8::1]:9546\"\n", "c.yaml:9:8: admin address [2001:db8::1]:9546: want a loopback address"},
		{"path", full + "paths: {run: run}\n", `c.yaml:9:14: run "run": want an absolute path`},
		{"log", full + "log: {level: loud}\n", `log level "loud": want debug, info, warn or error`},
	} {
		_, err := ParseConfig("c.yaml", []byte(c.text))
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error %v, want %q", c.name, err, c.want)
		}
	}
}

func TestSpeakerConfig(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "md5")
	if err := os.WriteFile(secret, []byte("s3cret\nsecond line\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c := mustConfig(t, testConfig+strings.Replace(testBGP, "hold_time: 9s", "graceful_restart: true, password_file: "+secret, 1))
	got, err := c.BGP.SpeakerConfig(readPassword)
	if err != nil {
		t.Fatal(err)
	}
	want := bgp.Config{
		ASN: 64512, RouterID: netip.MustParseAddr("192.0.2.1"), Allow: []netip.Prefix{poolPfx, pfx("2001:db8:a::1/128")}, Orphan: 5 * time.Minute,
		Peers: []bgp.Peer{{
			Address: netip.MustParseAddr("2001:db8:3::1"), ASN: 64513, HoldTime: 90 * time.Second, Password: "s3cret",
			GracefulRestart: true, RestartTime: 2 * time.Minute,
		}},
	}
	if d := cmp.Diff(want, got, cmpAddr, cmpPrefix); d != "" {
		t.Errorf("speaker configuration (-want +got):\n%s", d)
	}
	for name, text := range map[string]string{"empty": "", "empty first line": "\nx", "too long": strings.Repeat("x", 81)} {
		if err := os.WriteFile(secret, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := c.BGP.SpeakerConfig(readPassword); err == nil || !strings.Contains(err.Error(), "in its first line: want 1 to 80") {
			t.Errorf("%s password: error %v", name, err)
		}
	}
	if err := os.Remove(secret); err != nil {
		t.Fatal(err)
	}
	if _, err := c.BGP.SpeakerConfig(readPassword); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing password file: error %v", err)
	}
}

func FuzzParseConfig(f *testing.F) {
	f.Add([]byte(testConfig + testBGP))
	f.Fuzz(func(_ *testing.T, b []byte) {
		if c, err := ParseConfig("c.yaml", b); err == nil && c.BGP.Enabled() {
			_, _ = c.BGP.SpeakerConfig(func(string) (string, error) { return "", nil })
		}
	})
}
