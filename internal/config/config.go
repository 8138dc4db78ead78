// Package config reads the daemons' YAML files strictly and says where in the file something is wrong. The check that
// `-t` runs is the one that a start runs.
package config

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"reflect"
	"slices"
	"strings"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
)

// MaxSize is the largest configuration file that is read, in bytes.
const MaxSize = 1 << 20

// Defaulter is implemented by configurations that fill in defaults before decoding.
type Defaulter interface{ Defaults() }

// Problem is one thing that is wrong, with its place. Line and Col count from 1; 0 means the file as a whole.
type Problem struct {
	File      string
	Line, Col int
	Msg       string
}

// String returns file:line:col: message.
func (p Problem) String() string {
	if p.Line == 0 {
		return p.File + ": " + p.Msg
	}
	return fmt.Sprintf("%s:%d:%d: %s", p.File, p.Line, p.Col, p.Msg)
}

// Error is every problem that was found in one file, in the order of the file.
type Error struct{ Problems []Problem }

// Error returns one problem a line.
func (e *Error) Error() string {
	lines := make([]string, len(e.Problems))
	for i, p := range e.Problems {
		lines[i] = p.String()
	}
	return strings.Join(lines, "\n")
}

// Report collects what a check finds.
type Report struct {
	name     string
	file     *ast.File
	problems []Problem
}

// Errorf reports a problem of the value at a YAML path such as "$.pools[0].prefix". When the path is not in the file
// (a missing key), the nearest parent that is gives the position.
func (r *Report) Errorf(path, format string, args ...any) {
	p := Problem{File: r.name, Msg: fmt.Sprintf(format, args...)}
	p.Line, p.Col = r.position(path)
	r.problems = append(r.problems, p)
}

func (r *Report) position(path string) (line, col int) {
	for ; strings.HasPrefix(path, "$"); path = parent(path) {
		yp, err := yaml.PathString(path)
		if err != nil {
			continue
		}
		n, err := yp.FilterFile(r.file)
		if err != nil || n == nil || n.GetToken() == nil {
			continue
		}
		t := n.GetToken()
		if m, ok := n.(*ast.MappingNode); ok && len(m.Values) > 0 {
			t = m.Values[0].Key.GetToken()
		}
		return t.Position.Line, t.Position.Column
	}
	return 0, 0
}

func parent(path string) string {
	i := strings.LastIndexAny(path, ".[")
	if i <= 0 {
		return ""
	}
	return path[:i]
}

// Load reads the file at path; see Parse.
func Load[T any](path string, check func(*T, *Report)) (*T, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, MaxSize+1))
	if err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	return Parse(path, b, check)
}

// Parse decodes data into a T, with T's defaults if it is a Defaulter, and runs check on the result. Unknown and
// repeated keys are errors. name stands in the messages. Every error is an *Error.
func Parse[T any](name string, data []byte, check func(*T, *Report)) (*T, error) {
	r := &Report{name: name}
	if len(data) > MaxSize {
		return nil, &Error{[]Problem{{File: name, Msg: fmt.Sprintf("configuration is larger than %d bytes", MaxSize)}}}
	}
	v := new(T)
	if err := r.decode(data, v, reflect.TypeFor[T]()); err != nil {
		return nil, err
	}
	if check != nil {
		check(v, r)
	}
	if len(r.problems) > 0 {
		return nil, r.err()
	}
	return v, nil
}

// decode parses data into v, which points to a root. The YAML library panics on some malformed tags and aliases (found by
// fuzzing); for an operator that is a file that cannot be read, like any other syntax error.
func (r *Report) decode(data []byte, v any, root reflect.Type) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = &Error{[]Problem{{File: r.name, Msg: fmt.Sprintf("cannot be read as YAML: %v", p)}}}
		}
	}()
	r.file, err = parser.ParseBytes(data, 0)
	if err != nil {
		return decodeError(r.name, err)
	}
	if len(r.file.Docs) > 1 {
		return &Error{[]Problem{{File: r.name, Msg: fmt.Sprintf("%d YAML documents: want one", len(r.file.Docs))}}}
	}
	if d, ok := v.(Defaulter); ok {
		d.Defaults()
	}
	if len(r.file.Docs) == 1 && r.file.Docs[0].Body != nil {
		r.checkScalars(root, r.file.Docs[0].Body)
	}
	if len(r.problems) > 0 {
		return r.err()
	}
	dec := yaml.NewDecoder(bytes.NewReader(data), yaml.Strict())
	if err := dec.Decode(v); err != nil && !errors.Is(err, io.EOF) {
		return decodeError(r.name, err)
	}
	return nil
}

// err returns the problems in the order of the file.
func (r *Report) err() error {
	slices.SortStableFunc(r.problems, func(a, b Problem) int {
		return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Col, b.Col))
	})
	return &Error{r.problems}
}

func decodeError(name string, err error) error {
	p := Problem{File: name, Msg: err.Error()}
	var ye yaml.Error
	if errors.As(err, &ye) {
		p.Msg = ye.GetMessage()
		if t := ye.GetToken(); t != nil && t.Position != nil {
			p.Line, p.Col = t.Position.Line, t.Position.Column
		}
	}
	if key, ok := strings.CutPrefix(p.Msg, "unknown field "); ok {
		p.Msg = "unknown key " + key
	}
	return &Error{[]Problem{p}}
}
