package main

import (
	"bufio"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/dstm-project/dstm/internal/daemon"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/leaseclient"
	"github.com/dstm-project/dstm/leasesvc/store"
	"github.com/dstm-project/dstm/leasesvc/store/boltstore"
)

// auditSchema names the lines of an export.
const auditSchema = "dstm.audit/1"

// auditLine is one line of an export.
type auditLine struct {
	Rev   uint64    `json:"rev"`
	Time  time.Time `json:"time"`
	Event string    `json:"event"` // bound, unbound, fenced
	portSet
	Gen     string `json:"gen"`
	Host    string `json:"host,omitempty"`
	Source  string `json:"source,omitempty"`
	TEP     string `json:"tep,omitempty"`
	Trigger string `json:"trigger,omitempty"`
	End     string `json:"end,omitempty"`
	Chain   string `json:"chain,omitempty"`
}

func viewAudit(ev leaseclient.AuditEvent) auditLine {
	l := auditLine{
		Rev: uint64(ev.Rev), Time: ev.At.UTC(), Event: ev.Kind, portSet: viewPorts(ev.Resource), Gen: genText(ev.Gen),
		Chain: hex.EncodeToString(ev.Chain),
	}
	switch ev.Kind {
	case "bound":
		l.Host, l.Source, l.TEP, l.Trigger = ev.HostID, addrText(ev.Host), addrText(ev.TEP), ev.Trigger.String()
	case "unbound":
		l.End = ev.End.String()
	}
	return l
}

func (a *app) auditCommand() *cobra.Command {
	return group("audit", "Take out and check the record of who had what", a.auditExportCommand(), a.auditVerifyCommand())
}

func (a *app) auditExportCommand() *cobra.Command {
	var from, to string
	var after uint64
	var r leaseclient.AuditRange
	cmd := a.stream(&cobra.Command{
		Use: "export", Short: "Print the audit log, one JSON object in each line", Args: noArgs,
		Long: "Print the audit log in order of revision, one JSON object in each line: a line when a lease is bound, one when it " +
			"ends, one when no gateway forwards for it any more. To go on where an export ended, give --after the rev of its last line.",
	}, func(ctx context.Context, op operator, _ []string) (err error) {
		if r.From, err = a.parseTime("--from", from); err != nil {
			return err
		}
		if r.To, err = a.parseTime("--to", to); err != nil {
			return err
		}
		if r.Follow && to != "" {
			return daemon.Usage(errors.New("--follow does not end, --to does: want one of them"))
		}
		r.After = lease.Rev(after)
		return a.exportAudit(ctx, op, r)
	})
	f := cmd.Flags()
	f.StringVar(&from, "from", "", "only events at or after this `time`, as 2026-01-02T15:04:05Z, 15:04:05 (today, UTC), or a duration ago such as 24h")
	f.StringVar(&to, "to", "", "only events before this `time`")
	f.Uint64Var(&after, "after", 0, "only events after this `revision`")
	f.BoolVar(&r.Follow, "follow", false, "go on with what is written from now on")
	return cmd
}

// exportAudit prints lines; with Follow each as soon as it comes.
func (a *app) exportAudit(ctx context.Context, op operator, r leaseclient.AuditRange) error {
	w := bufio.NewWriter(a.out)
	err := op.AuditExport(ctx, r, func(ev leaseclient.AuditEvent) error {
		b, err := daemon.MarshalSchema(auditSchema, viewAudit(ev))
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(w, "%s\n", b)
		if r.Follow {
			err = errors.Join(err, w.Flush())
		}
		return err
	})
	return errors.Join(err, w.Flush())
}

func (a *app) auditVerifyCommand() *cobra.Command {
	var exported string
	cmd := &cobra.Command{
		Use: "verify FILE", Short: "Check the chain of the audit log in a copy of the store", Args: oneArg("file"),
		Long: "Check that nothing in the audit log of a store file was changed, cut or reordered; with --export also that it is " +
			"the log of which an export was made before. A store that is in use cannot be checked: take a backup or a copy.",
		RunE: func(_ *cobra.Command, args []string) error { return a.verifyAudit(args[0], exported) },
	}
	cmd.Flags().StringVar(&exported, "export", "", "`file` with lines of dstm audit export")
	return cmd
}

func (a *app) verifyAudit(path, exported string) error {
	against := &lines{}
	if exported != "" {
		f, err := os.Open(exported)
		if err != nil {
			return daemon.Usage(err)
		}
		defer f.Close()
		against.in = json.NewDecoder(bufio.NewReader(f))
	}
	rep, err := boltstore.Check(path, against.compare)
	if err == nil {
		err = against.end(rep.Last)
	}
	if err := errors.Join(append(rep.Problems, err)...); err != nil {
		return err
	}
	v := struct {
		Events   int       `json:"events"`
		Leases   int       `json:"leases"`
		From     time.Time `json:"from,omitzero"`
		Head     uint64    `json:"head_rev"`
		Chain    string    `json:"chain"`
		Exported int       `json:"exported_lines,omitempty"`
	}{rep.Events, rep.Leases, rep.First.UTC(), uint64(rep.Newest), hex.EncodeToString(rep.Chain[:]), against.n}
	if a.json {
		return a.printJSON("dstm.audit.verify/1", v)
	}
	_, err = fmt.Fprintf(a.out, "%s: audit log is whole: %d events of %d leases since %s, chain %s at revision %d\n",
		path, v.Events, v.Leases, dash(exact(v.From)), v.Chain, v.Head)
	if err == nil && exported != "" {
		_, err = fmt.Fprintf(a.out, "%s: %d lines are of this log\n", exported, v.Exported)
	}
	return err
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// lines are those of an export, which are compared with a log.
type lines struct {
	in   *json.Decoder // nil = none
	next *auditLine
	seen uint64 // rev of the newest line
	n    int    // lines that were compared
}

// compare takes an event of the log. Lines of what is pruned are passed over.
func (l *lines) compare(ev store.AuditEvent) error {
	if ev.Chain == (store.Chain{}) {
		return nil
	}
	for l.in != nil {
		if err := l.read(); err != nil || l.next == nil || l.next.Rev > uint64(ev.Rev) {
			return err
		}
		line := *l.next
		l.next = nil
		if line.Rev < uint64(ev.Rev) {
			if l.n > 0 {
				return fmt.Errorf("exported line %d is not in the log", line.Rev)
			}
			continue // pruned
		}
		l.n++
		if chain := hex.EncodeToString(ev.Chain[:]); line.Chain != "" && line.Chain != chain {
			return fmt.Errorf("exported line %d has the chain %s, the log has %s: it is not the log of which the export was made", line.Rev, line.Chain, chain)
		}
		return nil
	}
	return nil
}

// read fetches the next line, if there is one.
func (l *lines) read() error {
	if l.next != nil {
		return nil
	}
	var line auditLine
	err := l.in.Decode(&line)
	switch {
	case errors.Is(err, io.EOF):
		return nil
	case err != nil:
		return fmt.Errorf("export behind line %d: %w", l.seen, err)
	case line.Rev <= l.seen:
		return fmt.Errorf("exported line %d behind %d: want them in order", line.Rev, l.seen)
	}
	l.next, l.seen = &line, line.Rev
	return nil
}

// end sees to it that all lines are of the log, which ends at a revision.
func (l *lines) end(last lease.Rev) error {
	if l.in == nil {
		return nil
	}
	if err := l.read(); err != nil || l.next == nil {
		return err
	}
	return fmt.Errorf("exported line %d is not in the log, which ends at revision %d", l.next.Rev, last)
}
