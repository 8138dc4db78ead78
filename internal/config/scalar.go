package config

import (
	"encoding"
	"net/netip"
	"reflect"
	"strings"
	"time"

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

// checkScalars tries every scalar that becomes a type with a text form. The decoder would refuse the same values, but
// without saying where they stand.
func (r *Report) checkScalars(t reflect.Type, n ast.Node) {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
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
	for f := range fields(t) {
		if name, _, _ := strings.Cut(f.Tag.Get("yaml"), ","); name == v.Key.GetToken().Value {
			r.checkScalars(f.Type, v.Value)
		}
	}
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
		return
	}
	if err == nil {
		return
	}
	pos := n.GetToken().Position
	msg := err.Error()
	if want != "" {
		msg = quote(text) + " is not " + want
	}
	r.problems = append(r.problems, Problem{File: r.name, Line: pos.Line, Col: pos.Column, Msg: msg})
}

// quote limits what a message repeats of its input.
func quote(s string) string {
	const most = 80
	if len(s) > most {
		s = s[:most] + "..."
	}
	return `"` + strings.ToValidUTF8(s, "?") + `"`
}
