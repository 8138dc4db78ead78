// Package archtest keeps the import rules of docs/architecture.md: imports go down only, and each heavy dependency has
// one importer.
package archtest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/dstm-project/dstm/"

type pkg struct {
	ImportPath string
	Imports    []string
	Deps       []string
}

func list(t *testing.T, args ...string) []pkg {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list", "-json=ImportPath,Imports,Deps"}, args...)...)
	cmd.Dir = "../.."
	out, err := cmd.Output()
	if err != nil {
		var ee *exec.ExitError
		if errors.As(err, &ee) {
			t.Fatalf("go list: %v\n%s", err, ee.Stderr)
		}
		t.Fatal(err)
	}
	var ps []pkg
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return ps
		} else if err != nil {
			t.Fatal(err)
		}
		ps = append(ps, p)
	}
}

// onlyImporters: a heavy dependency (import path prefix) and the packages that may import it.
var onlyImporters = []struct {
	dep string
	by  []string
}{
	{"github.com/osrg/gobgp", []string{"bgp/gobgp"}},
	{"github.com/hashicorp/go-plugin", []string{"internal/plugproc"}},
	{"github.com/vishvananda/netlink", []string{"internal/netcfg", "dataplane/tc", "internal/labrun"}},
	{"github.com/google/nftables", []string{"internal/netcfg", "hostd"}},
	{"github.com/cilium/ebpf", []string{"dataplane/tc"}},
	{"go.etcd.io/bbolt", []string{"leasesvc/store/boltstore"}},
	{"go.etcd.io/etcd/client", []string{"leasesvc/store/etcdstore", "leasesvc/store/etcdstore/etcdtest"}},
	{"go.etcd.io/etcd/server", []string{"leasesvc/store/etcdstore/etcdtest"}}, // members for tests
	{"github.com/caddyserver/certmagic", []string{"internal/acme"}},
	{"github.com/coredns", []string{"plugin/dstm", "cmd/coredns"}},
	{"github.com/anishathalye/porcupine", []string{"lease/leasesim"}}, // which no program imports
	{"github.com/spf13/cobra", []string{"cmd/dstm", "hack/man"}},
}

// libraries never import each other; they import seams, not adapters.
var libraries = []string{"plugin/dstm", "leasesvc", "tepd", "hostd"}

// adapters are constructed in cmd and handed in.
var adapters = []string{
	"bgp/gobgp", "bgp/speaker", "dataplane/tc", "leasesvc/store/boltstore", "leasesvc/store/etcdstore",
	"leasesvc/policy/external", "leasesvc/policy/policyplugin", "internal/acme", "internal/plugproc",
}

// stdlibOnly packages import nothing but the standard library and each other.
var stdlibOnly = []string{"lease", "lease/replica", "dataplane/packet", "internal/engset"}

// seams import nothing of ours above the plumbing.
var seams = []string{"bgp", "dataplane", "leasesvc/store"}

// violations returns every import of the tree that breaks a rule.
func violations(ps []pkg) []string {
	var out []string
	for _, p := range ps {
		name := strings.TrimPrefix(p.ImportPath, module)
		for _, imp := range p.Imports {
			if why := forbidden(name, imp); why != "" {
				out = append(out, fmt.Sprintf("%s imports %s: %s", name, imp, why))
			}
		}
	}
	return out
}

func forbidden(name, imp string) string {
	for _, r := range onlyImporters {
		if under(imp, r.dep) && !slices.Contains(r.by, name) {
			return fmt.Sprintf("only %s may", strings.Join(r.by, ", "))
		}
	}
	own, isOwn := strings.CutPrefix(imp, module)
	if slices.Contains(stdlibOnly, name) {
		if isOwn && !slices.Contains(stdlibOnly, own) || !isOwn && strings.Contains(imp, ".") {
			return "standard library only"
		}
	}
	if !isOwn {
		return ""
	}
	isExample := strings.HasPrefix(name, "examples/")
	isCmd := strings.HasPrefix(name, "cmd/") || isExample
	switch {
	case isExample && strings.HasPrefix(own, "internal/"):
		return "examples import what other modules can"
	case slices.Contains(libraries, own) && own != name && !isCmd:
		return "libraries are imported by cmd only"
	case slices.Contains(adapters, own) && !isCmd && !slices.Contains(adapters, name) && !isSuite(name):
		return "adapters are constructed in cmd"
	case slices.Contains(seams, name) && !slices.Contains(stdlibOnly, own):
		return "seams import lease and dataplane/packet only"
	case name == "leasesvc/leaseclient" && strings.HasPrefix(own, "leasesvc"):
		return "the client never reaches the service"
	case strings.HasPrefix(own, "cmd/") || strings.HasPrefix(own, "examples/"):
		return "nothing imports a command"
	}
	return ""
}

