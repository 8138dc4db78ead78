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

	"github.com/rogpeppe/go-internal/txtar"
)

// Step is one expectation: a shell script that runs in a node and must end with 0.
type Step struct {
	Node, Name, Script string
}

// ParseSteps reads expectations from a txtar archive. Every file is a step; its name is "node: what it shows".
func ParseSteps(name string, data []byte) ([]Step, error) {
	var out []Step
	for i, f := range txtar.Parse(data).Files {
		node, what, ok := strings.Cut(f.Name, ": ")
		if !ok || node == "" || what == "" {
			return nil, fmt.Errorf("%s: step %d: %q: want \"-- node: what it shows --\"", name, i+1, f.Name)
		}
		out = append(out, Step{Node: node, Name: what, Script: string(f.Data)})
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("%s: no steps", name)
	}
	return out, nil
}

// ErrFailed means that a step did not come out as expected.
var ErrFailed = errors.New("a step failed")

// Run runs the steps of expect.txtar beside the topology. Each prints one line; the output of one that fails follows.
func (l *Lab) Run(ctx context.Context, out io.Writer) error {
	path := filepath.Join(l.t.dir(), "expect.txtar")
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	steps, err := ParseSteps(path, b)
	if err != nil {
		return err
	}
	for i, s := range steps {
		if !l.Has(s.Node) {
			return fmt.Errorf("%s: step %d: node %q does not run", path, i+1, s.Node)
		}
	}
	failed := 0
	for i, s := range steps {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		begin := time.Now()
		o, err := l.run(ctx, s.Node, "bash", "-euo", "pipefail", "-c", s.Script)
		took := time.Since(begin).Seconds()
		word := "ok  "
		if err != nil {
			word = "FAIL"
			failed++
			o = append([]byte(err.Error()+"\n"), o...)
		}
		fmt.Fprintf(out, "%s %d/%d %s: %s %.1fs\n", word, i+1, len(steps), s.Node, s.Name, took)
		if o = bytes.TrimSpace(o); len(o) > 0 {
			fmt.Fprintf(out, "     %s\n", bytes.ReplaceAll(o, []byte("\n"), []byte("\n     ")))
		}
	}
	if failed > 0 {
		return fmt.Errorf("%w: %d of %d", ErrFailed, failed, len(steps))
	}
	return nil
}
