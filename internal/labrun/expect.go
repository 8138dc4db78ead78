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
)

// Step is one expectation: a shell script that runs in a node and must end with 0.
type Step struct {
	Node, Name, Script string
	Line               int // where it begins in its file
}

// ParseSteps reads expectations from a txtar archive: what follows a line "-- node: what it shows --", up to the next
// one, is a step. What comes before the first is a comment.
func ParseSteps(name string, data []byte) ([]Step, error) {
	var out []Step
	line := 0
	for text := range strings.Lines(string(data)) {
		line++
		title, ok := marker(text)
		switch {
		case ok:
			node, what, _ := strings.Cut(title, ": ")
			if node == "" || what == "" {
				return nil, fmt.Errorf("%s:%d:4: step %q: want \"-- node: what it shows --\"", name, line, title)
			}
			out = append(out, Step{Node: node, Name: what, Line: line})
		case len(out) > 0:
			out[len(out)-1].Script += text
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("%s: no steps: want \"-- node: what it shows --\" before each", name)
	}
	return out, nil
}

// marker returns what stands between the dashes of a line that begins a step.
func marker(line string) (title string, ok bool) {
	title, begins := strings.CutPrefix(strings.TrimRight(line, "\r\n"), "-- ")
	title, ends := strings.CutSuffix(title, " --")
	return strings.TrimSpace(title), begins && ends
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
	for _, s := range steps {
		if !l.Has(s.Node) {
			return fmt.Errorf("%s:%d:4: node %q does not run: want one of %q", path, s.Line, s.Node, l.t.names())
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