// isSuite names the exported test suites, which may know the adapters they are run over.
func isSuite(name string) bool {
	return name == "bgp/bgptest" || name == "dataplane/dataplanetest"
}

func under(imp, prefix string) bool {
	return imp == prefix || strings.HasPrefix(imp, prefix+"/")
}

func TestImportRules(t *testing.T) {
	ps := list(t, "./...")
	if len(ps) < 10 {
		t.Fatalf("go list found %d packages: want the whole tree", len(ps))
	}
	for _, v := range violations(ps) {
		t.Error(v)
	}
}

// TestPluginIsLight: people compile the plugin into their own CoreDNS. certmagic and etcd come with CoreDNS itself, so
// what counts is what the plugin reaches besides CoreDNS.
func TestPluginIsLight(t *testing.T) {
	for _, p := range list(t, "./leasesvc/leaseclient", "./internal/tlsid", "./plugin/dstm") {
		for _, d := range p.Deps {
			for _, heavy := range []string{
				"github.com/osrg/gobgp", "github.com/vishvananda/netlink", "github.com/cilium/ebpf",
				"go.etcd.io/bbolt", "go.etcd.io/etcd/server", "github.com/hashicorp/go-plugin", module + "internal/acme",
			} {
				if under(d, heavy) {
					t.Errorf("%s reaches %s", strings.TrimPrefix(p.ImportPath, module), d)
				}
			}
		}
	}
}

// TestPolicyPluginIsLight: third parties compile it into their own programs.
func TestPolicyPluginIsLight(t *testing.T) {
	for _, p := range list(t, "./leasesvc/policy/policyplugin") {
		for _, d := range p.Deps {
			for _, heavy := range []string{"github.com/prometheus", "github.com/goccy", "go.etcd.io", module + "leasesvc/policy", module + "lease"} {
				if under(d, heavy) {
					t.Errorf("%s reaches %s", strings.TrimPrefix(p.ImportPath, module), d)
				}
			}
		}
	}
}

// TestRulesCanFail plants one breach of each rule.
func TestRulesCanFail(t *testing.T) {
	for _, c := range []struct{ from, to string }{
		{"tepd", "github.com/osrg/gobgp/v3/pkg/server"},
		{"tepd", module + "leasesvc"},
		{"hostd", module + "dataplane/tc"},
		{"lease", "google.golang.org/grpc"},
		{"lease/replica", module + "internal/config"},
		{"bgp", module + "internal/daemon"},
		{"leasesvc/leaseclient", module + "leasesvc"},
		{"internal/daemon", module + "cmd/tepd"},
		{"plugin/dstm", "go.etcd.io/bbolt"},
		{"leasesvc/policy", module + "internal/plugproc"},
		{"leasesvc", module + "leasesvc/policy/external"},
		{"leasesvc/policy/policyplugin", "github.com/hashicorp/go-plugin"},
		{"examples/policy-webhook", module + "internal/plugproc"},
		{"leasesvc/policy/external", module + "examples/policy-webhook"},
		{"leasesvc", "go.etcd.io/etcd/client/v3"},
		{"leasesvc/store/etcdstore", "go.etcd.io/etcd/server/v3/embed"},
	} {
		if len(violations([]pkg{{ImportPath: module + c.from, Imports: []string{c.to}}})) == 0 {
			t.Errorf("%s importing %s is not found", c.from, c.to)
		}
	}
}

// TestPluginRaisesNothing: a CoreDNS that gets the plugin keeps the versions of its own go.mod.
func TestPluginRaisesNothing(t *testing.T) {
	run := func(args ...string) string {
		cmd := exec.Command("go", args...)
		cmd.Dir = "../.."
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("go %v: %v", args, err)
		}
		return strings.TrimSpace(string(out))
	}
	b, err := os.ReadFile(run("list", "-m", "-f", "{{.GoMod}}", "github.com/coredns/coredns"))
	if err != nil {
		t.Fatal(err)
	}
	theirs := map[string]string{}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(strings.TrimPrefix(line, "require")); len(f) >= 2 && strings.HasPrefix(f[1], "v") {
			theirs[f[0]] = f[1]
		}
	}
	same := 0
	for line := range strings.Lines(run("list", "-deps", "-f", "{{with .Module}}{{.Path}} {{.Version}}{{end}}", "./plugin/dstm")) {
		f := strings.Fields(line)
		if len(f) != 2 || theirs[f[0]] == "" {
			continue
		}
		if theirs[f[0]] != f[1] {
			t.Errorf("%s %s: CoreDNS has %s", f[0], f[1], theirs[f[0]])
		}
		same++
	}
	if same < 10 {
		t.Errorf("only %d modules were compared", same)
	}
}
