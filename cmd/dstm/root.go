package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/dstm-project/dstm/internal/daemon"
)

// env is what commands need of the world.
type env struct {
	out     io.Writer
	now     func() time.Time
	connect func(c *Config) (operator, func() error, error)
}

// app is one run of the tool.
type app struct {
	env
	json    bool
	timeout time.Duration
	config  string
	flags   Config // what the command line says; it goes before the file
}

// run runs the command that args name. Errors of the command line have exit code 2.
func run(ctx context.Context, e env, args []string) error {
	a := &app{env: e}
	root := a.root()
	root.SetArgs(args)
	root.SetOut(e.out)
	root.SetErr(e.out)
	return root.ExecuteContext(ctx)
}

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:           "dstm",
		Short:         "Look after DSTM: daemons, leases, certificates, labs",
		Version:       daemon.Version(),
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          noArgs,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return daemon.Usage(err) })
	p := root.PersistentFlags()
	p.BoolVar(&a.json, "json", false, "print JSON instead of tables")
	p.DurationVar(&a.timeout, "timeout", 5*time.Second, "how long to wait for an answer")
	p.StringVarP(&a.config, "config", "c", DefaultPath, "configuration `file`; not needed when the flags say everything")
	root.AddCommand(a.statusCommand(), a.dropsCommand(), a.bgpCommand())
	root.AddCommand(a.leaseCommand(), a.whoCommand(), a.poolCommand(), a.tepCommand())
	root.AddCommand(a.auditCommand(), a.dbCommand(), a.pkiCommand())
	for _, extra := range extraCommands() {
		root.AddCommand(extra)
	}
	return root
}

// group returns a command that only holds others.
func group(use, short string, sub ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{
		Use: use, Short: short, Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_ = cmd.Help()
			return daemon.Usage(fmt.Errorf("%s needs a command", name(cmd)))
		},
	}
	cmd.AddCommand(sub...)
	return cmd
}

// name is the command's path without the program, which begins every error already.
func name(cmd *cobra.Command) string { return strings.TrimPrefix(cmd.CommandPath(), "dstm ") }

func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return daemon.Usage(fmt.Errorf("unknown command or argument %q; see %s --help", args[0], cmd.CommandPath()))
	}
	return nil
}

// oneArg asks for one argument by name.
func oneArg(what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != 1 {
			return daemon.Usage(fmt.Errorf("%s wants one %s, got %d arguments", name(cmd), what, len(args)))
		}
		return nil
	}
}

// load reads the configuration. A missing default file is no error: flags or built-in defaults may do.
func (a *app) load(cmd *cobra.Command) (*Config, error) {
	c := new(Config)
	c.Defaults()
	_, err := os.Stat(a.config)
	if err == nil || cmd.Flags().Changed("config") {
		if c, err = LoadConfig(a.config); err != nil {
			return nil, daemon.Usage(err)
		}
	}
	c.override(a.flags)
	return c, nil
}
