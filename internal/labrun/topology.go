// Package labrun runs a containerlab topology in network and mount namespaces of this machine, without containers.
package labrun

import (
	"cmp"
	"fmt"
	"maps"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/dstm-project/dstm/internal/config"
	"github.com/dstm-project/dstm/internal/tlsid"
)

// Topology is the part of a containerlab file that is honoured. Any other key is an error with its position.
type Topology struct {
	Name     string `yaml:"name"`
	Prefix   any    `yaml:"prefix"` // ignored
	Mgmt     any    `yaml:"mgmt"`   // ignored
	Topology struct {
		Defaults Node             `yaml:"defaults"`
		Kinds    map[string]*Node `yaml:"kinds"`
		Groups   map[string]*Node `yaml:"groups"`
		Nodes    map[string]*Node `yaml:"nodes"`
		Links    []Link           `yaml:"links"`
	} `yaml:"topology"`

	path string // of the file, absolute
}

// Node is one node, or what a group of nodes has in common.
type Node struct {
	Kind    string            `yaml:"kind"`
	Group   string            `yaml:"group"`
	Image   string            `yaml:"image"` // ignored: the node sees this machine's files
	Cmd     string            `yaml:"cmd"`   // ignored: a node is kept by a process of ours
	Env     map[string]string `yaml:"env"`
	Binds   []string          `yaml:"binds"`
	Exec    []string          `yaml:"exec"`
	Sysctls map[string]string `yaml:"sysctls"`
	Labels  map[string]string `yaml:"labels"`
}

// Link joins two interfaces, each "node:interface".
type Link struct {
	Endpoints []string `yaml:"endpoints"`
	MTU       int      `yaml:"mtu"`
}

// RoleLabel is the label of a node that gets certificates: one role (svc, tep, resolver, host, operator) gives
// pki/NODE.pem, several with commas between them give pki/ROLE/NODE.pem each.
const RoleLabel = "dstm.role"

// The kinds of nodes.
const (
	KindLinux  = "linux"
	KindBridge = "bridge" // all its interfaces are ports of one bridge
)

// Load reads and merges the file at path.
func Load(path string) (*Topology, error) {
	t, err := config.Load(path, (*Topology).check)
	if err != nil {
		return nil, err
	}
	t.merge()
	t.path, err = filepath.Abs(path)
	return t, err
}

// parse is Load for data at hand.
func parse(name string, data []byte) (*Topology, error) {
	t, err := config.Parse(name, data, (*Topology).check)
	if err != nil {
		return nil, err
	}
	t.merge()
	return t, nil
}

// merge puts defaults, kinds and groups into the nodes, as containerlab does: the nearer one wins, lists are joined.
func (t *Topology) merge() {
	for name, n := range t.Topology.Nodes {
		t.Topology.Nodes[name] = t.merged(name, n)
	}
}

// kind is that of the node, of its group, of the default group, or the default, and the path where it was found.
func (t *Topology) kind(name string, n *Node) (kind, path string) {
	own, defaults := "$.topology.nodes."+name, &t.Topology.Defaults
	for _, from := range []struct {
		path string
		n    *Node
	}{
		{own, n},
		{"$.topology.groups." + n.Group, t.Topology.Groups[n.Group]},
		{"$.topology.groups." + defaults.Group, t.Topology.Groups[defaults.Group]},
		{"$.topology.defaults", defaults},
	} {
		if from.n != nil && from.n.Kind != "" {
			return from.n.Kind, from.path + ".kind"
		}
	}
	return "", own
}

// group is that of the node, of its kind, or the default.
func (t *Topology) group(n *Node, kind string) string {
	ofKind := ""
	if k := t.Topology.Kinds[kind]; k != nil {
		ofKind = k.Group
	}
	return cmp.Or(n.Group, ofKind, t.Topology.Defaults.Group)
}

func (t *Topology) merged(name string, n *Node) *Node {
	kind, _ := t.kind(name, n)
	out := &Node{
		Kind: kind, Group: t.group(n, kind),
		Env: map[string]string{}, Sysctls: map[string]string{}, Labels: map[string]string{},
	}
	for _, from := range []*Node{&t.Topology.Defaults, t.Topology.Kinds[kind], t.Topology.Groups[out.Group], n} {
		if from == nil {
			continue
		}
		maps.Copy(out.Env, from.Env)
		maps.Copy(out.Sysctls, from.Sysctls)
		maps.Copy(out.Labels, from.Labels)
		out.Exec = append(out.Exec, from.Exec...)
		for _, b := range from.Binds {
			out.Binds = append(slices.DeleteFunc(out.Binds, sameTarget(b)), b)
		}
	}
	return out
}

