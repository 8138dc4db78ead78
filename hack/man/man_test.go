// Package man has no code: its test compares the manual pages with the programs.
package man

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/goccy/go-yaml"

	"github.com/dstm-project/dstm/hostd"
	"github.com/dstm-project/dstm/leasesvc"
	"github.com/dstm-project/dstm/tepd"
)

const root = "../.."

func page(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, "man", name))
	if err != nil {
		t.Fatal(err)
	}
	// The width of a list is given by one of its words.
	return regexp.MustCompile(`(?m)^\.Bl .*$`).ReplaceAllString(string(b), ".Bl")
}

// key is a key of a configuration.
type key struct {
	path string // lease_service.tls.cert; of a list's elements like of a section
	def  string // as the page should have it, "" = none
}

// structKeys returns the keys below v, a configuration with its defaults.
func structKeys(v reflect.Value, prefix string) []key {
	var keys []key
	for i := range v.NumField() {
		name, _, _ := strings.Cut(v.Type().Field(i).Tag.Get("yaml"), ",")
		if name == "" || name == "-" {
			continue
		}
		f, path := v.Field(i), prefix+name
		keys = append(keys, key{path, text(f)})
		if f.Kind() == reflect.Slice {
			f = reflect.Zero(f.Type().Elem())
		}
		if f.Kind() == reflect.Struct {
			keys = append(keys, structKeys(f, path+".")...)
		}
	}
	return keys
}

// text says a default as one writes it.
func text(v reflect.Value) string {
	if v.IsZero() || v.Kind() == reflect.Slice {
		return ""
	}
	switch x := v.Interface().(type) {
	case time.Duration:
		s := x.String()
		if strings.HasSuffix(s, "m0s") {
			s = strings.TrimSuffix(s, "0s")
		}
		if strings.HasSuffix(s, "h0m") {
			s = strings.TrimSuffix(s, "0m")
		}
		return s
	case fmt.Stringer: // addresses and prefixes
		return x.String()
	}
	if v.Kind() == reflect.Struct {
		return ""
	}
	return fmt.Sprint(v.Interface())
}

// fileKeys returns the keys of a YAML file.
func fileKeys(t *testing.T, name string) []key {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, name))
	if err != nil {
		t.Fatal(err)
	}
	var doc map[string]any
	if err := yaml.Unmarshal(b, &doc); err != nil {
		t.Fatal(err)
	}
	var keys []key
	var walk func(m map[string]any, prefix string)
	walk = func(m map[string]any, prefix string) {
		for name, v := range m {
			keys = append(keys, key{path: prefix + name})
			if below, ok := v.(map[string]any); ok {
				walk(below, prefix+name+".")
			}
		}
	}
	walk(doc, "")
	return keys
}

// pageKeys returns what a page's section CONFIGURATION says of each key: the items of its nested lists.
func pageKeys(t *testing.T, page string) map[string]string {
	t.Helper()
	_, section, found := strings.Cut(page, "\n.Sh CONFIGURATION\n")
	if !found {
		t.Fatal("no section CONFIGURATION")
	}
	section, _, _ = strings.Cut(section, "\n.Sh ")
	keys := map[string]string{}
	var path []string // an element for each list that is open, "" before its first item
	for line := range strings.Lines(section) {
		line = strings.TrimSpace(line)
		macro, rest, _ := strings.Cut(line, " ")
		switch at := strings.Join(path, "."); {
		case macro == ".Bl":
			path = append(path, "")
		case macro == ".El":
			path = path[:len(path)-1]
		case macro == ".It":
			name, ok := strings.CutPrefix(rest, "Ic ")
			if !ok || strings.Contains(name, " ") {
				t.Errorf("item %q: want one key", line)
			}
			path[len(path)-1] = name
			at = strings.Join(path, ".")
			if _, twice := keys[at]; twice {
				t.Errorf("%s stands there twice", at)
			}
			keys[at] = ""
		case at == "":
		case strings.HasPrefix(macro, "."):
			keys[at] += " " + rest
		default:
			keys[at] += " " + line
		}
	}
	return keys
}

