package config

import (
	"encoding"
	"fmt"
	"net/netip"
	"reflect"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
)

// examples show the form of a type in the message about a value that is not of it.
var examples = map[reflect.Type]string{
	reflect.TypeFor[netip.Addr]():     `an address such as 192.0.2.1 or "2001:db8::1"`,
	reflect.TypeFor[netip.Prefix]():   `a prefix such as 198.51.100.0/24 or "2001:db8::/32"`,
	reflect.TypeFor[netip.AddrPort](): `an address and port such as "[2001:db8::1]:3545"`,
	reflect.TypeFor[time.Duration]():  `a duration such as 250ms, 30s or 15m`,
}

var textType = reflect.TypeFor[encoding.TextUnmarshaler]()

// checkScalars looks for unknown keys and tries every scalar. The decoder would refuse the same, but without saying where
// it stands, or what is allowed instead.
func (r *Report) checkScalars(t reflect.Type, n ast.Node) {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if own, ok := reflect.New(t).Interface().(yaml.InterfaceUnmarshaler); ok {
		if err := own.UnmarshalYAML(func(v any) error { return yaml.NodeToValue(n, v) }); err != nil {
			r.problem(n, err.Error())
		}
		return
	}
	switch n := n.(type) {
	case *ast.TagNode:
		r.checkScalars(t, n.Value)
	case *ast.AnchorNode:
		r.checkScalars(t, n.Value)
	case *ast.MappingNode:
		for _, v := range n.Values {
			r.checkField(t, v)
		}
	case *ast.MappingValueNode:
		r.checkField(t, n)
	case *ast.SequenceNode:
		if t.Kind() == reflect.Slice {
			for _, v := range n.Values {
				r.checkScalars(t.Elem(), v)
			}
		}
	case ast.ScalarNode:
		r.checkScalar(t, n)
	}
}

func (r *Report) checkField(t reflect.Type, v *ast.MappingValueNode) {
	if t.Kind() == reflect.Map {
		r.checkScalars(t.Elem(), v.Value)
		return
	}
	if t.Kind() != reflect.Struct || v.Key.GetToken() == nil {
		return
	}
	key := v.Key.GetToken().Value
	var known []string
	for f := range fields(t) {
		name, _, _ := strings.Cut(f.Tag.Get("yaml"), ",")
		if name == key {
			r.checkScalars(f.Type, v.Value)
			return
		}
		known = append(known, name)
	}
	if v.Key.Type() == ast.MergeKeyType {
		return
	}
	hint := ""
	if near := nearest(key, known); near != "" {
		hint = fmt.Sprintf(" (did you mean %q?)", near)
	}
	r.problem(v.Key, fmt.Sprintf("unknown key %s%s: want one of %s", quote(key), hint, strings.Join(known, ", ")))
}

// problem notes what is wrong with a node.
func (r *Report) problem(n ast.Node, msg string) {
	p := Problem{File: r.name, Msg: msg}
	if t := n.GetToken(); t != nil && t.Position != nil {
		p.Line, p.Col = t.Position.Line, t.Position.Column
	}
	r.problems = append(r.problems, p)
}

func (r *Report) checkScalar(t reflect.Type, n ast.ScalarNode) {
	if n.Type() == ast.NullType || n.GetToken() == nil {
		return
	}
	text := n.GetToken().Value
	want, err := examples[t], error(nil)
	switch {
	case t == reflect.TypeFor[time.Duration]():
		_, err = time.ParseDuration(text)
	case reflect.PointerTo(t).Implements(textType):
		err = reflect.New(t).Interface().(encoding.TextUnmarshaler).UnmarshalText([]byte(text))
	default:
		want, err = checkKind(t, text)
	}
	if err == nil {
		return
	}
	msg := err.Error()
	if want != "" {
		msg = quote(text) + " is not " + want
	}
	r.problem(n, msg)
}

// checkKind tries a scalar that becomes a plain number or truth value.
func checkKind(t reflect.Type, text string) (want string, err error) {
	switch text := strings.ReplaceAll(text, "_", ""); t.Kind() {
	case reflect.Bool:
		want = "true or false"
		_, err = strconv.ParseBool(text)
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		want = fmt.Sprintf("a whole number from %d to %d", -1<<(t.Bits()-1), 1<<(t.Bits()-1)-1)
		_, err = strconv.ParseInt(text, 0, t.Bits())
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		want = fmt.Sprintf("a whole number from 0 to %d", uint64(1)<<(t.Bits()-1)-1+uint64(1)<<(t.Bits()-1))
		_, err = strconv.ParseUint(text, 0, t.Bits())
	default:
	}
	return want, err
}

// quote limits what a message repeats of its input.
func quote(s string) string {
	const most = 80
	if len(s) > most {
		s = s[:most] + "..."
	}
	return `"` + strings.ToValidUTF8(s, "?") + `"`
}
