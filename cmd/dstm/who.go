package main

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	"github.com/spf13/cobra"

	"github.com/dstm-project/dstm/internal/daemon"
)

func (a *app) whoCommand() *cobra.Command {
	var at string
	cmd := a.remote(&cobra.Command{
		Use: "who ADDR[:PORT]", Short: "Say who holds or held an address", Args: oneArg("address"),
		Long: "Print the recorded history of an address, newest first, or with --at who held it at that time: the host, its " +
			"tunnel source, and from when on no gateway forwarded for it any more.",
	}, func(ctx context.Context, op operator, args []string) error {
		when, err := a.parseTime("--at", at)
		if err != nil {
			return err
		}
		return a.who(ctx, op, args[0], when)
	})
	cmd.Flags().StringVar(&at, "at", "", "`time` as 2026-01-02T15:04:05Z, 15:04:05 (today, UTC), or a duration ago such as 90m")
	return cmd
}

func (a *app) who(ctx context.Context, op operator, arg string, at time.Time) error {
	addr, port := arg, uint16(0)
	if ap, err := netip.ParseAddrPort(arg); err == nil {
		addr, port = ap.Addr().String(), ap.Port()
	}
	ip, err := ipv4(addr)
	if err != nil {
		return err
	}
	held, err := op.Who(ctx, ip, port, at)
	if err != nil {
		return err
	}
	hs := views(held, viewHolding)
	if a.json {
		return a.printJSON("dstm.who/1", struct {
			Holdings []holdingView `json:"holdings"`
		}{hs})
	}
	if len(hs) == 0 {
		_, err := fmt.Fprintf(a.out, "no record of a holder of %s%s\n", arg, atText(at))
		return err
	}
	rows := make([][]string, 0, len(hs))
	for _, h := range hs {
		rows = append(rows, []string{
			h.resource(), h.Host, h.Source, exact(h.Bound), exact(h.Unbound), exact(h.Fenced), h.End, h.Gen,
		})
	}
	return table(a.out, []string{"ADDRESS", "HOST", "SOURCE", "BOUND", "UNBOUND", "FENCED", "END", "GENERATION"}, rows)
}

func atText(at time.Time) string {
	if at.IsZero() {
		return ""
	}
	return " at " + exact(at)
}

// exact prints a time in UTC as it is recorded, so that it can be asked for; the zero time is nothing.
func exact(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339Nano)
}

// parseTime reads a flag; nothing is the zero time.
func (a *app) parseTime(flag, s string) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	now := a.now().UTC()
	if d, err := time.ParseDuration(s); err == nil && d >= 0 {
		return now.Add(-d), nil
	}
	if t, err := time.Parse(time.RFC3339Nano, s); err == nil {
		return t, nil
	}
	if t, err := time.Parse(time.TimeOnly, s); err == nil {
		return time.Date(now.Year(), now.Month(), now.Day(), t.Hour(), t.Minute(), t.Second(), 0, time.UTC), nil
	}
	return time.Time{}, daemon.Usage(fmt.Errorf("%s %q: want 2026-01-02T15:04:05Z, 15:04:05 (today, UTC) or a duration ago such as 90m", flag, s))
}