func TestConfigurationKeys(t *testing.T) {
	var svc leasesvc.Config
	var tep tepd.Config
	var host hostd.Config
	svc.Defaults()
	tep.Defaults()
	host.Defaults()
	for name, want := range map[string][]key{
		"leasesvc.8": structKeys(reflect.ValueOf(svc), ""),
		"tepd.8":     structKeys(reflect.ValueOf(tep), ""),
		"dstmd.8":    structKeys(reflect.ValueOf(host), ""),
		"dstm.1":     fileKeys(t, "deploy/dstm.yaml"),
	} {
		t.Run(name, func(t *testing.T) {
			said := pageKeys(t, page(t, name))
			for _, k := range want {
				what, there := said[k.path]
				delete(said, k.path)
				switch {
				case !there:
					t.Errorf("%s is missing", k.path)
				case k.def != "" && !regexp.MustCompile(`Default: `+regexp.QuoteMeta(k.def)+`( ?[.;,]|$)`).MatchString(what):
					t.Errorf("%s: the default is %s, the page says:%s", k.path, k.def, what)
				}
			}
			for path := range said {
				t.Errorf("%s is no key", path)
			}
		})
	}
}

// build returns a directory with the programs.
func build(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	c := exec.Command("go", "build", "-o", dir+"/", "./cmd/leasesvc", "./cmd/tepd", "./cmd/dstmd", "./cmd/dstm")
	c.Dir = root
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return dir
}

func help(t *testing.T, program string, args ...string) string {
	t.Helper()
	out, err := exec.Command(program, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", program, args, err, out)
	}
	return string(out)
}

var (
	daemonFlag = regexp.MustCompile(`(?m)^  -([a-z-]+)`)
	toolFlag   = regexp.MustCompile(`(?m)^ +(?:-[a-z], )?--([a-z-]+)`)
	toolSub    = regexp.MustCompile(`(?m)^  ([a-z]+) {2,}`)
)

func TestPrograms(t *testing.T) {
	bin := build(t)
	t.Run("flags", func(t *testing.T) { testFlags(t, bin) })
	t.Run("examples", func(t *testing.T) { testExamples(t, bin) })
}

// testExamples gives the configuration in each daemon's page to the daemon.
func testExamples(t *testing.T, bin string) {
	for _, d := range []string{"leasesvc", "tepd", "dstmd"} {
		_, example, found := strings.Cut(page(t, d+".8"), "\n.Bd -literal -offset indent\ncell: ")
		example, _, ended := strings.Cut(example, "\n.Ed\n")
		if !found || !ended {
			t.Errorf("%s.8: no example of a configuration", d)
			continue
		}
		file := filepath.Join(t.TempDir(), d+".yaml")
		if err := os.WriteFile(file, []byte("cell: "+example+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command(filepath.Join(bin, d), "-t", "-c", file).CombinedOutput(); err != nil {
			t.Errorf("%s.8: %v\n%s", d, err, out)
		}
	}
}

func testFlags(t *testing.T, bin string) {
	for _, d := range []string{"leasesvc", "tepd", "dstmd"} {
		text := page(t, d+".8")
		flags := daemonFlag.FindAllStringSubmatch(help(t, filepath.Join(bin, d), "-h"), -1)
		if len(flags) < 4 {
			t.Errorf("%s: only the flags %v were found", d, flags)
		}
		for _, f := range flags {
			if !strings.Contains(text, "\n.It Fl "+f[1]) {
				t.Errorf("%s.8: flag -%s is missing", d, f[1])
			}
		}
	}
	text, seen := page(t, "dstm.1"), 0
	var walk func(path []string)
	walk = func(path []string) {
		out := help(t, filepath.Join(bin, "dstm"), append(path, "--help")...)
		for _, f := range toolFlag.FindAllStringSubmatch(out, -1) {
			if !regexp.MustCompile(`Fl -` + f[1] + `\b|, -` + f[1] + `\b`).MatchString(text) {
				t.Errorf("dstm.1: flag --%s of %v is missing", f[1], path)
			}
		}
		_, commands, found := strings.Cut(out, "Available Commands:\n")
		if !found {
			return
		}
		commands, _, _ = strings.Cut(commands, "\n\n")
		for _, s := range toolSub.FindAllStringSubmatch(commands, -1) {
			if s[1] == "help" || s[1] == "completion" {
				continue
			}
			next := append(append([]string{}, path...), s[1])
			if whole := strings.Join(next, " "); !strings.Contains(text, "\n.It Ic "+whole) {
				t.Errorf("dstm.1: command %s is missing", whole)
			}
			seen++
			walk(next)
		}
	}
	walk(nil)
	if seen < 15 {
		t.Errorf("only %d commands were found", seen)
	}
}
