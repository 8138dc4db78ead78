// leasesvc is the DSTM lease service. See deploy/leasesvc.yaml.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"

	"github.com/dstm-project/dstm/internal/acme"
	"github.com/dstm-project/dstm/internal/daemon"
	"github.com/dstm-project/dstm/internal/tlsid"
	"github.com/dstm-project/dstm/leasesvc"
	"github.com/dstm-project/dstm/leasesvc/policy"
	"github.com/dstm-project/dstm/leasesvc/policy/external"
	"github.com/dstm-project/dstm/leasesvc/store/boltstore"
	"github.com/dstm-project/dstm/leasesvc/store/etcdstore"
)

func main() {
	daemon.Main("leasesvc", func(ctx context.Context, args []string) error { return run(ctx, args, os.Stdout, os.Stderr) })
}

func run(ctx context.Context, args []string, out, errOut io.Writer) error {
	fs := flag.NewFlagSet("leasesvc", flag.ContinueOnError)
	fs.SetOutput(errOut)
	file := fs.String("c", "/etc/dstm/leasesvc.yaml", "configuration `file`")
	test := fs.Bool("t", false, "check the configuration and exit")
	create := fs.Bool("create-store", false, "create a new, empty store and exit")
	version := fs.Bool("version", false, "print the version and exit")
	if err := fs.Parse(args); errors.Is(err, flag.ErrHelp) {
		return nil
	} else if err != nil {
		return daemon.Usage(err)
	}
	if fs.NArg() > 0 {
		return daemon.Usage(fmt.Errorf("unexpected argument %q", fs.Arg(0)))
	}
	if *version {
		_, err := fmt.Fprintln(out, "leasesvc", daemon.Version())
		return err
	}
	cfg, err := leasesvc.LoadConfig(*file)
	if err != nil {
		return daemon.Usage(err)
	}
	if *test {
		_, err := fmt.Fprintf(out, "%s: ok\n", *file)
		return err
	}
	if *create {
		return createStore(ctx, cfg)
	}
	return serve(ctx, cfg, cfg.Log.Logger(errOut))
}

// serve runs the service until a signal ends it.
func serve(ctx context.Context, cfg *leasesvc.Config, log *slog.Logger) error {
	id, err := tlsid.Open(cfg.TLS, tlsid.RoleSvc, log)
	if err != nil {
		return daemon.Usage(err)
	}
	if got := id.ID(); got.Cell != cfg.Cell || got.TrustDomain != cfg.TrustDomain {
		return daemon.Usage(fmt.Errorf("certificate %s is of %s: the configuration is of cell %q in trust domain %q", cfg.TLS.Cert, got, cfg.Cell, cfg.TrustDomain))
	}
	registry := daemon.NewRegistry()
	id.Register(registry, "dstm_leasesvc")
	rules := policy.New(cfg.Policy, policy.Deps{Start: external.Starter(cfg.Policy.Dir, log), Log: log, Registry: registry})
	deps := leasesvc.Deps{TLS: id, Policy: rules, Log: log, Registry: registry}
	tasks := []daemon.Task{daemon.NewTask("policy", rules.Run)}
	if a := cfg.ACME; a.Directory != "" {
		m, err := acme.New(acme.Config{Directory: a.Directory, Root: a.Root, Listen: a.Listen, Names: a.Names, Dir: a.Dir, Email: a.Email}, log)
		if err != nil {
			return daemon.Usage(err)
		}
		deps.Server = id.ServerShowing(m.GetCertificate)
		tasks = append(tasks, daemon.NewTask("acme", m.Run))
	}
	c := &cell{cfg: cfg, deps: deps, registry: registry, log: log, state: "starting"}
	admin := &daemon.Admin{Addr: cfg.Admin, Registry: registry, Ready: c.ready, Handlers: map[string]http.Handler{"/": c}}
	log.Info("starting", "version", daemon.Version(), "cell", cfg.Cell, "identity", id.ID().String())
	return daemon.Run(ctx, log, append(tasks, daemon.NewTask("cell", c.run), admin.Task(log))...)
}

// createStore makes the store that the configuration names.
func createStore(ctx context.Context, cfg *leasesvc.Config) error {
	if cfg.Store.Type == leasesvc.StoreEtcd {
		return etcdstore.Create(ctx, etcdOptions(cfg, "leasesvc--create-store"))
	}
	return boltstore.Create(cfg.Store.Path)
}
