package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/dstm-project/dstm/internal/daemon"
	"github.com/dstm-project/dstm/lease"
)

// remote makes a command one that asks the lease service.
func (a *app) remote(cmd *cobra.Command, ask func(ctx context.Context, op operator, args []string) error) *cobra.Command {
	s := &a.flags.LeaseService
	var servers []string
	f := cmd.Flags()
	f.StringSliceVar(&servers, "server", nil, "lease service `address:port` (repeatable)")
	f.StringVar(&s.Name, "name", "", "`name` in the lease service's certificate")
	f.StringVar(&s.TLS.Cert, "cert", "", "operator's certificate `file`")
	f.StringVar(&s.TLS.Key, "key", "", "operator's key `file`")
	f.StringVar(&s.TLS.CA, "ca", "", "root certificate `file`")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		for _, v := range servers {
			ap, err := netip.ParseAddrPort(v)
			if err != nil {
				return daemon.Usage(fmt.Errorf("--server %q is not ADDRESS:PORT, for example [2001:db8:2::10]:3545", v))
			}
			s.Servers = append(s.Servers, ap)
		}
		c, err := a.load(cmd)
		if err != nil {
			return err
		}
		if len(c.LeaseService.Servers) == 0 {
			return daemon.Usage(fmt.Errorf("no lease service: neither lease_service.servers in %s nor --server", a.config))
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), a.timeout)
		defer cancel()
		op, end, err := a.connect(c)
		if err != nil {
			return err
		}
		return errors.Join(sentence(ask(ctx, op, args)), end())
	}
	return cmd
}

func (a *app) leaseCommand() *cobra.Command {
	var pool string
	ls := a.remote(&cobra.Command{Use: "ls", Short: "List every address that is not free", Args: noArgs},
		func(ctx context.Context, op operator, _ []string) error { return a.listLeases(ctx, op, pool) })
	ls.Flags().StringVar(&pool, "pool", "", "only this pool")
	var gen string
	revoke := a.remote(&cobra.Command{
		Use: "revoke ADDR", Short: "End a lease now", Args: oneArg("address"),
		Long: "End the lease of an address, or take an address out of CONFLICT. The address is given out again only when no " +
			"gateway forwards for it any more.",
	}, func(ctx context.Context, op operator, args []string) error {
		return a.revokeLease(ctx, op, args[0], gen)
	})
	revoke.Flags().StringVar(&gen, "gen", "", "only if this `generation` (EPOCH.REVISION) is bound")
	return group("lease", "List and end leases", ls, revoke)
}

func (a *app) listLeases(ctx context.Context, op operator, pool string) error {
	infos, err := op.Leases(ctx, pool)
	if err != nil {
		return err
	}
	ls := views(infos, viewLease)
	if a.json {
		return a.printJSON("dstm.lease/1", struct {
			Leases []leaseView `json:"leases"`
		}{ls})
	}
	rows := make([][]string, 0, len(ls))
	for _, l := range ls {
		rows = append(rows, []string{
			l.Addr, l.State, l.Gen, l.Host, l.Source, l.Pool, left(time.Duration(l.LeftMS) * time.Millisecond),
			instant(l.Bound), strings.Join(l.Waiting, ","),
		})
	}
	return table(a.out, []string{"ADDRESS", "STATE", "GENERATION", "HOST", "SOURCE", "POOL", "LEFT", "BOUND", "WAITING FOR"}, rows)
}

func (a *app) revokeLease(ctx context.Context, op operator, addr, gen string) error {
	ip, err := ipv4(addr)
	if err != nil {
		return err
	}
	ref := lease.Ref{Resource: lease.Whole(ip)}
	if gen != "" {
		if ref.Gen, err = parseGen(gen); err != nil {
			return err
		}
	}
	if err := op.Revoke(ctx, ref); err != nil {
		return err
	}
	if a.json {
		return a.printJSON("dstm.revoke/1", struct {
			Addr string `json:"addr"`
		}{ip.String()})
	}
	_, err = fmt.Fprintf(a.out, "%s is revoked; it is free once every gateway has let go of it\n", ip)
	return err
}

func (a *app) whoCommand() *cobra.Command {
	var at string
	cmd := a.remote(&cobra.Command{
		Use: "who ADDR[:PORT]", Short: "Say who holds or held an address", Args: oneArg("address"),
		Long: "Print the recorded history of an address, newest first, or with --at who held it at that time: the host, its " +
			"tunnel source, and from when on no gateway forwarded for it any more.",
	}, func(ctx context.Context, op operator, args []string) error {
		when, err := a.parseTime(at)
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
			h.Addr, h.Host, h.Source, instant(h.Bound), instant(h.Unbound), instant(h.Fenced), h.End, h.Gen,
		})
	}
	return table(a.out, []string{"ADDRESS", "HOST", "SOURCE", "BOUND", "UNBOUND", "FENCED", "END", "GENERATION"}, rows)
}

func atText(at time.Time) string {
	if at.IsZero() {
		return ""
	}
	return " at " + instant(at)
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

func ipv4(s string) (netip.Addr, error) {
	ip, err := netip.ParseAddr(s)
	if err != nil || !ip.Is4() {
		return netip.Addr{}, daemon.Usage(fmt.Errorf("%q is not an IPv4 address", s))
	}
	return ip, nil
}

// parseGen reads a generation as the tables show it.
func parseGen(s string) (lease.Gen, error) {
	e, r, ok := strings.Cut(s, ".")
	epoch, err1 := strconv.ParseUint(e, 10, 16)
	rev, err2 := strconv.ParseUint(r, 10, 48)
	if !ok || err1 != nil || err2 != nil || rev == 0 {
		return 0, daemon.Usage(fmt.Errorf("--gen %q is not EPOCH.REVISION, for example 1.42", s))
	}
	return lease.MakeGen(lease.Epoch(epoch), lease.Rev(rev)), nil
}

// parseTime reads --at; nothing is the zero time.
func (a *app) parseTime(s string) (time.Time, error) {
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
	return time.Time{}, daemon.Usage(fmt.Errorf("--at %q: want 2026-01-02T15:04:05Z, 15:04:05 (today, UTC) or a duration ago such as 90m", s))
}
