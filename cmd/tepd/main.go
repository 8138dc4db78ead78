// tepd is the DSTM gateway: it carries the packets of leased addresses and announces them. See deploy/tepd.yaml.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dstm-project/dstm/bgp"
	"github.com/dstm-project/dstm/bgp/gobgp"
	"github.com/dstm-project/dstm/bgp/speaker"
	"github.com/dstm-project/dstm/dataplane/tc"
	"github.com/dstm-project/dstm/internal/caps"
	"github.com/dstm-project/dstm/internal/daemon"
	"github.com/dstm-project/dstm/internal/netcfg"
	"github.com/dstm-project/dstm/internal/tlsid"
	"github.com/dstm-project/dstm/leasesvc/leaseclient"
	"github.com/dstm-project/dstm/tepd"
	"github.com/dstm-project/dstm/tepd/question"
)

func main() {
	daemon.Main("tepd", func(ctx context.Context, args []string) error { return run(ctx, args, os.Stdout, os.Stderr) })
}

func run(ctx context.Context, args []string, out, errOut io.Writer) error {
	if len(args) == 1 && args[0] == speakerCommand {
		return speak()
	}
	fs := flag.NewFlagSet("tepd", flag.ContinueOnError)
	fs.SetOutput(errOut)
	file := fs.String("c", "/etc/dstm/tepd.yaml", "configuration `file`")
	test := fs.Bool("t", false, "check the configuration and exit")
	clean := fs.Bool("cleanup", false, "remove everything that tepd put into this machine and exit")
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
		_, err := fmt.Fprintln(out, "tepd", daemon.Version())
		return err
	}
	cfg, err := tepd.LoadConfig(*file)
	if err != nil {
		return daemon.Usage(err)
	}
	if *test {
		_, err := fmt.Fprintf(out, "%s: ok\n", *file)
		return err
	}
	return start(ctx, cfg, *clean, errOut)
}

// start opens what both a running gateway and a cleanup need.
func start(ctx context.Context, cfg *tepd.Config, clean bool, errOut io.Writer) error {
	if err := caps.Check(); err != nil {
		return daemon.Missing(err)
	}
	log := cfg.Log.Logger(errOut)
	kernel, err := netcfg.Open(cfg.Paths.NetState(), log)
	if err != nil {
		return err
	}
	defer kernel.Close()
	path, err := tc.NewGateway(log)
	if err != nil {
		return daemon.Missing(err)
	}
	d := tepd.Deps{Path: path, Kernel: kernel, Now: bootTime, Log: log}
	speakers, err := speakerProcess(cfg, log)
	if err != nil {
		return err
	}
	if clean {
		return tepd.Cleanup(ctx, cfg, d, speakers.End)
	}
	if cfg.BGP.Enabled() {
		d.Speakers = speakers
	}
	return serve(ctx, cfg, d)
}

// speakerCommand is the argument with which tepd starts itself as its own BGP speaker.
const speakerCommand = "speaker"

func speak() error {
	err := speaker.Serve(func(log *slog.Logger) bgp.Speaker { return gobgp.New(log) })
	if errors.Is(err, speaker.ErrByHand) {
		return daemon.Usage(err)
	}
	return err
}

// speakerProcess says which program speaks BGP: this one, or the configured one.
func speakerProcess(cfg *tepd.Config, log *slog.Logger) (*speaker.Process, error) {
	p := &speaker.Process{Dir: cfg.Paths.Run, Log: log}
	if s := cfg.BGP.Speaker; s.Path != "" {
		var err error
		p.Program = s.Path
		p.SHA256, err = s.Digest()
		return p, err
	}
	self, err := os.Executable()
	p.Program, p.Args = self, []string{speakerCommand}
	return p, err
}

// serve runs the gateway until a signal ends it.
func serve(ctx context.Context, cfg *tepd.Config, d tepd.Deps) error {
	id, err := identity(cfg, d.Log)
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
	registry := daemon.NewRegistry()
	id.Register(registry, "dstm_tepd")
	d.Service, d.Registry = tepd.Client{Conn: conn}, registry
	if cfg.Peers.Listen.IsValid() {
		d.Peers = &question.Peers{ID: id, Listen: cfg.Peers.Listen, Log: d.Log}
	}
	g := tepd.New(cfg, d)
	admin := &daemon.Admin{Addr: cfg.Admin, Registry: registry, Ready: g.Ready, Handlers: g.Handlers()}
	d.Log.Info("starting", "version", daemon.Version(), "tep", cfg.ID, "cell", cfg.Cell)
	return daemon.Run(ctx, d.Log,
		daemon.NewTask("gateway", g.Run),
		daemon.NewTask("certificates", func(ctx context.Context, ready func()) error { ready(); return id.Watch(ctx) }),
		admin.Task(d.Log),
	)
}

// identity opens the gateway's certificate and compares it with the configuration: the lease service would refuse a
// difference later and less clearly.
func identity(cfg *tepd.Config, log *slog.Logger) (*tlsid.Source, error) {
	s, err := tlsid.Open(cfg.LeaseService.TLS, tlsid.RoleTEP, log)
	if err != nil {
		return nil, err
	}
	switch id := s.ID(); {
	case id.Cell != cfg.Cell:
		return nil, fmt.Errorf("certificate %s is of cell %q, the configuration of cell %q", cfg.LeaseService.TLS.Cert, id.Cell, cfg.Cell)
	case id.Name != cfg.ID:
		return nil, fmt.Errorf("certificate %s is of gateway %q, the configuration of %q", cfg.LeaseService.TLS.Cert, id.Name, cfg.ID)
	}
	return s, nil
}

// bootTime is CLOCK_BOOTTIME, which goes on while the machine sleeps and which the packet path compares deadlines with.
func bootTime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic(err) // the clock is there since Linux 2.6.39
	}
	return time.Duration(ts.Nano())
}