func (t *Topology) check(r *config.Report) {
	if !word.MatchString(t.Name) {
		r.Errorf("$.name", "name %q: want letters, digits, - and _", t.Name)
	}
	if len(t.Topology.Nodes) == 0 {
		r.Errorf("$.topology", "no nodes")
	}
	for _, name := range t.names() {
		t.checkNode("$.topology.nodes."+name, name, r)
	}
	t.checkShared("$.topology.defaults", &t.Topology.Defaults, r)
	for k, n := range t.Topology.Kinds {
		if at := "$.topology.kinds." + k; !known(k) {
			r.Errorf(at, "kind %q: want %s or %s", k, KindLinux, KindBridge)
		} else if n != nil {
			t.checkShared(at, n, r)
		}
	}
	for k, n := range t.Topology.Groups {
		if n != nil {
			t.checkShared("$.topology.groups."+k, n, r)
		}
	}
	seen := map[string]bool{}
	for i, l := range t.Topology.Links {
		t.checkLink(fmt.Sprintf("$.topology.links[%d]", i), l, seen, r)
	}
}

// word is what may be part of a file's name.
var word = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$`)

func known(kind string) bool { return kind == KindLinux || kind == KindBridge }

func (t *Topology) checkNode(at, name string, r *config.Report) {
	if !word.MatchString(name) {
		r.Errorf(at, "node %q: want letters, digits, - and _", name)
		return
	}
	if t.Topology.Nodes[name] == nil { // "name:" and nothing else
		t.Topology.Nodes[name] = &Node{}
	}
	n := t.Topology.Nodes[name]
	if kind, at := t.kind(name, n); !known(kind) {
		r.Errorf(at, "node %s: kind %q: want %s or %s", name, kind, KindLinux, KindBridge)
	}
	t.checkShared(at, n, r)
}

// checkShared looks at what a node, a group, a kind and the defaults have in common.
func (t *Topology) checkShared(at string, n *Node, r *config.Report) {
	if _, ok := t.Topology.Groups[n.Group]; n.Group != "" && !ok {
		r.Errorf(at+".group", "group %q: want one of %q (topology.groups)", n.Group,
			slices.Sorted(maps.Keys(t.Topology.Groups)))
	}
	for i, b := range n.Binds {
		if _, err := parseBind(b); err != nil {
			r.Errorf(fmt.Sprintf("%s.binds[%d]", at, i), "%v", err)
		}
	}
	if label := n.Labels[RoleLabel]; label != "" {
		for role := range strings.SplitSeq(label, ",") {
			if !slices.Contains(tlsid.Roles(), tlsid.Role(role)) {
				r.Errorf(at+".labels", "label %s: role %q: want one of %v, or several with commas between them",
					RoleLabel, role, tlsid.Roles())
			}
		}
	}
}

// mount is what a bind says.
type mount struct {
	source, target string
	readOnly       bool
}

func parseBind(s string) (mount, error) {
	source, rest, _ := strings.Cut(s, ":/")
	target, mode, _ := strings.Cut(rest, ":")
	if source == "" || target == "" || mode != "" && mode != "ro" && mode != "rw" {
		return mount{}, fmt.Errorf("bind %q: want source:/target, source:/target:ro or source:/target:rw", s)
	}
	return mount{source, filepath.Clean("/" + target), mode == "ro"}, nil
}

// sameTarget reports whether a bind has the target of b, which hides it.
func sameTarget(b string) func(string) bool {
	want, _ := parseBind(b)
	return func(other string) bool {
		m, _ := parseBind(other)
		return m.target == want.target
	}
}

// checkLink looks at one link; the kernel takes interface names of 1 to 15 bytes.
func (t *Topology) checkLink(at string, l Link, seen map[string]bool, r *config.Report) {
	if len(l.Endpoints) != 2 {
		r.Errorf(at, "link with %d endpoints: want two", len(l.Endpoints))
		return
	}
	if l.MTU != 0 && (l.MTU < 1280 || l.MTU > 65535) {
		r.Errorf(at+".mtu", "mtu %d: want 1280 (what IPv6 needs) to 65535", l.MTU)
	}
	for i, e := range l.Endpoints {
		at := fmt.Sprintf("%s.endpoints[%d]", at, i)
		node, ifname, _ := strings.Cut(e, ":")
		_, known := t.Topology.Nodes[node]
		switch {
		case !known:
			r.Errorf(at, "endpoint %q: no node %q; want node:interface", e, node)
		case ifname == "" || len(ifname) > 15 || strings.ContainsAny(ifname, "/ :") || ifname == bridgeName || ifname == "lo":
			r.Errorf(at, "endpoint %q: interface %q: want 1 to 15 bytes, not %s or lo", e, ifname, bridgeName)
		case seen[e]:
			r.Errorf(at, "endpoint %q is there twice", e)
		}
		seen[e] = true
	}
}

// names returns the nodes in order.
func (t *Topology) names() []string { return slices.Sorted(maps.Keys(t.Topology.Nodes)) }

// runDir is where prepare writes what binds name.
func (t *Topology) runDir() string { return filepath.Join(t.dir(), ".dstm-lab") }

// dir is the directory of the file, which binds are relative to.
func (t *Topology) dir() string { return filepath.Dir(t.path) }
