package labrun

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// stateDir holds one file for each lab that is up.
const stateDir = "/run/dstm-lab"

// state is what Down needs to know of a lab. It is saved before a node does anything, so that a crash of Up leaves
// nothing that Down does not find.
type state struct {
	File  string          `json:"file"` // the topology
	Boot  string          `json:"boot"` // when all of this holds: after another start of the machine nothing is left
	Nodes map[string]node `json:"nodes"`
}

// node is a node that was started. PID is its holder; what counts is the namespace.
type node struct {
	PID   int   `json:"pid"`
	NetNS netns `json:"netns"`
}

// running returns the nodes that have a process.
func (s state) running() []string {
	var out []string
	for name, n := range s.Nodes {
		if len(n.NetNS.processes()) > 0 {
			out = append(out, name)
		}
	}
	return out
}

func (l *Lab) stateFile() string { return filepath.Join(stateDir, l.t.Name+".json") }

// load reads what an earlier run of the lab saved. It refuses a lab of the same name that another file has up.
func (l *Lab) load() error {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return err
	}
	l.state = state{File: l.t.path, Boot: strings.TrimSpace(string(boot)), Nodes: map[string]node{}}
	b, err := os.ReadFile(l.stateFile())
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var s state
	if err := json.Unmarshal(b, &s); err != nil {
		return fmt.Errorf("%s: %w", l.stateFile(), err)
	}
	switch {
	case s.Boot != l.state.Boot || len(s.Nodes) == 0:
	case s.File == l.t.path:
		l.state.Nodes = s.Nodes
	case len(s.running()) > 0:
		return fmt.Errorf("%s: a lab named %s is up from %s: take that down first: dstm lab down %s",
			l.t.path, l.t.Name, s.File, s.File)
	}
	return nil
}

// save replaces the file as a whole, so that a crash leaves the one or the other.
func (l *Lab) save() error {
	b, err := json.Marshal(l.state)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(stateDir, 0o755); err != nil {
		return err
	}
	next := l.stateFile() + ".new"
	if err := os.WriteFile(next, b, 0o644); err != nil {
		return err
	}
	return os.Rename(next, l.stateFile())
}
