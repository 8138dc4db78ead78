package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/dstm-project/dstm/internal/daemon"
	"github.com/dstm-project/dstm/internal/labrun"
)

// labDo is what a command does with a topology; args are what follows its name.
type labDo func(ctx context.Context, l *labrun.Lab, out io.Writer, args []string) error

// labCommand runs containerlab topologies in namespaces.
func labCommand() *cobra.Command {
	only := cobra.ExactArgs(1)
	hold := &cobra.Command{
		Use: "hold NAME [BIND...]", Hidden: true, Args: cobra.MinimumNArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			return labrun.Hold(os.Stdin, os.Stdout, args[0], args[1:])
		},
	}
	return group("lab", "Run a containerlab topology in namespaces of this machine (needs root)",
		labFile("prepare FILE", "Write the certificates that up would write, for containerlab itself", only, labPrepare),
		labFile("up FILE", "Make nodes and links and start what exec names", only, interruptible(labUp)),
		labFile("run FILE", "up, then every step of expect.txtar; the lab stays up", only, interruptible(labRun)),
		labFile("check FILE", "Every step of expect.txtar on a lab that is up", only, interruptible(labCheck)),
		labFile("down FILE", "End everything that up made", only, labDown),
		labFile("exec FILE NODE COMMAND...", "Run a command in a node", cobra.MinimumNArgs(3), labExec),
		hold)
}

func labFile(use, short string, args cobra.PositionalArgs, do labDo) *cobra.Command {
	c := &cobra.Command{Use: use, Short: short, Args: args}
	c.RunE = func(cmd *cobra.Command, args []string) error {
		if cmd.Name() != "prepare" && os.Geteuid() != 0 {
			return daemon.Missing(fmt.Errorf("%s: needs root for namespaces", name(cmd)))
		}
		l, err := labrun.Open(args[0])
		if err != nil {
			return daemon.Usage(err)
		}
		return do(cmd.Context(), l, cmd.OutOrStdout(), args[1:])
	}
	c.Flags().SetInterspersed(false) // what follows a node's name is for the command there
	return c
}

// interruptible ends what do runs in a node when we are told to stop; it would go on without us.
func interruptible(do labDo) labDo {
	return func(ctx context.Context, l *labrun.Lab, out io.Writer, args []string) error {
		ctx, stop := signal.NotifyContext(ctx, os.Interrupt, unix.SIGTERM)
		defer stop()
		return do(ctx, l, out, args)
	}
}

func labPrepare(_ context.Context, l *labrun.Lab, _ io.Writer, _ []string) error { return l.Prepare() }

func labUp(ctx context.Context, l *labrun.Lab, out io.Writer, _ []string) error {
	return l.Up(ctx, out)
}

func labCheck(ctx context.Context, l *labrun.Lab, out io.Writer, _ []string) error {
	return l.Run(ctx, out)
}

func labDown(_ context.Context, l *labrun.Lab, out io.Writer, _ []string) error { return l.Down(out) }

func labRun(ctx context.Context, l *labrun.Lab, out io.Writer, _ []string) error {
	if err := l.Up(ctx, out); err != nil {
		return err
	}
	return l.Run(ctx, out)
}

func labExec(ctx context.Context, l *labrun.Lab, _ io.Writer, args []string) error {
	if !l.Has(args[0]) {
		return fmt.Errorf("node %s does not run", args[0])
	}
	x := l.Command(ctx, args[0], args[1:]...)
	x.Stdin, x.Stdout, x.Stderr = os.Stdin, os.Stdout, os.Stderr
	err := x.Run()
	var ee *exec.ExitError
	if errors.As(err, &ee) {
		os.Exit(ee.ExitCode())
	}
	return err
}
