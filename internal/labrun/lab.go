package labrun

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/dstm-project/dstm/internal/pki"
	"github.com/dstm-project/dstm/internal/tlsid"
)

// TrustDomain and Cell are those of every lab.
const (
	TrustDomain = "example.net"
	Cell        = "lab"
)

// Lab is a topology and the nodes of it that run.
type Lab struct {
	t     *Topology
	bin   string // directory of our programs
	state state
}

// Open loads the topology and what is known of a run of it.
func Open(path string) (*Lab, error) {
	t, err := Load(path)
	if err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	l := &Lab{t: t, bin: filepath.Dir(self)}
	return l, l.load()
}

// Prepare writes a certificate authority and the certificates of all nodes with a role into the run directory. It
// refuses to do so under a lab that runs.
func (l *Lab) Prepare() error {
	if up := l.state.running(); len(up) > 0 {
		return fmt.Errorf("lab %s is up (%d nodes): take it down first: dstm lab down %s", l.t.Name, len(up), l.t.path)
	}
	dir := filepath.Join(l.t.runDir(), "pki")
	if err := os.RemoveAll(l.t.runDir()); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(l.t.runDir(), "log"), 0o755); err != nil {
		return err
	}
	if err := pki.Init(dir, TrustDomain, 30*24*time.Hour); err != nil {
		return err
	}
	for _, name := range l.t.names() {
		if err := issue(dir, name, l.t.Topology.Nodes[name].Labels[RoleLabel]); err != nil {
			return err
		}
	}
	noc := tlsid.ID{TrustDomain: TrustDomain, Cell: Cell, Role: tlsid.RoleOperator, Name: "noc"}
	_, err := pki.Issue(dir, dir, noc, pki.Options{})
	return err
}

// issue writes the certificates of one node, see RoleLabel.
func issue(ca, node, label string) error {
	if label == "" {
		return nil
	}
	roles := strings.Split(label, ",")
	for _, role := range roles {
		dir := ca
		if len(roles) > 1 {
			dir = filepath.Join(ca, role)
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return err
			}
		}
		id := tlsid.ID{TrustDomain: TrustDomain, Cell: Cell, Role: tlsid.Role(role), Name: node}
		if _, err := pki.Issue(ca, dir, id, pki.Options{DNS: []string{node + "." + TrustDomain}}); err != nil {
			return fmt.Errorf("node %s: label %s %q: %w", node, RoleLabel, label, err)
		}
	}
	return nil
}

// Up makes the nodes and links and runs every node's exec lines, node by node in order of their names. What it made
// before an error stays for a look; Down removes it.
func (l *Lab) Up(ctx context.Context, out io.Writer) error {
	if err := l.Prepare(); err != nil {
		return err
	}
	l.state.Nodes = map[string]node{} // what an earlier run left has ended
	if err := l.up(ctx); err != nil {
		return fmt.Errorf("%w\nwhat was made until then is there for a look; to remove it: dstm lab down %s", err, l.t.path)
	}
	fmt.Fprintf(out, "lab %s is up: %d nodes\n", l.t.Name, len(l.state.Nodes))
	return nil
}

func (l *Lab) up(ctx context.Context) error {
	for _, name := range l.t.names() {
		if err := l.startNode(ctx, name); err != nil {
			return fmt.Errorf("node %s: %w", name, err)
		}
	}
	for _, k := range l.t.Topology.Links {
		if err := l.link(ctx, k); err != nil {
			return fmt.Errorf("link %v: %w", k.Endpoints, err)
		}
	}
	for _, name := range l.t.names() {
		for _, line := range l.t.Topology.Nodes[name].Exec {
			if o, err := l.run(ctx, name, "sh", "-c", line); err != nil {
				return fmt.Errorf("node %s: exec %q: %w\n%s", name, line, err, bytes.TrimSpace(o))
			}
		}
	}
	return nil
}

// Has reports whether the node runs.
func (l *Lab) Has(name string) bool {
	n, ok := l.state.Nodes[name]
	if !ok {
		return false
	}
	got, err := netnsOf(n.PID)
	return err == nil && got == n.NetNS
}

// Down ends every process in the nodes' namespaces, and with the last of them the namespaces, their devices and mounts.
// It touches nothing that Up did not make, and may be called again.
func (l *Lab) Down(out io.Writer) error {
	var errs error
	for name, n := range l.state.Nodes {
		if err := n.NetNS.end(); err != nil {
			errs = errors.Join(errs, fmt.Errorf("%s: node %s: %w", l.stateFile(), name, err))
			continue
		}
		delete(l.state.Nodes, name)
	}
	if errs != nil {
		return errors.Join(errs, l.save())
	}
	if err := errors.Join(os.RemoveAll(l.stateFile()), os.RemoveAll(l.t.runDir())); err != nil {
		return err
	}
	fmt.Fprintf(out, "lab %s is down\n", l.t.Name)
	return nil
}
