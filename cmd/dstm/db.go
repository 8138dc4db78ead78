package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/dstm-project/dstm/internal/daemon"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc"
	"github.com/dstm-project/dstm/leasesvc/store/boltstore"
)

func (a *app) dbCommand() *cobra.Command {
	return group("db", "Back up, check and restore the store of the lease service", a.backupCommand(), a.checkCommand(), a.restoreCommand(), a.adoptCommand())
}

// reportView is what is in a store file.
type reportView struct {
	File      string         `json:"file"`
	Cluster   string         `json:"cluster"`
	Epoch     uint16         `json:"epoch"`
	Rev       uint64         `json:"rev"`
	Wall      time.Time      `json:"newest,omitzero"`
	Restored  bool           `json:"restored"`
	Bytes     int64          `json:"bytes"`
	Addresses map[string]int `json:"addresses"`
	Pools     int            `json:"pools"`
	TEPs      int            `json:"teps"`
	Leases    int            `json:"audit_leases"`
	Events    int            `json:"audit_events"`
	Since     time.Time      `json:"audit_since,omitzero"`
	Aside     string         `json:"replaced,omitempty"`
}

func viewReport(file string, r boltstore.Report) reportView {
	v := reportView{
		File: file, Cluster: fmt.Sprintf("%x", r.Cluster), Epoch: uint16(r.Epoch), Rev: uint64(r.Last), Wall: r.Wall.UTC(),
		Restored: r.Restored, Bytes: r.Bytes, Addresses: map[string]int{}, Pools: len(r.Pools), TEPs: len(r.Members),
		Leases: r.Leases, Events: r.Events, Since: r.First.UTC(),
	}
	for s, n := range r.Addresses {
		v.Addresses[s.String()] = n
	}
	return v
}

// printReport prints a report as one sentence, which begins with what was done.
func (a *app) printReport(done string, v reportView) error {
	if a.json {
		return a.printJSON("dstm.db/1", v)
	}
	var states []string
	for s := lease.Free; s <= lease.Conflict; s++ {
		if n := v.Addresses[s.String()]; n > 0 {
			states = append(states, fmt.Sprintf("%d %s", n, s))
		}
	}
	if states == nil {
		states = []string{"none"}
	}
	_, err := fmt.Fprintf(a.out, "%s: %s: epoch %d, revision %d of %s, addresses: %s; audit log: %d leases since %s\n",
		v.File, done, v.Epoch, v.Rev, dash(exact(v.Wall)), strings.Join(states, ", "), v.Leases, dash(exact(v.Since)))
	return err
}

func (a *app) backupCommand() *cobra.Command {
	var file string
	cmd := a.stream(&cobra.Command{
		Use: "backup -o FILE", Short: "Copy the store of the running lease service", Args: noArgs,
		Long: "Copy the store of the running lease service, which goes on meanwhile, and check the copy. FILE is replaced when the " +
			"copy is whole.",
	}, func(ctx context.Context, op operator, _ []string) error {
		if file == "" {
			return daemon.Usage(errors.New("backup wants a file: -o FILE"))
		}
		ctx, stop := signal.NotifyContext(ctx, syscall.SIGINT, syscall.SIGTERM)
		defer stop()
		r, err := boltstore.Receive(file, func(w io.Writer) error { return op.Backup(ctx, w) })
		if err != nil {
			return err
		}
		if len(r.Problems) > 0 {
			return fmt.Errorf("%s is what the service has, but it contradicts itself: %w", file, errors.Join(r.Problems...))
		}
		return a.printReport("backup is whole", viewReport(file, r))
	})
	cmd.Flags().StringVarP(&file, "output", "o", "", "`file` to write")
	return cmd
}

func (a *app) checkCommand() *cobra.Command {
	return &cobra.Command{
		Use: "check FILE", Short: "Check everything in a copy of the store", Args: oneArg("file"),
		Long: "Check pages, records and audit log of a store file, and whether they agree with each other. A store that is in use " +
			"cannot be checked: take a backup or a copy.",
		RunE: func(_ *cobra.Command, args []string) error {
			r, err := boltstore.Check(args[0], nil)
			if err := errors.Join(append(r.Problems, err)...); err != nil {
				return err
			}
			return a.printReport("store is whole", viewReport(args[0], r))
		},
	}
}

// serviceConfig is where the lease service's configuration is.
const serviceConfig = "/etc/dstm/leasesvc.yaml"

func (a *app) restoreCommand() *cobra.Command {
	var o boltstore.RestoreOptions
	var epoch uint16
	cmd := &cobra.Command{
		Use: "restore FILE [-c LEASESVC.YAML]", Short: "Put a copy in the place of the store", Args: oneArg("file"),
		Long: "Put a copy in the place of the store that the configuration of the lease service (-c, default " + serviceConfig + ") " +
			"names, while the service does not run. The store in place is kept under another name. The service gives out no " +
			"address until it knows from every gateway which leases are in force that the copy does not know.",
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		c, err := a.service(cmd)
		if err != nil {
			return err
		}
		o.From, o.Path, o.Copies, o.Epoch, o.Now = args[0], c.Store.Path, c.CopiesDir(), lease.Epoch(epoch), a.now()
		restore := boltstore.Restore
		if c.Store.Type == leasesvc.StoreEtcd {
			o.Path = "etcd"
			restore = func(o boltstore.RestoreOptions) (boltstore.Restored, error) { return restoreEtcd(cmd.Context(), c, o) }
		}
		r, err := restore(o)
		if err != nil {
			return err
		}
		v := viewReport(o.Path, r.Report)
		v.Aside = r.Aside
		if r.Aside != "" && !a.json {
			if _, err := fmt.Fprintf(a.out, "%s: kept as %s\n", o.Path, r.Aside); err != nil {
				return err
			}
		}
		return a.printReport("restored from "+o.From, v)
	}
	f := cmd.Flags()
	f.BoolVar(&o.OtherCluster, "force-cluster", false, "even if the store in place is of another cluster, or cannot be read")
	f.BoolVar(&o.Problems, "force", false, "even if the records of FILE contradict each other")
	f.Uint16Var(&epoch, "epoch", 0, "the new epoch is above this `one`: the newest that the cluster ever had, if no copy says so")
	return cmd
}
