// Package labrun runs a containerlab topology in network and mount namespaces of this machine, without containers.
package labrun

import (
	"fmt"
	"maps"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/dstm-project/dstm/internal/config"
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

	dir string // of the file
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
	return t, t.merge(path)
}

// parse is Load for data at hand.
func parse(name string, data []byte) (*Topology, error) {
	t, err := config.Parse(name, data, (*Topology).check)
	if err != nil {
		return nil, err
	}
	return t, t.merge(name)
}

// merge puts defaults, kinds and groups into the nodes, as containerlab does: the nearer one wins, lists are joined.
func (t *Topology) merge(path string) (err error) {
	if t.dir, err = filepath.Abs(filepath.Dir(path)); err != nil {
		return err
	}
	for name, n := range t.Topology.Nodes {
		t.Topology.Nodes[name] = t.merged(n)
	}
	return nil
}

// kind is that of the node, of its group, or the default.
func (t *Topology) kind(n *Node) string {
	if n.Kind != "" {
		return n.Kind
	}
	if g := t.Topology.Groups[n.Group]; g != nil && g.Kind != "" {
		return g.Kind
	}
	return t.Topology.Defaults.Kind
}

func (t *Topology) merged(n *Node) *Node {
	kind := t.kind(n)
	out := &Node{Kind: kind, Group: n.Group, Env: map[string]string{}, Sysctls: map[string]string{}, Labels: map[string]string{}}
	for _, from := range []*Node{&t.Topology.Defaults, t.Topology.Kinds[kind], t.Topology.Groups[n.Group], n} {
		if from == nil {
			continue
		}
		maps.Copy(out.Env, from.Env)
		maps.Copy(out.Sysctls, from.Sysctls)
		maps.Copy(out.Labels, from.Labels)
		out.Binds = append(out.Binds, from.Binds...)
		out.Exec = append(out.Exec, from.Exec...)
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
		t.checkNode("$.topology.nodes."+name, name, t.Topology.Nodes[name], r)
	}
	t.checkBinds("$.topology.defaults", &t.Topology.Defaults, r)
	for k, n := range t.Topology.Kinds {
		t.checkBinds("$.topology.kinds."+k, n, r)
	}
	for k, n := range t.Topology.Groups {
		t.checkBinds("$.topology.groups."+k, n, r)
	}
	seen := map[string]bool{}
	for i, l := range t.Topology.Links {
		t.checkLink(fmt.Sprintf("$.topology.links[%d]", i), l, seen, r)
	}
}

// word is what may be part of a file's name.
var word = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$`)

func (t *Topology) checkNode(at, name string, n *Node, r *config.Report) {
	if !word.MatchString(name) {
		r.Errorf(at, "node %q: want letters, digits, - and _", name)
		return
	}
	if n == nil {
		n = &Node{}
		t.Topology.Nodes[name] = n
	}
	if n.Group != "" && t.Topology.Groups[n.Group] == nil {
		r.Errorf(at+".group", "node %s: group %q is not among topology.groups", name, n.Group)
	}
	if kind := t.kind(n); kind != KindLinux && kind != KindBridge {
		r.Errorf(at+".kind", "node %s: kind %q: want linux or bridge", name, kind)
	}
	t.checkBinds(at, n, r)
}

func (t *Topology) checkBinds(at string, n *Node, r *config.Report) {
	if n == nil {
		return
	}
	for i, b := range n.Binds {
		if src, dst, ok := strings.Cut(b, ":/"); !ok || src == "" || dst == "" {
			r.Errorf(fmt.Sprintf("%s.binds[%d]", at, i), "bind %q: want source:/target", b)
		}
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
func (t *Topology) runDir() string { return filepath.Join(t.dir, ".dstm-lab") }
