package policy

import (
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/dstm-project/dstm/internal/config"
	"github.com/dstm-project/dstm/lease"
)

const whole = `
budget: 60ms
dir: /run/x
rules:
  - action: deny
    name: night
    hosts: ["lab-*", '[a-c]?']
    sources: ["2001:db8:1::/64"]
    pools: [main]
    triggers: [dns, packet, socket, manual]
    schedules:
      - {days: [mon-fri, sun], from: "22:00", to: 06:00, zone: Europe/Berlin}
    reason: closed at night
  - action: allow
quotas:
  per_host: {binds: 30, window: 1m}
  per_64: {binds: 300, window: 1h}
plugins:
  - name: web-1
    path: PROGRAM
    sha256: 0011223344556677889900112233445566778899001122334455667788990011
    args: [--url, "https://policy.example.net/"]
    on_failure: closed
    budget: 30ms
`

// program is a file that could be a plugin.
func program(t *testing.T, mode os.FileMode) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "program")
	if err := os.WriteFile(path, nil, mode); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestConfig(t *testing.T) {
	path := program(t, 0o755)
	got := parse(t, strings.Replace(whole, "PROGRAM", path, 1))
	berlin, err := time.LoadLocation("Europe/Berlin")
	if err != nil {
		t.Fatal(err)
	}
	digest := Digest{0, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 0x99}
	copy(digest[10:], digest[:10])
	copy(digest[20:], digest[:10])
	copy(digest[30:], digest[:2])
	want := Config{
		Budget: 60 * time.Millisecond, Dir: "/run/x",
		Rules: []Rule{{
			Action: Deny, Name: "night", Hosts: []Glob{"lab-*", "[a-c]?"}, Sources: []netip.Prefix{netip.MustParsePrefix("2001:db8:1::/64")},
			Pools: []string{"main"}, Triggers: []Trigger{{lease.TriggerDNS}, {lease.TriggerPacket}, {lease.TriggerSocket}, {lease.TriggerManual}},
			Schedules: []Schedule{{Days: []Days{{time.Monday, time.Friday}, {time.Sunday, time.Sunday}}, From: 22 * 60, To: 6 * 60, Zone: Zone{berlin}}},
			Reason:    "closed at night",
		}, {Action: Allow}},
		Quotas: QuotasConfig{PerHost: Quota{30, time.Minute}, Per64: Quota{300, time.Hour}},
		Plugins: []PluginConfig{{
			Name: "web-1", Path: path, SHA256: digest, Args: []string{"--url", "https://policy.example.net/"},
			OnFailure: Closed, Budget: 30 * time.Millisecond,
		}},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v\nwant %+v", got, want)
	}
	if got := parse(t, "quotas: {}"); !reflect.DeepEqual(got, Config{Budget: 50 * time.Millisecond, Dir: "/run/dstm-leasesvc"}) {
		t.Errorf("defaults %+v", got)
	}
}

