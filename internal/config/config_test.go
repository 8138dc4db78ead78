package config

import (
	"errors"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

type pool struct {
	Name   string       `yaml:"name"`
	Prefix netip.Prefix `yaml:"prefix"`
}

type sample struct {
	Cell   string         `yaml:"cell"`
	Listen netip.AddrPort `yaml:"listen"`
	Valid  time.Duration  `yaml:"valid"`
	Pools  []pool         `yaml:"pools"`
}

func (s *sample) Defaults() { s.Valid = 15 * time.Minute }

func checkSample(s *sample, r *Report) {
	if s.Cell == "" {
		r.Errorf("$.cell", "cell is not set: want a name")
	}
	for i, p := range s.Pools {
		if p.Prefix.IsValid() && !p.Prefix.Addr().Is4() {
			r.Errorf(path(i), "prefix %s is not IPv4", p.Prefix)
		}
	}
}

func path(i int) string { return "$.pools[" + string(rune('0'+i)) + "].prefix" }

func TestParse(t *testing.T) {
	got, err := Parse("a.yaml", []byte("cell: lab\nlisten: \"[::1]:3545\"\npools:\n  - {name: main, prefix: 198.51.100.0/24}\n"), checkSample)
	if err != nil {
		t.Fatal(err)
	}
	want := &sample{
		Cell: "lab", Listen: netip.MustParseAddrPort("[::1]:3545"), Valid: 15 * time.Minute,
		Pools: []pool{{"main", netip.MustParsePrefix("198.51.100.0/24")}},
	}
	if d := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }), cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); d != "" {
		t.Error(d)
	}
}

func TestParseErrors(t *testing.T) {
	for _, c := range []struct{ name, in, want string }{
		{"unknown key", "cell: lab\nlisen: \"[::1]:1\"\n", `a.yaml:2:1: unknown key "lisen" (did you mean "listen"?): want one of cell, listen, valid, pools`},
		{"unknown key below", "cell: lab\npools:\n  - nam: x\n", `a.yaml:3:5: unknown key "nam" (did you mean "name"?): want one of name, prefix`},
		{"nothing near", "cell: lab\nfrobnicate: 1\n", `a.yaml:2:1: unknown key "frobnicate": want one of cell, listen, valid, pools`},
		{"check with position", "cell: lab\npools:\n  - name: x\n    prefix: 2001:db8::/32\n", `a.yaml:4:13: prefix 2001:db8::/32 is not IPv4`},
		{"missing key", "valid: 1s\n", `a.yaml:1:1: cell is not set: want a name`},
		{"empty file", "", `a.yaml: cell is not set: want a name`},
		{"two problems in order", "pools:\n  - prefix: 2001:db8::/32\n", "a.yaml:1:1: cell is not set: want a name\na.yaml:2:13: prefix 2001:db8::/32 is not IPv4"},
		{"two documents", "cell: a\n---\ncell: b\n", "a.yaml: 2 YAML documents: want one"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := Parse("a.yaml", []byte(c.in), checkSample)
			var e *Error
			if !errors.As(err, &e) {
				t.Fatalf("error %v (%T), want *Error", err, err)
			}
			if d := cmp.Diff(c.want, err.Error()); d != "" {
				t.Error(d)
			}
		})
	}
	// What the YAML library itself finds: the text is its own, the position is what we promise.
	for _, c := range []struct{ name, in, want string }{
		{"bad address", "cell: lab\nlisten: nonsense\n", `a.yaml:2:9: "nonsense" is not an address and port such as`},
		{"bad duration", "cell: lab\nvalid: soon\n", `a.yaml:2:8: "soon" is not a duration such as`},
		{"bad prefix in a list", "cell: lab\npools:\n  - prefix: 198.51.100.0\n", `a.yaml:3:13: "198.51.100.0" is not a prefix such as`},
		{"repeated key", "cell: lab\ncell: lab2\n", "a.yaml:2:1: "},
		{"syntax", "cell: [\n", "a.yaml:1:"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := Parse("a.yaml", []byte(c.in), checkSample)
			if err == nil || len(err.Error()) < len(c.want) || err.Error()[:len(c.want)] != c.want {
				t.Errorf("error %v, want it to begin with %q", err, c.want)
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("cell: lab\npools:\n  - {name: main, prefix: 198.51.100.0/24}\n"))
	f.Add([]byte("a: &a [*a]\n"))
	f.Add([]byte("? x\n: y\n"))
	f.Fuzz(func(t *testing.T, in []byte) {
		_, err := Parse("f", in, checkSample)
		var e *Error
		if err != nil && !errors.As(err, &e) {
			t.Fatalf("error %v (%T), want *Error", err, err)
		}
	})
}
