package policy

import (
	"encoding/hex"
	"fmt"
	"path"
	"strings"
	"time"

	"github.com/dstm-project/dstm/lease"
)

// The values of the configuration that have a text form of their own. Each says what is wrong with a text; package config
// adds where it stands.

// UnmarshalText implements encoding.TextUnmarshaler.
func (v *Verdict) UnmarshalText(b []byte) error {
	switch string(b) {
	case "allow":
		*v = Allow
	case "deny":
		*v = Deny
	default:
		return fmt.Errorf("action %q: want allow or deny", b)
	}
	return nil
}

// Glob is a pattern of host names: * stands for any text, ? for one character, [a-z] for one of these.
type Glob string

// UnmarshalText implements encoding.TextUnmarshaler.
func (g *Glob) UnmarshalText(b []byte) error {
	const most = 128
	if _, err := path.Match(string(b), ""); err != nil || len(b) == 0 || len(b) > most {
		return fmt.Errorf("host pattern %q: want 1 to %d characters in which * ? and [a-z] have a meaning", Clean(string(b), most), most)
	}
	*g = Glob(b)
	return nil
}

// Trigger is a lease.Trigger that the configuration names.
type Trigger struct{ lease.Trigger }

// UnmarshalText implements encoding.TextUnmarshaler.
func (t *Trigger) UnmarshalText(b []byte) error {
	for _, k := range []lease.Trigger{lease.TriggerDNS, lease.TriggerPacket, lease.TriggerSocket, lease.TriggerManual} {
		if string(b) == k.String() {
			t.Trigger = k
			return nil
		}
	}
	return fmt.Errorf("trigger %q: want dns, packet, socket or manual", b)
}

// Days is a day of the week, or several in a row.
type Days struct{ First, Last time.Weekday }

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *Days) UnmarshalText(b []byte) error {
	first, last, isRange := strings.Cut(string(b), "-")
	if !isRange {
		last = first
	}
	var ok1, ok2 bool
	d.First, ok1 = weekday(first)
	d.Last, ok2 = weekday(last)
	if !ok1 || !ok2 {
		return fmt.Errorf("days %q: want one of mon tue wed thu fri sat sun, or a range such as mon-fri", b)
	}
	return nil
}

func weekday(s string) (time.Weekday, bool) {
	for d := time.Sunday; d <= time.Saturday; d++ {
		if strings.ToLower(d.String()[:3]) == s {
			return d, true
		}
	}
	return 0, false
}

// TimeOfDay is a time on the wall clock, in minutes from midnight: 0 to 1440.
type TimeOfDay int

const endOfDay TimeOfDay = 24 * 60

// UnmarshalText implements encoding.TextUnmarshaler.
func (t *TimeOfDay) UnmarshalText(b []byte) error {
	if string(b) == "24:00" {
		*t = endOfDay
		return nil
	}
	at, err := time.Parse("15:04", string(b))
	if err != nil || len(b) != len("15:04") {
		return fmt.Errorf("time %q: want 00:00 to 24:00", b)
	}
	*t = TimeOfDay(at.Hour()*60 + at.Minute())
	return nil
}

// String returns hours and minutes.
func (t TimeOfDay) String() string { return fmt.Sprintf("%02d:%02d", int(t)/60, int(t)%60) }

// Zone is a time zone of the IANA database. The zero value is UTC.
type Zone struct{ loc *time.Location }

// UnmarshalText implements encoding.TextUnmarshaler.
func (z *Zone) UnmarshalText(b []byte) error {
	if len(b) == 0 || string(b) == "Local" {
		return fmt.Errorf("zone %q: want a time zone such as Europe/Berlin", b)
	}
	loc, err := time.LoadLocation(string(b))
	if err != nil {
		return fmt.Errorf("zone %q: want a time zone such as Europe/Berlin, and tzdata installed: %w", b, err)
	}
	z.loc = loc
	return nil
}

func (z Zone) location() *time.Location {
	if z.loc == nil {
		return time.UTC
	}
	return z.loc
}

// Digest is a SHA-256 digest.
type Digest [32]byte

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *Digest) UnmarshalText(b []byte) error {
	if n, err := hex.Decode(make([]byte, len(b)), b); err != nil || n != len(d) {
		return fmt.Errorf("sha256 %q: want 64 hexadecimal digits", Clean(string(b), 2*len(d)))
	}
	_, err := hex.Decode(d[:], b)
	return err
}

// OnFailure says what counts when a plugin does not answer.
type OnFailure uint8

// The two ways to fail.
const (
	Open   OnFailure = 1 // the plugin has nothing against it
	Closed OnFailure = 2 // the plugin denies
)

// UnmarshalText implements encoding.TextUnmarshaler.
func (f *OnFailure) UnmarshalText(b []byte) error {
	switch string(b) {
	case "open":
		*f = Open
	case "closed":
		*f = Closed
	default:
		return fmt.Errorf("on_failure %q: want open or closed", b)
	}
	return nil
}
