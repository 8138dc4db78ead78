package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/dstm-project/dstm/internal/daemon"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc"
	"github.com/dstm-project/dstm/leasesvc/store/boltstore"
	"github.com/dstm-project/dstm/leasesvc/store/etcdstore"
)

// service reads the lease service's configuration: -c, or the file where it usually is.
func (a *app) service(cmd *cobra.Command) (*leasesvc.Config, error) {
	file := serviceConfig
	if cmd.Flags().Changed("config") {
		file = a.config
	}
	c, err := leasesvc.LoadConfig(file)
	return c, daemon.Usage(err)
}

func etcdOptions(c *leasesvc.Config) etcdstore.Options {
	s := c.Store
	return etcdstore.Options{
		Endpoints: s.Endpoints, TLS: etcdstore.Files(s.TLS), Prefix: s.Prefix, TTL: s.TTL, Cell: c.Cell, Name: "dstm-db", Scratch: c.CopiesDir(),
	}
}

// restoreEtcd puts a copy in the place of a store in etcd. The store in place is kept as a file among the copies.
func restoreEtcd(ctx context.Context, c *leasesvc.Config, o boltstore.RestoreOptions) (boltstore.Restored, error) {
	if err := os.MkdirAll(o.Copies, 0o700); err != nil {
		return boltstore.Restored{}, err
	}
	r, err := etcdstore.Restore(ctx, etcdOptions(c), etcdstore.From{
		Path: o.From, Copies: o.Copies, Epoch: o.Epoch, OtherCluster: o.OtherCluster, Problems: o.Problems,
		Aside: filepath.Join(o.Copies, "etcd.replaced-"+o.Now.UTC().Format("20060102T150405.000Z")+".db"),
	})
	return boltstore.Restored{Report: r.Report, Aside: r.Aside}, err
}

func (a *app) adoptCommand() *cobra.Command {
	var epoch uint16
	cmd := &cobra.Command{
		Use: "adopt [-c LEASESVC.YAML]", Short: "Go on with a store in an etcd that was restored", Args: noArgs,
		Long: "Go on with the store that is in etcd, after etcd itself was restored from a snapshot or brought back from fewer " +
			"members than a majority, so that what was written last may be missing. The service gives out no address until it " +
			"knows from every gateway which leases are in force that the store does not know.",
	}
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		c, err := a.service(cmd)
		if err != nil {
			return err
		}
		if c.Store.Type != leasesvc.StoreEtcd {
			return daemon.Usage(fmt.Errorf("store type %s: only a store in etcd is adopted", c.Store.Type))
		}
		now, err := etcdstore.Adopt(cmd.Context(), etcdOptions(c), lease.Epoch(epoch))
		if err != nil {
			return err
		}
		if a.json {
			return a.printJSON("dstm.db.adopt/1", map[string]uint16{"epoch": uint16(now)})
		}
		_, err = fmt.Fprintf(a.out, "store of cell %s in etcd: adopted under epoch %d\n", c.Cell, now)
		return err
	}
	cmd.Flags().Uint16Var(&epoch, "epoch", 0, "the new epoch is above this `one`: the newest that the cluster ever had, if the store does not say so")
	return cmd
}
