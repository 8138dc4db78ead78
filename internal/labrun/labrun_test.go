package labrun

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const small = `name: small
topology:
  defaults: {kind: linux, env: {A: default, B: default}, binds: ["d:/d"], sysctls: {net.ipv4.ip_forward: "0"}}
  kinds:
    linux: {env: {B: kind, C: kind}, exec: [from kind]}
    bridge: {exec: [never]}
  groups:
    routers: {env: {C: group, D: group}, exec: [from group], sysctls: {net.ipv4.ip_forward: "1"}, binds: ["g:/d"]}
    switches: {kind: bridge}
  nodes:
    r1: {group: routers, env: {D: node}, exec: [from node], binds: ["n:/n"], labels: {dstm.role: svc}}
    h1:
    sw: {group: switches}
  links:
    - endpoints: ["r1:eth1", "sw:p1"]
    - {endpoints: ["h1:eth1", "sw:p2"], mtu: 1400}
`

func TestMerge(t *testing.T) {
	topo, err := parse("small.clab.yml", []byte(small))
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]*Node{
		"r1": {
			Kind: "linux", Group: "routers", Env: map[string]string{"A": "default", "B": "kind", "C": "group", "D": "node"},
			Binds: []string{"g:/d", "n:/n"}, Exec: []string{"from kind", "from group", "from node"},
			Sysctls: map[string]string{"net.ipv4.ip_forward": "1"}, Labels: map[string]string{"dstm.role": "svc"},
		},
		"h1": {
			Kind: "linux", Env: map[string]string{"A": "default", "B": "kind", "C": "kind"}, Binds: []string{"d:/d"},
			Exec: []string{"from kind"}, Sysctls: map[string]string{"net.ipv4.ip_forward": "0"}, Labels: map[string]string{},
		},
		"sw": {
			Kind: "bridge", Group: "switches", Env: map[string]string{"A": "default", "B": "default"}, Binds: []string{"d:/d"},
			Exec: []string{"never"}, Sysctls: map[string]string{"net.ipv4.ip_forward": "0"}, Labels: map[string]string{},
		},
	}
	if d := cmp.Diff(want, topo.Topology.Nodes); d != "" {
		t.Errorf("nodes (-want +got):\n%s", d)
	}
	if topo.Topology.Links[1].MTU != 1400 {
		t.Errorf("links %+v", topo.Topology.Links)
	}
}

func TestBadTopologies(t *testing.T) {
	for _, c := range []struct{ name, old, new, want string }{
		{"unknown node key", "labels:", "label:", `11:78: unknown key "label" (did you mean "labels"?)`},
		{"unknown link key", "mtu: 1400", "vlan: 7", `16:41: unknown key "vlan"`},
		{"no name", "name: small", "name: \"\"", `1:7: name "": want letters, digits, - and _`},
		{"name with a slash", "name: small", "name: ../x", `1:7: name "../x": want letters, digits, - and _`},
		{"node's name", "    h1:", "    h.1:", `11:5: node "h.1": want letters, digits, - and _`},
		{"kind of a node", "group: routers", "kind: srl", `11:16: node r1: kind "srl": want linux or bridge`},
		{"kind of a group", "{kind: bridge}", "{kind: ovs}", `9:22: node sw: kind "ovs": want linux or bridge`},
		{"kind of all", "{kind: linux,", "{kind: srl,", `3:20: node h1: kind "srl": want linux or bridge`},
		{"kind nowhere", "{kind: linux, env", "{env", `12:8: node h1: kind "": want linux or bridge`},
		{"unknown kind", "bridge: {exec", "srl: {exec", `6:11: kind "srl": want linux or bridge`},
		{
			"group", "group: switches", "group: hubs",
			`13:17: group "hubs": want one of ["routers" "switches"] (topology.groups)`,
		},
		{"bind", `"n:/n"`, `"n"`, `11:69: bind "n": want source:/target, source:/target:ro or source:/target:rw`},
		{"bind's mode", `"n:/n"`, `"n:/n:rx"`, `11:69: bind "n:/n:rx": want source:/target`},
		{"default bind", `"d:/d"`, `"/d"`, `3:66: bind "/d": want source:/target`},
		{
			"role", "dstm.role: svc", `dstm.role: "svc,x"`,
			`11:87: label dstm.role: role "x": want one of [svc tep resolver host operator]`,
		},
		{"one endpoint", `["r1:eth1", "sw:p1"]`, `["r1:eth1"]`, "15:7: link with 1 endpoints: want two"},
		{"unknown node", `"r1:eth1"`, `"r9:eth1"`, `15:19: endpoint "r9:eth1": no node "r9"; want node:interface`},
		{"endpoint twice", `"sw:p2"`, `"sw:p1"`, `16:31: endpoint "sw:p1" is there twice`},
		{"no interface", `"sw:p1"`, `"sw"`, `15:30: endpoint "sw": interface "": want 1 to 15 bytes`},
		{"long interface", `"sw:p1"`, `"sw:a234567890123456"`, `15:30: endpoint "sw:a234567890123456": interface`},
		{"the bridge's own name", `"sw:p1"`, `"sw:br0"`, `15:30: endpoint "sw:br0": interface "br0"`},
		{"small mtu", "mtu: 1400", "mtu: 500", "16:46: mtu 500: want 1280 (what IPv6 needs) to 65535"},
		{"large mtu", "mtu: 1400", "mtu: 65536", "16:46: mtu 65536: want 1280"},
		{"no nodes", small, "name: x\ntopology: {}\n", "2:11: no nodes"},
	} {
		text := strings.Replace(small, c.old, c.new, 1)
		if text == small {
			t.Fatalf("%s: the edit changed nothing", c.name)
		}
		_, err := parse("bad.clab.yml", []byte(text))
		if err == nil || !strings.Contains(err.Error(), "bad.clab.yml:") || !strings.Contains(err.Error(), ":"+c.want) {
			t.Errorf("%s: error %v, want %q", c.name, err, c.want)
		}
	}
}

