package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/dstm-project/dstm/internal/daemon"
)

// printJSON writes an object with its schema.
func (a *app) printJSON(schema string, v any) error {
	b, err := daemon.MarshalSchema(schema, v)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(a.out, "%s\n", b)
	return err
}

// table writes rows in columns; an empty cell is a dash, so that columns can be counted.
func table(w io.Writer, head []string, rows [][]string) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	line := func(cells []string) {
		out := make([]string, len(cells))
		for i, c := range cells {
			if out[i] = c; c == "" {
				out[i] = "-"
			}
		}
		fmt.Fprintln(tw, strings.Join(out, "\t"))
	}
	line(head)
	for _, r := range rows {
		line(r)
	}
	return tw.Flush()
}

// instant prints a time in UTC, to the second; the zero time is nothing.
func instant(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339)
}

// left prints a duration to the second; none is nothing.
func left(d time.Duration) string {
	if d <= 0 {
		return ""
	}
	return d.Round(time.Second).String()
}
