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

// remote makes a command one that asks the lease service and gets an answer in time.
func (a *app) remote(cmd *cobra.Command, ask func(ctx context.Context, op operator, args []string) error) *cobra.Command {
	return a.stream(cmd, func(ctx context.Context, op operator, args []string) error {
		ctx, cancel := context.WithTimeout(ctx, a.timeout)
		defer cancel()
		return ask(ctx, op, args)
	})
}

// stream makes a command one that asks the lease service and takes as long as it takes.
func (a *app) stream(cmd *cobra.Command, ask func(ctx context.Context, op operator, args []string) error) *cobra.Command {
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
		op, end, err := a.connect(c)
		if err != nil {
			return err
		}
		return errors.Join(sentence(ask(cmd.Context(), op, args)), end())
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
