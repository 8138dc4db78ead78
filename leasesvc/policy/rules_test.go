package policy

import (
	"net/netip"
	"testing"
	"time"

	"github.com/dstm-project/dstm/internal/config"
	"github.com/dstm-project/dstm/lease"
)

// parse reads a section policy as leasesvc.yaml has it.
func parse(t *testing.T, text string) Config {
	t.Helper()
	c, err := config.Parse("policy.yaml", []byte(text), func(c *Config, r *config.Report) { c.Check(r, "$", []string{"main", "guests"}) })
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	return *c
}

func at(t *testing.T, s string) time.Time {
	t.Helper()
	v, err := time.Parse("2006-01-02 15:04", s) // UTC
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func request() Request {
	return Request{Host: "lap7", Source: netip.MustParseAddr("2001:db8:1::7"), Trigger: lease.TriggerDNS, Pool: "main"}
}

func TestRules(t *testing.T) {
	const noon = "2026-03-04 12:00" // a Wednesday
	pass := Decision{Verdict: Allow}
	first := Decision{Deny, "denied by rule 1"}
	for _, c := range []struct {
		name, rules, now string
		change           func(*Request)
		want             Decision
	}{
		{"no rules", `[]`, noon, nil, pass},
		{"without conditions", `[{action: deny}]`, noon, nil, first},
		{"name in the reason", `[{action: deny, name: all}]`, noon, nil, Decision{Deny, "denied by rule all"}},
		{"reason", `[{action: deny, name: all, reason: closed today}]`, noon, nil, Decision{Deny, "closed today"}},
		{"first match counts", `[{action: allow, hosts: [lap7]}, {action: deny}]`, noon, nil, pass},
		{"first match does not hold", `[{action: allow, hosts: [lap8]}, {action: deny}]`, noon, nil, Decision{Deny, "denied by rule 2"}},
		{"host glob", `[{action: deny, hosts: ["x*", "lap?"]}]`, noon, nil, first},
		{"host glob is for the whole name", `[{action: deny, hosts: [lap]}]`, noon, nil, pass},
		{"host class", `[{action: deny, hosts: ["lap[0-6]"]}]`, noon, nil, pass},
		{"source", `[{action: deny, sources: ["2001:db8:9::/48", "2001:db8:1::/64"]}]`, noon, nil, first},
		{"other source", `[{action: deny, sources: ["2001:db8:9::/48"]}]`, noon, nil, pass},
		{"pool", `[{action: deny, pools: [guests, main]}]`, noon, nil, first},
		{"other pool", `[{action: deny, pools: [guests]}]`, noon, nil, pass},
		{"pool not chosen yet", `[{action: deny, pools: [main]}]`, noon, func(r *Request) { r.Pool = "" }, pass},
		{"trigger", `[{action: deny, triggers: [manual, dns]}]`, noon, nil, first},
		{"trigger not said", `[{action: deny, triggers: [manual, dns]}]`, noon, func(r *Request) { r.Trigger = lease.TriggerUnspecified }, pass},
		{"all conditions", `[{action: deny, hosts: [lap7], triggers: [packet]}]`, noon, nil, pass},
		{"in hours", `[{action: deny, schedules: [{from: "08:00", to: "12:01"}]}]`, noon, nil, first},
		{"end is not included", `[{action: deny, schedules: [{from: "08:00", to: "12:00"}]}]`, noon, nil, pass},
		{"unquoted times", `[{action: deny, schedules: [{from: 12:00, to: 12:01}]}]`, noon, nil, first},
		{"begin is included", `[{action: deny, schedules: [{from: "12:00"}]}]`, noon, nil, first},
		{"until midnight", `[{action: deny, schedules: [{from: "12:00"}]}]`, "2026-03-04 23:59", nil, first},
		{"24:00", `[{action: deny, schedules: [{from: "12:00", to: "24:00"}]}]`, "2026-03-04 23:59", nil, first},
		{"day", `[{action: deny, schedules: [{days: [wed]}]}]`, noon, nil, first},
		{"day of a range", `[{action: deny, schedules: [{days: [sat, mon-fri]}]}]`, noon, nil, first},
		{"range over the week's end", `[{action: deny, schedules: [{days: [sat-wed]}]}]`, noon, nil, first},
		{"other days", `[{action: deny, schedules: [{days: [thu-tue]}]}]`, noon, nil, pass},
		{"night, evening", `[{action: deny, schedules: [{days: [wed], from: "22:00", to: "06:00"}]}]`, "2026-03-04 22:00", nil, first},
		{"night, next morning", `[{action: deny, schedules: [{days: [wed], from: "22:00", to: "06:00"}]}]`, "2026-03-05 05:59", nil, first},
		{"night, over", `[{action: deny, schedules: [{days: [wed], from: "22:00", to: "06:00"}]}]`, "2026-03-05 06:00", nil, pass},
		{"night, morning of its own day", `[{action: deny, schedules: [{days: [wed], from: "22:00", to: "06:00"}]}]`, "2026-03-04 05:00", nil, pass},
		{"night before sunday", `[{action: deny, schedules: [{days: [sat], from: "22:00", to: "06:00"}]}]`, "2026-03-08 05:00", nil, first},
		{"zone", `[{action: deny, schedules: [{from: "13:00", to: "14:00", zone: Europe/Berlin}]}]`, noon, nil, first},
		{"zone, another day there", `[{action: deny, schedules: [{days: [thu], zone: Asia/Tokyo}]}]`, "2026-03-04 15:00", nil, first},
		// On 2026-03-29 the clocks of Berlin go from 02:00 to 03:00, at 01:00 UTC.
		{"skipped hour", `[{action: deny, schedules: [{from: "02:00", to: "03:00", zone: Europe/Berlin}]}]`, "2026-03-29 01:00", nil, pass},
		{"summer time", `[{action: deny, schedules: [{from: "13:00", to: "14:00", zone: Europe/Berlin}]}]`, "2026-03-29 12:00", nil, pass},
		// On 2026-10-25 they go from 03:00 to 02:00, at 01:00 UTC.
		{"hour the first time", `[{action: deny, schedules: [{from: "02:00", to: "03:00", zone: Europe/Berlin}]}]`, "2026-10-25 00:30", nil, first},
		{"hour the second time", `[{action: deny, schedules: [{from: "02:00", to: "03:00", zone: Europe/Berlin}]}]`, "2026-10-25 01:30", nil, first},
	} {
		t.Run(c.name, func(t *testing.T) {
			conf := parse(t, "budget: 50ms\nrules: "+c.rules)
			r := request()
			if c.change != nil {
				c.change(&r)
			}
			if got := decideByRules(conf.Rules, at(t, c.now), r); got != c.want {
				t.Errorf("decision %+v, want %+v", got, c.want)
			}
		})
	}
}
