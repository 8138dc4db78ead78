package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/dstm-project/dstm/internal/engset"
	"github.com/dstm-project/dstm/leasesvc/leaseclient"
)

func (a *app) poolCommand() *cobra.Command {
	ls := a.remote(&cobra.Command{
		Use: "ls", Short: "List the pools, how full they are and how they are used", Args: noArgs,
		Long: "List the pools. PORT SETS are those leased of those that there are. PEAK and PEAK 24H are the most " +
			"addresses that were not free at once, since the service started and in the last 24 h; rates and MEAN HOLD are of the last hour; BLOCKING is the share of requests " +
			"that find no address at that load; DRY IN is when nothing is free at the trend of the last ten minutes.",
	}, func(ctx context.Context, op operator, _ []string) error { return a.listPools(ctx, op) })
	return group("pool", "Look at pools and size them", ls, a.adviseCommand())
}

// poolView is part of the schema "dstm.pool/1". What is not known is absent.
type poolView struct {
	Name     string   `json:"name"`
	Prefix   string   `json:"prefix"`
	TEP      string   `json:"tep"`
	Size     uint32   `json:"size"`
	Bound    uint32   `json:"bound"`
	Revoking uint32   `json:"revoking"`
	HeldDown uint32   `json:"held_down"`
	Free     uint32   `json:"free"`
	Cut      uint32   `json:"cut,omitempty"`
	SetsFree uint32   `json:"sets_free,omitempty"`
	SetsUsed uint32   `json:"sets_used,omitempty"`
	Peak     uint32   `json:"peak"`
	PeakDay  uint32   `json:"peak_24h"`
	WindowMS int64    `json:"window_ms"`
	Binds    float64  `json:"binds_per_s"`
	Ends     float64  `json:"releases_per_s"`
	Mean     float64  `json:"mean_taken"`
	HoldMS   int64    `json:"mean_hold_ms,omitempty"`
	Hosts    uint32   `json:"attended_hosts"`
	Blocking *float64 `json:"blocking,omitempty"`
	DryMS    *int64   `json:"dry_in_ms,omitempty"`
}

func viewPool(p leaseclient.PoolInfo) poolView {
	v := poolView{
		Name: p.Name, Prefix: p.Prefix.String(), TEP: addrText(p.TEP), Size: p.Size, Bound: p.Bound, Revoking: p.Revoking,
		HeldDown: p.HeldDown, Free: p.Free, Cut: p.Cut, SetsFree: p.SetsFree, SetsUsed: p.SetsUsed, Peak: p.Peak, PeakDay: p.PeakDay, WindowMS: p.Window.Milliseconds(), Mean: p.Mean,
		Hosts: p.Hosts,
	}
	if s := p.Window.Seconds(); s > 0 {
		v.Binds, v.Ends = float64(p.Binds)/s, float64(p.Ends)/s
	}
	if p.Binds > 0 && p.Cut == 0 { // Little's law: addresses taken on average = leases that begin a second · seconds of each
		v.HoldMS = int64(p.Mean * float64(v.WindowMS) / float64(p.Binds))
	}
	if l, err := measuredLoad(p); err == nil {
		b := l.Blocking(int(p.Size))
		v.Blocking = &b
	}
	if ms := p.Dry.Milliseconds(); ms > 0 || p.Free == 0 {
		v.DryMS = &ms
	}
	return v
}

// minWindow is how long a pool must have been measured before its load says anything: a few turns of the usual tail.
const minWindow = 10 * time.Minute

// measuredLoad returns what the hosts of a pool asked for in the last hour, or why that is not known. Hosts that do not
// attend are none.
func measuredLoad(p leaseclient.PoolInfo) (engset.Load, error) {
	switch {
	case p.Window < minWindow:
		return engset.Load{}, fmt.Errorf("pool %s was measured for %s: want %s, ask again later", p.Name, p.Window.Round(time.Second), minWindow)
	case p.Cut > 0: // one lease is no longer one address
		return engset.Load{}, fmt.Errorf("pool %s has so few addresses that %d are leased by port sets: add addresses, then measure",
			p.Name, p.Cut)
	case p.Mean <= 0:
		return engset.Load{}, fmt.Errorf("pool %s: no address was taken in the last %s", p.Name, p.Window.Round(time.Second))
	case p.Mean > float64(p.Hosts):
		return engset.Load{}, fmt.Errorf("pool %s: %.1f addresses were taken on average, but %d hosts attend: who took them is not known",
			p.Name, p.Mean, p.Hosts)
	}
	l := engset.Load{Sources: int(p.Hosts), Busy: p.Mean / float64(p.Hosts)}
	return l, l.Check()
}

func (a *app) listPools(ctx context.Context, op operator) error {
	infos, err := op.Pools(ctx)
	if err != nil {
		return err
	}
	ps := views(infos, viewPool)
	if a.json {
		return a.printJSON("dstm.pool/1", struct {
			Pools []poolView `json:"pools"`
		}{ps})
	}
	rows := make([][]string, 0, len(ps))
	for _, p := range ps {
		rows = append(rows, []string{
			p.Name, p.Prefix, p.TEP, fmt.Sprint(p.Size), fmt.Sprint(p.Bound), fmt.Sprint(p.Revoking), fmt.Sprint(p.HeldDown),
			fmt.Sprint(p.Free), p.sets(), fmt.Sprint(p.Peak), fmt.Sprint(p.PeakDay), fmt.Sprintf("%.3g", p.Binds),
			fmt.Sprintf("%.3g", p.Ends), left(time.Duration(p.HoldMS) * time.Millisecond), p.blocking(), p.dryIn(),
		})
	}
	return table(a.out, []string{
		"NAME", "PREFIX", "TEP", "SIZE", "BOUND", "REVOKING", "HELD DOWN", "FREE", "PORT SETS", "PEAK", "PEAK 24H",
		"BINDS/S", "RELEASES/S", "MEAN HOLD", "BLOCKING", "DRY IN",
	}, rows)
}

// sets says how many port sets are leased, of how many.
func (v poolView) sets() string {
	if v.Cut == 0 {
		return ""
	}
	return fmt.Sprintf("%d/%d", v.SetsUsed, v.SetsUsed+v.SetsFree)
}

func (v poolView) blocking() string {
	if v.Blocking == nil {
		return ""
	}
	return fmt.Sprintf("%.2g", *v.Blocking)
}

func (v poolView) dryIn() string {
	switch {
	case v.DryMS == nil:
		return ""
	case *v.DryMS == 0:
		return "now"
	}
	return left(time.Duration(*v.DryMS) * time.Millisecond)
}
