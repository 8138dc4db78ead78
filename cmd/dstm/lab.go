package main

import (
	"errors"
	"os"
	"os/exec"

	"github.com/spf13/cobra"

	"github.com/dstm-project/dstm/internal/daemon"
	"github.com/dstm-project/dstm/internal/labrun"
)

// labCommand runs containerlab topologies in namespaces.
func labCommand() *cobra.Command {
	c := &cobra.Command{Use: "lab", Short: "run a containerlab topology in namespaces of this machine (needs root)"}
	sub := func(use, short string, args cobra.PositionalArgs, run func(l *labrun.Lab, cmd *cobra.Command, args []string) error) {
		c.AddCommand(&cobra.Command{Use: use, Short: short, Args: args, RunE: func(cmd *cobra.Command, args []string) error {
			l, err := labrun.Open(args[0])
			if err != nil {
				return daemon.Usage(err)
			}
			return run(l, cmd, args[1:])
		}})
	}
	sub("prepare FILE", "write the certificates that up would write, for containerlab itself", cobra.ExactArgs(1), func(l *labrun.Lab, _ *cobra.Command, _ []string) error {
		return l.Prepare()
	})
	sub("up FILE", "make nodes and links and start what exec names", cobra.ExactArgs(1), func(l *labrun.Lab, cmd *cobra.Command, _ []string) error {
		return l.Up(cmd.OutOrStdout())
	})
	sub("run FILE", "up, then every step of expect.txtar; the lab stays up", cobra.ExactArgs(1), func(l *labrun.Lab, cmd *cobra.Command, _ []string) error {
		if err := l.Up(cmd.OutOrStdout()); err != nil {
			return err
		}
		return l.Run(cmd.OutOrStdout())
	})
	sub("check FILE", "every step of expect.txtar on a lab that is up", cobra.ExactArgs(1), func(l *labrun.Lab, cmd *cobra.Command, _ []string) error {
		return l.Run(cmd.OutOrStdout())
	})
	sub("down FILE", "end everything that up made", cobra.ExactArgs(1), func(l *labrun.Lab, cmd *cobra.Command, _ []string) error {
		return l.Down(cmd.OutOrStdout())
	})
	sub("exec FILE NODE COMMAND...", "run a command in a node", cobra.MinimumNArgs(3), func(l *labrun.Lab, _ *cobra.Command, args []string) error {
		if !l.Has(args[0]) {
			return errors.New("node " + args[0] + " does not run")
		}
		x := l.Command(args[0], args[1:]...)
		x.Stdin, x.Stdout, x.Stderr = os.Stdin, os.Stdout, os.Stderr
		err := x.Run()
		var ee *exec.ExitError
		if errors.As(err, &ee) {
			os.Exit(ee.ExitCode())
		}
		return err
	})
	c.AddCommand(&cobra.Command{Use: "hold NAME [BIND...]", Hidden: true, Args: cobra.MinimumNArgs(1), RunE: func(_ *cobra.Command, args []string) error {
		return labrun.Hold(args[0], args[1:])
	}})
	for _, s := range c.Commands() {
		s.Flags().SetInterspersed(false)
	}
	return c
}
