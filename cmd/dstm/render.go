package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
)

// A node is a JSON value with the order of its keys kept: daemons put what matters first.
type node struct {
	scalar string
	fields []field // of an object
	items  []node  // of an array
	kind   byte    // 's', '{' or '['
}

type field struct {
	key   string
	value node
}

// render prints any JSON object for people: "key  value" lines, nested keys joined by dots, and a table for each array
// of objects. The schema is left out.
func render(w io.Writer, b []byte) error {
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.UseNumber()
	n, err := decode(dec)
	if err != nil {
		return fmt.Errorf("answer is not JSON: %w", err)
	}
	r := &renderer{tw: tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)}
	r.lines("", n)
	if err := r.tw.Flush(); err != nil {
		return err
	}
	for _, t := range r.tables {
		fmt.Fprintf(w, "  %s:\n", t.key)
		var out strings.Builder
		if err := columns(&out, t.value.items); err != nil {
			return err
		}
		for line := range strings.Lines(out.String()) {
			fmt.Fprint(w, "    ", line)
		}
	}
	return nil
}

func decode(dec *json.Decoder) (node, error) {
	t, err := dec.Token()
	if err != nil {
		return node{}, err
	}
	d, ok := t.(json.Delim)
	if !ok {
		return node{kind: 's', scalar: scalar(t)}, nil
	}
	n := node{kind: byte(d)}
	for dec.More() {
		key := ""
		if n.kind == '{' {
			k, err := dec.Token()
			if err != nil {
				return node{}, err
			}
			key, _ = k.(string)
		}
		v, err := decode(dec)
		if err != nil {
			return node{}, err
		}
		if n.kind == '{' {
			n.fields = append(n.fields, field{key, v})
		} else {
			n.items = append(n.items, v)
		}
	}
	_, err = dec.Token() // the closing one
	return n, err
}

func scalar(t json.Token) string {
	switch v := t.(type) {
	case nil:
		return "-"
	case bool:
		return yesNo(v)
	case string:
		if v == "" {
			return "-"
		}
		return v
	}
	return fmt.Sprint(t)
}

type renderer struct {
	tw     *tabwriter.Writer
	tables []field
}

func (r *renderer) lines(prefix string, n node) {
	for _, f := range n.fields {
		key := prefix + f.key
		switch {
		case key == "schema":
		case f.value.kind == '{':
			r.lines(key+".", f.value)
		case f.value.kind == '[' && len(f.value.items) > 0 && f.value.items[0].kind == '{':
			r.tables = append(r.tables, field{key, f.value})
		default:
			fmt.Fprintf(r.tw, "  %s\t%s\n", key, f.value.cell())
		}
	}
}

// cell prints a value in one cell.
func (n node) cell() string {
	var parts []string
	switch n.kind {
	case 's':
		return n.scalar
	case '[':
		for _, i := range n.items {
			parts = append(parts, i.cell())
		}
	case '{':
		for _, f := range n.fields {
			parts = append(parts, f.key+"="+f.value.cell())
		}
	}
	if len(parts) == 0 {
		return "-"
	}
	return strings.Join(parts, " ")
}

// columns prints objects as a table; its columns are the keys in the order in which they are first seen.
func columns(w io.Writer, items []node) error {
	var head []string
	at := map[string]int{}
	for _, i := range items {
		for _, f := range i.fields {
			if _, ok := at[f.key]; !ok {
				at[f.key] = len(head)
				head = append(head, f.key)
			}
		}
	}
	rows := make([][]string, 0, len(items))
	for _, i := range items {
		row := make([]string, len(head))
		for _, f := range i.fields {
			row[at[f.key]] = f.value.cell()
		}
		rows = append(rows, row)
	}
	for i := range head {
		head[i] = strings.ToUpper(strings.ReplaceAll(head[i], "_", " "))
	}
	return table(w, head, rows)
}
