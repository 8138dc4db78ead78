// Package daemon is what every daemon does the same way: tasks under one context, signals, readiness, the admin
// listener, logging and exit codes.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"sync"
	"syscall"

	sd "github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sync/errgroup"
)

// Task is one long-lived part of a daemon. Run returns when ctx ends (nil) or when the part cannot go on (error, which
// ends the daemon). Ready is closed once the part serves.
type Task interface {
	Run(ctx context.Context) error
	Ready() <-chan struct{}
	String() string
}

type task struct {
	name  string
	run   func(ctx context.Context, ready func()) error
	ready chan struct{}
}

// NewTask makes a task of a function, which calls ready when it serves.
func NewTask(name string, run func(ctx context.Context, ready func()) error) Task {
	return &task{name: name, run: run, ready: make(chan struct{})}
}

func (t *task) Run(ctx context.Context) error {
	var once sync.Once
	return t.run(ctx, func() { once.Do(func() { close(t.ready) }) })
}

func (t *task) Ready() <-chan struct{} { return t.ready }
func (t *task) String() string         { return t.name }

// Run runs the tasks until one fails or SIGINT or SIGTERM comes, tells the service manager when all are ready and when
// the end begins, and returns the first error. SIGHUP is ignored: files are followed, not reloaded on demand.
func Run(ctx context.Context, log *slog.Logger, tasks ...Task) error {
	signal.Ignore(syscall.SIGHUP)
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	g, ctx := errgroup.WithContext(ctx)
	for _, t := range tasks {
		g.Go(func() error {
			if err := t.Run(ctx); err != nil && !errors.Is(err, context.Canceled) {
				return fmt.Errorf("%s: %w", t, err)
			}
			return nil
		})
	}
	g.Go(func() error {
		for _, t := range tasks {
			select {
			case <-t.Ready():
			case <-ctx.Done():
				return nil
			}
		}
		log.Info("ready")
		notify(log, sd.SdNotifyReady)
		<-ctx.Done()
		return nil
	})
	g.Go(func() error {
		<-ctx.Done()
		log.Info("stopping")
		notify(log, sd.SdNotifyStopping)
		return nil
	})
	return g.Wait()
}

func notify(log *slog.Logger, state string) {
	if _, err := sd.SdNotify(false, state); err != nil {
		log.Warn("service manager not told", "state", state, "err", err)
	}
}

// Exit codes of every program.
const (
	ExitOK      = 0
	ExitFailed  = 1
	ExitUsage   = 2 // usage or configuration
	ExitMissing = 3 // a capability or kernel feature is missing
)

type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string { return e.err.Error() }
func (e *exitError) Unwrap() error { return e.err }

// Usage marks an error of the command line or the configuration (exit code 2).
func Usage(err error) error { return withCode(ExitUsage, err) }

// Missing marks the lack of a capability or kernel feature (exit code 3).
func Missing(err error) error { return withCode(ExitMissing, err) }

func withCode(code int, err error) error {
	if err == nil {
		return nil
	}
	return &exitError{code, err}
}

// ExitCode returns the exit code that stands for err.
func ExitCode(err error) int {
	var e *exitError
	switch {
	case err == nil:
		return ExitOK
	case errors.As(err, &e):
		return e.code
	}
	return ExitFailed
}

// Main runs a program and exits: the error goes to standard error, prefixed with the program's name.
func Main(name string, run func(ctx context.Context, args []string) error) {
	err := run(context.Background(), os.Args[1:])
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
	}
	os.Exit(ExitCode(err))
}