func TestParseSteps(t *testing.T) {
	const archive = "a comment\n-- r1: it answers --\nping -c1 x\n\n-- h1: so: does this --\r\ntrue\n-- --\n"
	got, err := ParseSteps("expect.txtar", []byte(archive))
	if err != nil {
		t.Fatal(err)
	}
	want := []Step{{"r1", "it answers", "ping -c1 x\n\n", 2}, {"h1", "so: does this", "true\n-- --\n", 5}}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("steps (-want +got):\n%s", d)
	}
}

func TestBadSteps(t *testing.T) {
	for _, c := range []struct{ name, text, want string }{
		{"empty", "", `expect.txtar: no steps: want "-- node: what it shows --" before each`},
		{"comment only", "true\n--r1: x --\n", "expect.txtar: no steps"},
		{"no name", "\n-- r1 --\ntrue\n", `expect.txtar:2:4: step "r1": want "-- node: what it shows --"`},
		{"no node", "-- : what --\ntrue\n", `expect.txtar:1:4: step ": what": want`},
		{"nothing", "--  --\n", `expect.txtar:1:4: step "": want`},
	} {
		if _, err := ParseSteps("expect.txtar", []byte(c.text)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error %v, want %q", c.name, err, c.want)
		}
	}
}

// TestLabs: the labs of this repository can be read, and their steps are of nodes that they have.
func TestLabs(t *testing.T) {
	files, err := filepath.Glob("../../lab/*/*.clab.yml")
	if err != nil || len(files) == 0 {
		t.Fatalf("labs %v, %v", files, err)
	}
	for _, file := range files {
		topo, err := Load(file)
		if err != nil {
			t.Error(err)
			continue
		}
		path := filepath.Join(filepath.Dir(file), "expect.txtar")
		b, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue // a lab that is only brought up
		}
		steps, err := ParseSteps(path, b)
		if err != nil {
			t.Error(err)
		}
		for _, s := range steps {
			if topo.Topology.Nodes[s.Node] == nil {
				t.Errorf("%s:%d: no node %q", path, s.Line, s.Node)
			}
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(small))
	f.Add([]byte("name: x\ntopology: {nodes: {a: {kind: linux}}, links: [{endpoints: [\"a:b\", \"a:c\"]}]}"))
	f.Fuzz(func(t *testing.T, b []byte) {
		topo, err := parse("f", b)
		if err != nil {
			return
		}
		for name, n := range topo.Topology.Nodes {
			if n == nil || n.Kind != KindLinux && n.Kind != KindBridge || strings.ContainsAny(name, "/ \n") {
				t.Errorf("node %q: %+v", name, n)
			}
		}
		for _, l := range topo.Topology.Links {
			for _, e := range l.Endpoints {
				if node, _, _ := strings.Cut(e, ":"); topo.Topology.Nodes[node] == nil {
					t.Errorf("endpoint %q of no node", e)
				}
			}
		}
	})
}

func FuzzParseSteps(f *testing.F) {
	f.Add([]byte("-- a: b --\nx\n"))
	f.Add([]byte("-- --"))
	f.Fuzz(func(t *testing.T, b []byte) {
		steps, err := ParseSteps("f", b)
		if err == nil && len(steps) == 0 {
			t.Error("no steps, no error")
		}
		for _, s := range steps {
			if s.Node == "" || s.Name == "" {
				t.Errorf("%+v", s)
			}
		}
	})
}
