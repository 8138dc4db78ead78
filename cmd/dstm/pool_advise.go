package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/dstm-project/dstm/internal/daemon"
	"github.com/dstm-project/dstm/internal/engset"
	"github.com/dstm-project/dstm/lease"
)

// defaultIdle is how long after its last use a host gives back, as the lease service tells it by default (timers.idle).
const defaultIdle = 2 * time.Minute

// question is what pool advise is asked, as on the command line.
type question struct {
	hosts    int
	use      string
	tail     time.Duration
	blocking float64
	portSets int
	measured string
}

// demand is what hosts need, given or measured.
type demand struct {
	load              engset.Load
	use, period, tail time.Duration // given; zero when measured
	pool              string        // measured
}

func (a *app) adviseCommand() *cobra.Command {
	var q question
	cmd := a.remote(&cobra.Command{
		Use: "advise", Short: "Say how many addresses a number of hosts needs", Args: noArgs,
		Long: "Say how many addresses hosts need so that at most --blocking of their requests find none: --hosts of them, each " +
			"with --use, or those of a pool as the lease service measured them in the last hour (--measured). Engset's loss " +
			"formula; see docs/capacity.md. Only --measured asks the lease service.",
	}, func(ctx context.Context, op operator, _ []string) error {
		d, err := q.ask(ctx, op)
		if err != nil {
			return err
		}
		return a.advise(q, d)
	})
	f := cmd.Flags()
	f.IntVar(&q.hosts, "hosts", 0, "`number` of hosts; with --measured that of the attended hosts if not given")
	f.StringVar(&q.use, "use", "", "`use/period` of a host, such as 60s/1h: one use of 60 s an hour")
	f.DurationVar(&q.tail, "tail", defaultIdle+lease.DefaultTimers().HoldDown,
		"`time` for which an address stays taken after a use: idle, fence and hold-down")
	f.Float64Var(&q.blocking, "blocking", 1e-4, "`share` of requests that may find no address")
	f.IntVar(&q.portSets, "port-sets", 0, "length of the port set in `bits`: 2^bits hosts share an address")
	f.StringVar(&q.measured, "measured", "", "take the use of this `pool` from the lease service")
	ask := cmd.RunE
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := q.check(cmd.Flags().Changed); err != nil {
			return daemon.Usage(err)
		}
		if q.measured != "" {
			return ask(cmd, args)
		}
		d, err := q.given()
		if err != nil {
			return daemon.Usage(err)
		}
		return a.advise(q, d)
	}
	return cmd
}

func (q question) check(given func(flag string) bool) error {
	switch {
	case given("measured") && q.measured == "":
		return errors.New("--measured wants the name of a pool")
	case q.measured != "" && (given("use") || given("tail")):
		return errors.New("--measured says how hosts use addresses: leave out --use and --tail")
	case q.measured == "" && (!given("hosts") || !given("use")):
		return errors.New("pool advise needs --hosts and --use, for example --hosts 5000 --use 60s/1h, or --measured POOL")
	case given("hosts") && (q.hosts < 1 || q.hosts > engset.MaxSources):
		return fmt.Errorf("--hosts %d: want 1 to %d", q.hosts, engset.MaxSources)
	case q.tail < 0:
		return fmt.Errorf("--tail %s: want 0s or more", q.tail)
	case !(q.blocking > 0 && q.blocking < 1): // NaN is refused too
		return fmt.Errorf("--blocking %g: want more than 0 and less than 1, for example 1e-4", q.blocking)
	case q.portSets < 0 || q.portSets > lease.MaxPSIDLen:
		return fmt.Errorf("--port-sets %d: want 0 (whole addresses) to %d bits", q.portSets, lease.MaxPSIDLen)
	}
	return nil
}

// given is the demand of the command line. A host that comes again before its address is free keeps it all the time.
func (q question) given() (demand, error) {
	use, period, err := parseUse(q.use)
	if err != nil {
		return demand{}, err
	}
	busy := min(1, (use+q.tail).Seconds()/period.Seconds())
	return demand{load: engset.Load{Sources: q.hosts, Busy: busy}, use: use, period: period, tail: q.tail}, nil
}

