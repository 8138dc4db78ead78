package policy

import (
	"cmp"
	"fmt"
	"net/netip"
	"path"
	"slices"
	"time"
)

// decideByRules returns what the first rule that matches says. Without one the rules have nothing against it.
func decideByRules(rules []Rule, now time.Time, r Request) Decision {
	for i := range rules {
		if rules[i].matches(now, r) {
			return rules[i].decision(i)
		}
	}
	return Decision{Verdict: Allow}
}

func (u *Rule) decision(i int) Decision {
	if u.Action == Allow {
		return Decision{Verdict: Allow}
	}
	name := cmp.Or(u.Name, fmt.Sprint(i+1))
	return Decision{Deny, cmp.Or(u.Reason, "denied by rule "+name)}
}

// matches reports whether every condition that is given holds.
func (u *Rule) matches(now time.Time, r Request) bool {
	return anyOf(u.Hosts, func(g Glob) bool { return g.match(r.Host) }) &&
		anyOf(u.Sources, func(p netip.Prefix) bool { return p.Contains(r.Source) }) &&
		anyOf(u.Pools, func(p string) bool { return p == r.Pool }) &&
		anyOf(u.Triggers, func(t Trigger) bool { return t.Trigger == r.Trigger }) &&
		anyOf(u.Schedules, func(s Schedule) bool { return s.contains(now) })
}

func anyOf[T any](conditions []T, holds func(T) bool) bool {
	return len(conditions) == 0 || slices.ContainsFunc(conditions, holds)
}

// match cannot fail: UnmarshalText has tried the pattern.
func (g Glob) match(s string) bool {
	ok, _ := path.Match(string(g), s)
	return ok
}

// contains reports whether now is in the schedule, by the clock on the wall there. In the hours that a change of daylight
// saving time skips or repeats, that clock is what counts, too.
func (s Schedule) contains(now time.Time) bool {
	now = now.In(s.Zone.location())
	at := TimeOfDay(now.Hour()*60 + now.Minute())
	today := now.Weekday()
	from, to := s.From, s.To
	if to == 0 {
		to = endOfDay
	}
	if from < to {
		return s.on(today) && from <= at && at < to
	}
	// Over midnight: the day is the one on which it began.
	return s.on(today) && from <= at || s.on((today+6)%7) && at < to
}

func (s Schedule) on(d time.Weekday) bool {
	return anyOf(s.Days, func(r Days) bool { return r.contain(d) })
}

func (r Days) contain(d time.Weekday) bool {
	if r.First <= r.Last {
		return r.First <= d && d <= r.Last
	}
	return d >= r.First || d <= r.Last
}
