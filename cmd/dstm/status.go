package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/dstm-project/dstm/internal/daemon"
)

// maxPage bounds what a daemon may answer, in bytes: a whole table of a gateway fits.
const maxPage = 64 << 20

// source is one local daemon that may be asked.
type source struct {
	daemon string
	addr   netip.AddrPort
}

// page is one daemon's answer.
type page struct {
	Daemon string          `json:"daemon"`
	Addr   string          `json:"addr"`
	Error  string          `json:"error,omitempty"`
	Body   json.RawMessage `json:"body,omitempty"`
	absent bool            // nobody listens there
}

func (a *app) statusCommand() *cobra.Command {
	return a.local(&cobra.Command{
		Use: "status", Short: "Show the state of the daemons on this machine",
		Long: "Ask each daemon that runs on this machine for its state: dstmd, tepd, leasesvc.",
	}, "/status", "dstm.status/1", func(c Admin) []source {
		return []source{{"dstmd", c.Host}, {"tepd", c.TEP}, {"leasesvc", c.LeaseService}}
	})
}

func (a *app) dropsCommand() *cobra.Command {
	return a.local(&cobra.Command{
		Use: "drops", Short: "Show why packets were dropped on this machine",
	}, "/drops", "dstm.drops/1", func(c Admin) []source {
		return []source{{"dstmd", c.Host}, {"tepd", c.TEP}}
	})
}

func (a *app) bgpCommand() *cobra.Command {
	return a.local(&cobra.Command{
		Use: "bgp", Short: "Show the BGP sessions and routes of the gateway on this machine",
	}, "/bgp", "dstm.bgp/1", func(c Admin) []source { return []source{{"tepd", c.TEP}} })
}

// local makes a command one that asks the daemons of this machine.
func (a *app) local(cmd *cobra.Command, path, schema string, which func(Admin) []source) *cobra.Command {
	var admin []string
	cmd.Flags().StringSliceVar(&admin, "admin", nil, "ask this admin `address:port` and no other (repeatable)")
	cmd.Args = noArgs
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		c, err := a.load(cmd)
		if err != nil {
			return err
		}
		from := which(c.Admin)
		if len(admin) > 0 {
			from = nil
		}
		for _, v := range admin {
			ap, err := netip.ParseAddrPort(v)
			if err != nil {
				return daemon.Usage(fmt.Errorf("--admin %q is not ADDRESS:PORT, for example [::1]:9546", v))
			}
			from = append(from, source{"daemon", ap})
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), a.timeout)
		defer cancel()
		return a.showPages(ctx, path, schema, from, len(admin) > 0)
	}
	return cmd
}

// showPages prints what every daemon answers. A daemon that does not run is passed over, unless it was asked for by
// address or none runs at all.
func (a *app) showPages(ctx context.Context, path, schema string, from []source, named bool) error {
	var pages []page
	var errs []error
	var tried []string
	for _, s := range from {
		tried = append(tried, fmt.Sprintf("%s at %s", s.daemon, s.addr))
		p := fetch(ctx, s, path)
		switch {
		case p.absent && !named:
			continue
		case p.Error != "":
			errs = append(errs, fmt.Errorf("%s at %s: %s", s.daemon, s.addr, p.Error))
		}
		pages = append(pages, p)
	}
	if len(pages) == 0 {
		return fmt.Errorf("no daemon answers: tried %s", strings.Join(tried, ", "))
	}
	if a.json {
		return errors.Join(append(errs, a.printJSON(schema, struct {
			Daemons []page `json:"daemons"`
		}{pages}))...)
	}
	for i, p := range pages {
		if p.Error != "" {
			continue
		}
		if i > 0 {
			fmt.Fprintln(a.out)
		}
		fmt.Fprintf(a.out, "%s %s\n", p.Daemon, p.Addr)
		if err := render(a.out, p.Body); err != nil {
			errs = append(errs, fmt.Errorf("%s at %s: %w", p.Daemon, p.Addr, err))
		}
	}
	return errors.Join(errs...)
}

func fetch(ctx context.Context, s source, path string) page {
	p := page{Daemon: s.daemon, Addr: s.addr.String()}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+s.addr.String()+path, nil)
	if err != nil {
		p.Error = err.Error()
		return p
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}} // no proxy: this is loopback
	resp, err := client.Do(req)
	if err != nil {
		var op *net.OpError
		p.absent = errors.Is(err, syscall.ECONNREFUSED)
		if p.Error = err.Error(); errors.As(err, &op) {
			p.Error = op.Err.Error()
		}
		return p
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxPage))
	switch {
	case err != nil:
		p.Error = err.Error()
	case resp.StatusCode != http.StatusOK:
		p.Error = fmt.Sprintf("%s answers %s: %s", path, resp.Status, strings.TrimSpace(string(b)))
	case !json.Valid(b):
		p.Error = path + " does not answer with JSON"
	default:
		p.Body = b
		var named struct {
			Schema string `json:"schema"`
		}
		if json.Unmarshal(b, &named) == nil && s.daemon == "daemon" && named.Schema != "" {
			p.Daemon = named.Schema
		}
	}
	return p
}
