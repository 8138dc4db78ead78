package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/dstm-project/dstm/internal/daemon"
)

func (a *app) tepCommand() *cobra.Command {
	return group("tep", "Look at gateways and take them out", a.tepList(), a.tepFence(), a.tepRemove())
}

func (a *app) tepList() *cobra.Command {
	return a.remote(&cobra.Command{Use: "ls", Short: "List the gateways as the lease service sees them", Args: noArgs},
		func(ctx context.Context, op operator, _ []string) error {
			infos, err := op.TEPs(ctx)
			if err != nil {
				return err
			}
			ts := views(infos, viewTEP)
			if a.json {
				return a.printJSON("dstm.tep/1", struct {
					TEPs []tepView `json:"teps"`
				}{ts})
			}
			rows := make([][]string, 0, len(ts))
			for _, t := range ts {
				fenced := t.Fenced
				if fenced == "" {
					fenced = "-"
				}
				rows = append(rows, []string{
					t.ID, yesNo(t.Connected), yesNo(t.Serving), fmt.Sprint(t.Session), fmt.Sprintf("%d/%d", t.AckedRev, t.HeadRev),
					left(time.Duration(t.DeadlineMS) * time.Millisecond), fenced,
				})
			}
			return table(a.out, []string{"ID", "CONNECTED", "SERVING", "SESSION", "ACKED/HEAD", "DEADLINE", "FENCED"}, rows)
		})
}

// tepResult is what fence and remove print as JSON.
type tepResult struct {
	ID   string `json:"id"`
	Done string `json:"done"` // fenced or removed
}

func (a *app) tepFence() *cobra.Command {
	off := false
	cmd := a.remote(&cobra.Command{
		Use: "fence ID", Short: "Vouch for a gateway being off, so that nothing waits for it",
		Long: "Addresses are reused only once every gateway has let go of them or is known to have stopped. Of one that is off for " +
			"good and that no other gateway can speak for, the lease service learns that by time alone: fail_static after it was " +
			"last heard. This command gives your word for it instead. If the gateway still forwards, two hosts may get one address.",
		Args: oneArg("gateway id"),
	}, func(ctx context.Context, op operator, args []string) error {
		if !off {
			return daemon.Usage(errors.New("--is-off is missing: it says that the gateway has no power or no network, which only you can know"))
		}
		if err := op.FenceTEP(ctx, args[0]); err != nil {
			return err
		}
		return a.tepDone(args[0], "fenced")
	})
	cmd.Flags().BoolVar(&off, "is-off", false, "the gateway has no power or no network")
	return cmd
}

func (a *app) tepRemove() *cobra.Command {
	return a.remote(&cobra.Command{Use: "remove ID", Short: "Take a gateway that is fenced off the list", Args: oneArg("gateway id")},
		func(ctx context.Context, op operator, args []string) error {
			if err := op.RemoveTEP(ctx, args[0]); err != nil {
				return err
			}
			return a.tepDone(args[0], "removed")
		})
}

func (a *app) tepDone(id, done string) error {
	if a.json {
		return a.printJSON("dstm.tep/1", tepResult{id, done})
	}
	_, err := fmt.Fprintf(a.out, "%s %s\n", id, done)
	return err
}
