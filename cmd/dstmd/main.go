// dstmd is the DSTM host agent: it gives this host IPv4 while IPv4 is used. See deploy/dstmd.yaml.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dstm-project/dstm/dataplane/tc"
	"github.com/dstm-project/dstm/hostd"
	"github.com/dstm-project/dstm/internal/caps"
	"github.com/dstm-project/dstm/internal/daemon"
	"github.com/dstm-project/dstm/internal/hostprobe"
	"github.com/dstm-project/dstm/internal/netcfg"
	"github.com/dstm-project/dstm/internal/tlsid"
	"github.com/dstm-project/dstm/leasesvc/leaseclient"
)

func main() {
	daemon.Main("dstmd", func(ctx context.Context, args []string) error { return run(ctx, args, os.Stdout, os.Stderr) })
}

func run(ctx context.Context, args []string, out, errOut io.Writer) error {
	fs := flag.NewFlagSet("dstmd", flag.ContinueOnError)
	fs.SetOutput(errOut)
	file := fs.String("c", "/etc/dstm/dstmd.yaml", "configuration `file`")
	test := fs.Bool("t", false, "check the configuration and exit")
	clean := fs.Bool("cleanup", false, "remove what a killed dstmd left in the kernel and exit")
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
		_, err := fmt.Fprintln(out, "dstmd", daemon.Version())
		return err
	}
	cfg, err := hostd.LoadConfig(*file)
	if err != nil {
		return daemon.Usage(err)
	}
	if *test {
		_, err := fmt.Fprintf(out, "%s: ok\n", *file)
		return err
	}
	if err := caps.Check(); err != nil {
		return daemon.Missing(err)
	}
	log := cfg.Log.Logger(errOut)
	net, err := netcfg.Open(filepath.Join(cfg.Paths.Run, "dstmd-network.json"), log)
	if err != nil {
		return err
	}
	defer net.Close()
	if *clean {
		return errors.Join(hostd.CheckDevice(net, cfg.Device.Name), net.Cleanup(), hostd.Firewall{}.Remove(), tc.RemoveHostPins(cfg.Paths.BPF))
	}
	return serve(ctx, cfg, net, log)
}

// identity opens the host's certificate, if it has one.
func identity(cfg *hostd.Config, log *slog.Logger) (*tlsid.Source, error) {
	files := cfg.LeaseService.TLS
	if files.Cert == "" {
		return tlsid.OpenAnonymous(files, cfg.Cell, log)
	}
	id, err := tlsid.Open(files, tlsid.RoleHost, log)
	if err != nil {
		return nil, err
	}
	if cell := id.ID().Cell; cell != cfg.Cell {
		return nil, fmt.Errorf("certificate %s is of cell %q, the configuration of cell %q", files.Cert, cell, cfg.Cell)
	}
	return id, nil
}

// serve runs the agent until a signal ends it.
func serve(ctx context.Context, cfg *hostd.Config, net *netcfg.Config, log *slog.Logger) error {
	id, err := identity(cfg, log)
	if err != nil {
		return daemon.Usage(err)
	}
	conn, err := leaseclient.New(leaseclient.Options{
		Servers: cfg.LeaseService.Servers, TLS: id.Client(cfg.LeaseService.Name), Identity: id,
	})
	if err != nil {
		return err
	}
	defer conn.Close()
	path, err := tc.NewHost(log)
	if err != nil {
		return daemon.Missing(err)
	}
	registry := daemon.NewRegistry()
	id.Register(registry, "dstm_hostd")
	agent := hostd.New(cfg, hostd.Deps{
		Service: hostd.Client{Conn: conn}, DataPath: path, Network: net, Filter: hostd.Firewall{},
		Sockets: hostd.Sockets{InUse: hostprobe.InUse, Abort: hostprobe.Abort},
		Now:     bootTime, Log: log, Registry: registry,
	})
	admin := &daemon.Admin{Addr: cfg.Admin, Registry: registry, Ready: agent.Ready, Handlers: agent.Handlers()}
	log.Info("starting", "version", daemon.Version(), "host", id.ID().String(), "cell", cfg.Cell)
	return daemon.Run(ctx, log,
		daemon.NewTask("agent", agent.Run),
		daemon.NewTask("certificates", func(ctx context.Context, ready func()) error { ready(); return id.Watch(ctx) }),
		admin.Task(log),
	)
}

// bootTime is CLOCK_BOOTTIME, which goes on while the machine sleeps.
func bootTime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic(err) // the clock is there since Linux 2.6.39
	}
	return time.Duration(ts.Nano())
}