// TestConfigErrors changes one thing of the whole one at a time.
func TestConfigErrors(t *testing.T) {
	path, plain := program(t, 0o755), program(t, 0o644)
	good := strings.Replace(whole, "PROGRAM", path, 1)
	for _, c := range []struct{ name, from, to, want string }{
		{"budget too long", "budget: 60ms", "budget: 501ms", "2:9: budget 501ms is outside 1ms..500ms"},
		{"budget too short", "budget: 60ms", "budget: 999us", "2:9: budget 999µs is outside"},
		{"budget no duration", "budget: 60ms", "budget: 60", `2:9: "60" is not a duration`},
		{"relative dir", "dir: /run/x", "dir: x", `3:6: dir "x": want an absolute path`},
		{"action", "action: allow", "action: permit", `14:13: action "permit": want allow or deny`},
		{"no action", "  - action: allow", "  - name: x", "14:5: rule 2 has no action: want allow or deny"},
		{"unknown key", "schedules:", "schedule:", `11:5: unknown key "schedule" (did you mean "schedules"?)`},
		{"glob", `"lab-*"`, `"lab-[*"`, `7:13: host pattern "lab-[*": want 1 to 128 characters`},
		{"empty glob", `"lab-*"`, `""`, `7:13: host pattern ""`},
		{"source", `"2001:db8:1::/64"`, `nowhere`, `8:15: "nowhere" is not a prefix`},
		{"source with host bits", `"2001:db8:1::/64"`, `"2001:db8:1::1/64"`, "8:15: rule 1: source 2001:db8:1::1/64: want an IPv6 prefix without host bits"},
		{"source of IPv4", `"2001:db8:1::/64"`, `192.0.2.0/24`, "8:15: rule 1: source 192.0.2.0/24: want an IPv6 prefix"},
		{"pool", "pools: [main]", "pools: [guests, mian]", `9:21: rule 1: there is no pool "mian"`},
		{"trigger", "[dns,", "[dsn,", `10:16: trigger "dsn": want dns, packet, socket or manual`},
		{"trigger unspecified", "[dns,", "[unspecified,", `10:16: trigger "unspecified"`},
		{"day", "mon-fri", "mon-fry", `12:17: days "mon-fry": want one of mon tue`},
		{"time", `"22:00"`, `"25:00"`, `12:38: time "25:00": want 00:00 to 24:00`},
		{"time of one digit", `"22:00"`, `"6:00"`, `12:38: time "6:00"`},
		{"empty schedule", `"22:00"`, `"06:00"`, "rule 1: schedule from 06:00 to 06:00 is empty"},
		{"from the end", `"22:00"`, `"24:00"`, "rule 1: schedule from 24:00 to 06:00 is empty"},
		{"zone", "Europe/Berlin", "Europe/Bonn", `12:64: zone "Europe/Bonn": want a time zone such as Europe/Berlin`},
		{"zone of the machine", "Europe/Berlin", "Local", `12:64: zone "Local": want`},
		{"reason", "closed at night", `"closed\nat night"`, "13:13: rule 1: reason: want one line of at most 200 bytes"},
		{"binds", "binds: 30,", "binds: -1,", "16:21: per_host: binds -1 is outside 0..1000000"},
		{"no binds", "binds: 30, ", "", "16:14: per_host: binds is not set"},
		{"window", "window: 1h", "window: 25h", "17:32: per_64: window 25h0m0s is outside 1s..24h0m0s"},
		{"no window", ", window: 1h", "", "17:12: per_64: window 0s is outside"},
		{"plugin name", "name: web-1", "name: web_1", `19:11: plugin 1: name "web_1": want letters a to z, digits and -`},
		{"long name", "name: web-1", "name: " + strings.Repeat("x", 60), "have more than 60 bytes together"},
		{"no plugin name", "- name: web-1\n   ", "-", `plugin 1: name "": want`},
		{"relative path", "path: " + path, "path: x", `20:11: plugin "web-1": path: "x": want the absolute path of a program`},
		{"no such file", "path: " + path, "path: /nowhere", `20:11: plugin "web-1": path: stat /nowhere: no such file`},
		{"directory", "path: " + path, "path: /", `20:11: plugin "web-1": path: / has mode d`},
		{"not executable", path, plain, "want a file that can be executed"},
		{"short digest", "990011\n", "9900\n", `21:13: sha256 "001122`},
		{"digest with other letters", "sha256: 00", "sha256: zz", "want 64 hexadecimal digits"},
		{"no digest", "sha256: 0011223344556677889900112233445566778899001122334455667788990011", "", "sha256 is not set: want what `sha256sum " + path},
		{"args", `[--url,`, `["a\0b",`, `22:12: plugin "web-1": argument 1 has a zero byte`},
		{"on_failure", "on_failure: closed", "on_failure: ignore", `23:17: on_failure "ignore": want open or closed`},
		{"no on_failure", "    on_failure: closed\n", "", `19:5: plugin "web-1": on_failure is not set: want open (leases without it) or closed (none)`},
		{"plugin budget", "budget: 30ms", "budget: 61ms", `24:13: plugin "web-1": budget 61ms is outside 1ms..60ms, the policy's budget`},
		{"name twice", "plugins:\n", "plugins:\n  - {name: web-1, path: " + path + ", sha256: " + strings.Repeat("1", 64) + ", on_failure: open}\n", `plugin name "web-1" is used twice`},
	} {
		t.Run(c.name, func(t *testing.T) {
			if !strings.Contains(good, c.from) {
				t.Fatalf("no %q to change", c.from)
			}
			_, err := config.Parse("x", []byte(strings.Replace(good, c.from, c.to, 1)), func(c *Config, r *config.Report) { c.Check(r, "$", []string{"main", "guests"}) })
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want %q in it", err, c.want)
			}
			if err != nil && !strings.HasPrefix(err.Error(), "x:") || err != nil && strings.HasPrefix(err.Error(), "x: ") {
				t.Errorf("error %q has no position", err)
			}
		})
	}
}

func TestTooMany(t *testing.T) {
	path := program(t, 0o755)
	one := "  - {path: " + path + ", sha256: " + strings.Repeat("ab", 32) + ", on_failure: open, name: p"
	text := "rules:\n" + strings.Repeat("  - {action: allow}\n", maxRules+1) + "plugins:\n"
	for i := range maxPlugins + 1 {
		text += one + string(rune('a'+i)) + "}\n"
	}
	_, err := config.Parse("x", []byte(text), func(c *Config, r *config.Report) { c.Check(r, "$", nil) })
	if err == nil || !strings.Contains(err.Error(), "257 rules: want at most 256") || !strings.Contains(err.Error(), "9 plugins: want at most 8") {
		t.Errorf("error %v", err)
	}
}