// parseUse reads --use.
func parseUse(s string) (use, period time.Duration, err error) {
	u, p, ok := strings.Cut(s, "/")
	use, err1 := time.ParseDuration(strings.TrimSpace(u))
	period, err2 := time.ParseDuration(strings.TrimSpace(p))
	switch {
	case !ok || err1 != nil || err2 != nil || use <= 0:
		return 0, 0, fmt.Errorf("--use %q: want USE/PERIOD, for example 60s/1h", s)
	case use > period:
		return 0, 0, fmt.Errorf("--use %q: a use of %s is longer than its period of %s", s, use, period)
	}
	return use, period, nil
}

// maxRefused is the blocking up to which a pool's load is what its hosts want. What was refused is not seen: with a
// hundredth of the requests gone the answer is a hundredth too small.
const maxRefused = 0.01

// ask gets the demand from the lease service. More or fewer hosts than attend are taken to use IPv4 as those do.
func (q question) ask(ctx context.Context, op operator) (demand, error) {
	pools, err := op.Pools(ctx)
	if err != nil {
		return demand{}, err
	}
	var names []string
	for _, p := range pools {
		if names = append(names, p.Name); p.Name != q.measured {
			continue
		}
		l, err := measuredLoad(p)
		if err != nil {
			return demand{}, err
		}
		if b := l.Blocking(int(p.Size)); b > maxRefused {
			return demand{}, fmt.Errorf("pool %s is too full to tell what hosts want: %.0f %% of requests find no address; "+
				"add addresses, then measure", p.Name, 100*b)
		}
		if q.hosts > 0 {
			l.Sources = q.hosts
		}
		return demand{load: l, pool: p.Name}, nil
	}
	return demand{}, daemon.Usage(fmt.Errorf("--measured %q: no such pool; there are %s", q.measured, strings.Join(names, ", ")))
}

// adviceView is part of the schema "dstm.advice/1": one for whole addresses, and one for port sets if asked for.
type adviceView struct {
	Hosts           int     `json:"hosts"`
	UseMS           int64   `json:"use_ms,omitempty"`
	PeriodMS        int64   `json:"period_ms,omitempty"`
	TailMS          int64   `json:"tail_ms,omitempty"`
	Measured        string  `json:"measured_pool,omitempty"`
	Busy            float64 `json:"busy"`
	Mean            float64 `json:"mean_leases"`
	Leases          int     `json:"leases"`
	Blocking        float64 `json:"blocking"`
	HostsPerAddress int     `json:"hosts_per_address"`
	PortsPerHost    int     `json:"ports_per_host"`
	Addresses       int     `json:"addresses"`
	PrefixBits      int     `json:"prefix_bits"`
}

func (a *app) advise(q question, d demand) error {
	leases, blocking := d.load.Servers(q.blocking)
	lens := []int{0}
	if q.portSets > 0 {
		lens = append(lens, q.portSets)
	}
	vs := views(lens, func(psidLen int) adviceView {
		n := engset.Addresses(leases, psidLen)
		return adviceView{
			Hosts: d.load.Sources, UseMS: d.use.Milliseconds(), PeriodMS: d.period.Milliseconds(), TailMS: d.tail.Milliseconds(),
			Measured: d.pool, Busy: d.load.Busy, Mean: d.load.Mean(), Leases: leases, Blocking: blocking,
			HostsPerAddress: 1 << psidLen, PortsPerHost: lease.Resource{PSIDLen: uint8(psidLen)}.PortCount(),
			Addresses: n, PrefixBits: engset.PrefixBits(n),
		}
	})
	if a.json {
		return a.printJSON("dstm.advice/1", struct {
			Advice []adviceView `json:"advice"`
		}{vs})
	}
	rows := make([][]string, 0, len(vs))
	for _, v := range vs {
		row := []string{
			fmt.Sprint(v.Hosts), "", "", "", fmt.Sprintf("%.2f%%", 100*v.Busy), fmt.Sprintf("%.0f", v.Mean), fmt.Sprint(v.Leases),
			fmt.Sprintf("%.2g", v.Blocking), fmt.Sprint(v.HostsPerAddress), fmt.Sprint(v.PortsPerHost), fmt.Sprint(v.Addresses),
			fmt.Sprintf("/%d", v.PrefixBits),
		}
		if d.pool == "" {
			row[1], row[2], row[3] = d.use.String(), d.period.String(), d.tail.String()
		}
		rows = append(rows, row)
	}
	return table(a.out, []string{
		"HOSTS", "USE", "PERIOD", "TAIL", "BUSY", "MEAN", "LEASES", "BLOCKING", "HOSTS/ADDRESS", "PORTS/HOST", "ADDRESSES", "PREFIX",
	}, rows)
}
