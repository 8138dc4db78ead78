// Package man has no code: its test compares the manual pages with the programs.
package man

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

const root = "../.."

func page(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, "man", name))
	if err != nil {
		t.Fatal(err)
	}
	// The width of a list is given by one of its words.
	return regexp.MustCompile(`(?m)^\.Bl .*$`).ReplaceAllString(string(b), "")
}

// names reports whether the page has the word as a word of its own.
func names(page, word string) bool {
	return regexp.MustCompile(`(^|[^A-Za-z0-9_-])` + regexp.QuoteMeta(word) + `($|[^A-Za-z0-9_-])`).MatchString(page)
}

// yamlKeys returns every key of the configuration structs in the files, by their tags.
func yamlKeys(t *testing.T, files ...string) []string {
	t.Helper()
	var keys []string
	for _, f := range files {
		tree, err := parser.ParseFile(token.NewFileSet(), filepath.Join(root, f), nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(tree, func(n ast.Node) bool {
			field, ok := n.(*ast.Field)
			if !ok || field.Tag == nil {
				return true
			}
			tag, err := strconv.Unquote(field.Tag.Value)
			if err != nil {
				t.Fatal(err)
			}
			if key, _, _ := strings.Cut(reflect.StructTag(tag).Get("yaml"), ","); key != "" && key != "-" {
				keys = append(keys, key)
			}
			return true
		})
	}
	return keys
}

func TestConfigurationKeys(t *testing.T) {
	shared := []string{"internal/daemon/log.go", "internal/tlsid/source.go"}
	for name, c := range map[string]struct {
		files []string
		least int
	}{
		"leasesvc.8": {append(shared, "leasesvc/config.go"), 40},
		"tepd.8":     {append(shared, "tepd/config.go"), 45},
		"dstmd.8":    {append(shared, "hostd/config.go"), 25},
		"dstm.1":     {[]string{"internal/tlsid/source.go", "cmd/dstm/config.go"}, 8},
	} {
		text, keys := page(t, name), yamlKeys(t, c.files...)
		if len(keys) < c.least {
			t.Errorf("%s: only %d keys were found in the sources", name, len(keys))
		}
		for _, k := range keys {
			if !names(text, k) {
				t.Errorf("%s: key %s is missing", name, k)
			}
		}
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

func TestFlags(t *testing.T) {
	bin := build(t)
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
