// Package labrun runs a containerlab topology in network and mount namespaces of this machine, without containers.
package labrun

import (
	"fmt"
	"maps"
	"path/filepath"
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

// RoleLabel is the label of a node that gets a certificate of the role that is its value.
const RoleLabel = "dstm.role"

// Load reads the file and merges defaults, kinds and groups into the nodes, as containerlab does: the nearer one wins,
// lists are joined.
func Load(path string) (*Topology, error) {
	t, err := config.Load(path, (*Topology).check)
	if err != nil {
		return nil, err
	}
	if t.dir, err = filepath.Abs(filepath.Dir(path)); err != nil {
		return nil, err
	}
	for name, n := range t.Topology.Nodes {
		t.Topology.Nodes[name] = t.merged(n)
	}
	return t, nil
}

func (t *Topology) merged(n *Node) *Node {
	out := &Node{Env: map[string]string{}, Sysctls: map[string]string{}, Labels: map[string]string{}}
	for _, from := range []*Node{&t.Topology.Defaults, t.Topology.Kinds[n.Kind], t.Topology.Groups[n.Group], n} {
		if from == nil {
			continue
		}
		if from.Kind != "" {
			out.Kind = from.Kind
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
	if t.Name == "" || strings.ContainsAny(t.Name, "/ ") {
		r.Errorf("$.name", "name %q: want a word", t.Name)
	}
	if len(t.Topology.Nodes) == 0 {
		r.Errorf("$.topology", "no nodes")
	}
	for name, n := range t.Topology.Nodes {
		at := "$.topology.nodes." + name
		if n == nil {
			r.Errorf(at, "node %s is empty", name)
			continue
		}
		kind := n.Kind
		if kind == "" {
			kind = t.Topology.Defaults.Kind
		}
		if kind != "linux" {
			r.Errorf(at+".kind", "node %s: kind %q: this runner knows linux", name, kind)
		}
		for _, b := range n.Binds {
			if !strings.Contains(b, ":/") {
				r.Errorf(at+".binds", "node %s: bind %q: want source:/target", name, b)
			}
		}
	}
	seen := map[string]bool{}
	for i, l := range t.Topology.Links {
		at := fmt.Sprintf("$.topology.links[%d]", i)
		if len(l.Endpoints) != 2 {
			r.Errorf(at, "link with %d endpoints: want two", len(l.Endpoints))
			continue
		}
		for _, e := range l.Endpoints {
			node, ifname, ok := strings.Cut(e, ":")
			if !ok || t.Topology.Nodes[node] == nil || ifname == "" || len(ifname) > 15 || seen[e] {
				r.Errorf(at+".endpoints", "endpoint %q: want node:interface of a node above, each once, the interface at most 15 bytes", e)
			}
			seen[e] = true
		}
	}
}

// names returns the nodes in order.
func (t *Topology) names() []string { return slices.Sorted(maps.Keys(t.Topology.Nodes)) }

// runDir is where prepare writes what binds name.
func (t *Topology) runDir() string { return filepath.Join(t.dir, ".dstm-lab") }
