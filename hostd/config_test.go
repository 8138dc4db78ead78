package hostd

import (
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/dstm-project/dstm/internal/daemon"
	"github.com/dstm-project/dstm/internal/tlsid"
)

const minimal = `cell: lab
lease_service: {servers: ["[2001:db8:2::10]:3545"], name: lease1.example.net, tls: {cert: host.pem, key: host.key, ca: ca.pem}}
`

// The reference file says what its comments claim: the values that it spells out are the defaults.
func TestReferenceConfig(t *testing.T) {
	got, err := LoadConfig("../deploy/dstmd.yaml")
	if err != nil {
		t.Fatal(err)
	}
	want := &Config{
		Cell: "lab",
		LeaseService: LeaseService{
			Servers: []netip.AddrPort{netip.MustParseAddrPort("[2001:db8:2::10]:3545")}, Name: "lease1.example.net",
			TLS: tlsid.Files{Cert: "/etc/dstm/host.pem", Key: "/etc/dstm/host.key", CA: "/etc/dstm/ca.pem"},
		},
		Device:  Device{"dstm0", netip.MustParsePrefix("192.0.0.2/29"), 4096, InboundEstablished, 64},
		Trigger: TriggerConfig{true, 64, 3 * time.Second},
		Idle:    IdleConfig{KeepOpenSockets: true},
		Paths:   Paths{"/run/dstm", "/sys/fs/bpf/dstm"},
		Admin:   netip.MustParseAddrPort("[::1]:9547"),
		Log:     daemon.LogConfig{Level: "info", Format: "text"},
	}
	apCmp := cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })
	if d := cmp.Diff(want, got, addrCmp, pfxCmp, apCmp); d != "" {
		t.Errorf("reference configuration (-want +got):\n%s", d)
	}
	least, err := ParseConfig("minimal.yaml", []byte(minimal))
	if err != nil {
		t.Fatal(err)
	}
	least.LeaseService, least.Admin, least.Log = want.LeaseService, want.Admin, want.Log
	if d := cmp.Diff(want, least, addrCmp, pfxCmp, apCmp); d != "" {
		t.Errorf("defaults against the reference (-reference +defaults):\n%s", d)
	}
	b, err := os.ReadFile("../deploy/dstmd.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, shown := range []string{"# hop_limit: 64", "# after: 0s", "# paths: {run: /run/dstm, bpf: /sys/fs/bpf/dstm}"} {
		if !strings.Contains(string(b), shown) {
			t.Errorf("reference configuration does not show the default %q", shown)
		}
	}
}

func TestConfigErrors(t *testing.T) {
	for _, c := range []struct{ name, text, want string }{
		{"nothing", "", "c.yaml: cell is missing"},
		{"unknown key", minimal + "divice: {}\n", `c.yaml:3:1: unknown key "divice" (did you mean "device"?)`},
		{"uplinks word", minimal + "uplinks: some\n", `uplinks "some": want auto or a list of interface names`},
		{"uplink is the device", minimal + "uplinks: [eth0, dstm0]\n", `c.yaml:3:17: uplink "dstm0": want an interface name of 1 to 15 characters, other than device.name`},
		{"server over ipv4", strings.Replace(minimal, "[2001:db8:2::10]", "192.0.2.1", 1), `c.yaml:2:27: server 192.0.2.1:3545: want an IPv6 address and a port`},
		{"long device name", minimal + "device: {name: sixteencharacters}\n", `c.yaml:3:16: name "sixteencharacters": want an interface name of 1 to 15 characters`},
		{"placeholder", minimal + "device: {placeholder: \"2001:db8::1/64\"}\n", "want an IPv4 address with prefix length such as 192.0.0.2/29"},
		{"metric", minimal + "device: {metric: 0}\n", "metric 0: want one that is worse"},
		{"inbound", minimal + "device: {inbound: closed}\n", `c.yaml:3:19: inbound "closed": want established or open`},
		{"hop limit", minimal + "device: {hop_limit: 0}\n", "hop_limit 0: want 1 to 255"},
		{"queue", minimal + "trigger: {hold_packets: 5000}\n", "hold_packets 5000: want 0 to 4096"},
		{"hold time", minimal + "trigger: {hold_time: 2m}\n", "hold_time 2m0s: want 0s to 1m"},
		{"idle", minimal + "idle: {after: 10ms}\n", "after 10ms: want 1s to 24h"},
		{"admin", minimal + "admin: \"[2001:db8::1]:9547\"\n", "want a loopback address"},
		{"path", minimal + "paths: {run: run}\n", `run "run": want an absolute path`},
		{"no tls key", strings.Replace(minimal, "key: host.key, ", "", 1), `with key "": want both, or neither`},
	} {
		_, err := ParseConfig("c.yaml", []byte(c.text))
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error %v, want %q", c.name, err, c.want)
		}
	}
	got, err := ParseConfig("c.yaml", []byte(minimal+"uplinks: [eth0, wlan0]\n"))
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(Uplinks{"eth0", "wlan0"}, got.Uplinks); d != "" {
		t.Errorf("uplinks (-want +got):\n%s", d)
	}
}
