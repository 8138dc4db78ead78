package dstm

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/pkg/upstream"
	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/dstm-project/dstm/internal/tlsid"
	"github.com/dstm-project/dstm/leasesvc/leaseclient"
)

const (
	name = "dstm"

	defaultHold = 250 * time.Millisecond
	// maxHold lies below the 1.5 s that stub resolvers were seen to wait without asking again.
	maxHold = time.Second

	defaultMaxHeld = 10_000
	limitMaxHeld   = 1_000_000
)

// init registers the plugin, which CoreDNS wants done here. The closure owns what the whole process shares: the clients
// of lease services, which outlive reloads, and the metrics.
func init() {
	shared := newClients(dial, newMetrics(prometheus.DefaultRegisterer))
	plugin.Register(name, shared.setup)
}

// config is one dstm block of a Corefile.
type config struct {
	clients []netip.Prefix   // hosts that may be served
	to      []netip.AddrPort // the lease service
	tls     tlsid.Files
	server  string // name in the lease service's certificate
	hold    time.Duration
	maxHeld int
	deny    plugin.Zones   // names that are never looked at, lower case and absolute
	native  []netip.Prefix // IPv4 that is reached without us
}

// key names what blocks must have in common to share one client.
func (c *config) key() string {
	return fmt.Sprint(c.to, c.tls, c.server, c.clients)
}

func (cs *clients) setup(c *caddy.Controller) error {
	if err := checkOrder(dnsserver.Directives); err != nil {
		return plugin.Error(name, err)
	}
	cfg, err := parse(c)
	if err != nil {
		return plugin.Error(name, err)
	}
	// Opened here, so that a bad file fails the reload with its reason and the old configuration goes on.
	src, err := tlsid.Open(cfg.tls, tlsid.RoleResolver, slog.New(logHandler{}))
	if err != nil {
		return plugin.Error(name, c.Errf("tls: %v", err))
	}
	src.Count(cs.met.tls)

	d := &DSTM{cfg: cfg, lookup: upstream.New().Lookup, met: cs.met}
	var release func()
	c.OnStartup(func() error {
		cl, done, err := cs.acquire(cfg, src)
		if err != nil {
			return plugin.Error(name, err)
		}
		d.client, release = cl, done
		return nil
	})
	// On a reload the order is: OnRestart of the old, setup and OnStartup of the new, OnShutdown of the old. After a bad
	// reload the old one gets OnRestartFailed, and the new one, if it came as far as OnStartup, gets nothing.
	c.OnRestart(func() error { cs.restarting(); return nil })
	c.OnRestartFailed(func() error { cs.restartFailed(); return nil })
	c.OnShutdown(func() error {
		cs.restarted()
		if release != nil {
			release()
		}
		return nil
	})
	dnsserver.GetConfig(c).AddPlugin(func(next plugin.Handler) plugin.Handler {
		d.Next = next
		return d
	})
	return nil
}

// checkOrder refuses a build in which the plugin stands where it cannot work: below dns64 it would lease for look-ups
// that dns64 makes on its own, below cache it would see the first of N queries only.
func checkOrder(directives []string) error {
	own := slices.Index(directives, name)
	for _, below := range []string{"dns64", "siit", "cache"} {
		if at := slices.Index(directives, below); at >= 0 && own > at {
			return fmt.Errorf("plugin order: dstm stands after %s in this build of CoreDNS: it must stand before dns64, siit and cache; "+
				"put the line \"dstm:github.com/dstm-project/dstm/plugin/dstm\" before \"dns64:dns64\" in plugin.cfg, run go generate and build again", below)
		}
	}
	return nil
}

// defaultDeny are names whose answers mean something else than "reach this by IPv4": RFC 7050 (ipv4only.arpa), RFC 6761,
// RFC 6762, RFC 7686, RFC 8375, and the reverse trees.
func defaultDeny() plugin.Zones {
	return plugin.Zones{
		"ipv4only.arpa.", "in-addr.arpa.", "ip6.arpa.", "home.arpa.", "resolver.arpa.",
		"localhost.", "local.", "invalid.", "test.", "onion.", "internal.",
	}
}

// parse reads the blocks of one server block. It looks at nothing but the Corefile.
func parse(c *caddy.Controller) (*config, error) {
	var cfg *config
	for c.Next() {
		if cfg != nil {
			return nil, c.Errf("second dstm in one server block: want one")
		}
		if args := c.RemainingArgs(); len(args) > 0 {
			return nil, c.Errf("unexpected argument %q: dstm takes a block only", args[0])
		}
		cfg = &config{hold: defaultHold, maxHeld: defaultMaxHeld, deny: defaultDeny()}
		seen := map[string]bool{}
		for c.NextBlock() {
			key := c.Val()
			if seen[key] && key != "deny" && key != "native" && key != "clients" {
				return nil, c.Errf("%s is given twice: want it once", key)
			}
			seen[key] = true
			if err := cfg.directive(c, key, c.RemainingArgs()); err != nil {
				return nil, err
			}
		}
		for _, must := range []string{"clients", "to", "tls"} {
			if !seen[must] {
				return nil, c.Errf("%s is missing: %s", must, usage(must))
			}
		}
		if cfg.server == "" {
			if len(cfg.to) > 1 {
				return nil, c.Errf("tls_servername is missing: with %d servers in \"to\" it must say which name their certificates carry", len(cfg.to))
			}
			cfg.server = cfg.to[0].Addr().String()
		}
	}
	return cfg, nil
}

// usage says what a directive wants.
func usage(key string) string {
	switch key {
	case "clients":
		return "want one or more IPv6 prefixes such as 2001:db8:1::/64"
	case "to":
		return "want one or more addresses with port such as [2001:db8:2::10]:3545 (a name would have to be resolved by this very server)"
	case "tls":
		return "want the files CERT KEY CA of an identity with role resolver"
	case "tls_servername":
		return "want the one name that the lease service's certificate carries"
	case "hold":
		return fmt.Sprintf("want one duration from 0 (off) to %v", maxHold)
	case "max_held":
		return fmt.Sprintf("want one number from 1 to %d", limitMaxHeld)
	case "deny":
		return "want one or more domain names"
	default:
		return "want one or more IPv4 prefixes such as 10.0.0.0/8"
	}
}

func (cfg *config) directive(c *caddy.Controller, key string, args []string) error {
	bad := func(given string, why error) error {
		if why != nil {
			return c.Errf("%s: %q: %v: %s", key, given, why, usage(key))
		}
		return c.Errf("%s: %q: %s", key, given, usage(key))
	}
	if !slices.Contains([]string{"clients", "to", "tls", "tls_servername", "hold", "max_held", "deny", "native"}, key) {
		return c.Errf("unknown property %q: want clients, to, tls, tls_servername, hold, max_held, deny or native", key)
	}
	if want := map[string]int{"tls": 3, "tls_servername": 1, "hold": 1, "max_held": 1}[key]; len(args) == 0 || want > 0 && len(args) != want {
		return c.Errf("%s has %d arguments: %s", key, len(args), usage(key))
	}
	switch key {
	case "clients", "native":
		for _, a := range args {
			p, err := netip.ParsePrefix(a)
			switch {
			case err != nil:
				return bad(a, nil)
			case p != p.Masked():
				return bad(a, fmt.Errorf("bits are set behind the prefix length, %v was probably meant", p.Masked()))
			case p.Addr().Is6() != (key == "clients") || p.Addr().Is4In6():
				return bad(a, errors.New("wrong address family"))
			case key == "clients":
				cfg.clients = append(cfg.clients, p)
			default:
				cfg.native = append(cfg.native, p)
			}
		}
	case "to":
		for _, a := range args {
			ap, err := netip.ParseAddrPort(a)
			if err != nil || ap.Port() == 0 {
				return bad(a, nil)
			}
			cfg.to = append(cfg.to, ap)
		}
	case "tls":
		root := dnsserver.GetConfig(c).Root
		for i, f := range []*string{&cfg.tls.Cert, &cfg.tls.Key, &cfg.tls.CA} {
			if *f = args[i]; root != "" && !filepath.IsAbs(args[i]) {
				*f = filepath.Join(root, args[i])
			}
		}
	case "tls_servername":
		cfg.server = args[0]
	case "hold":
		d, err := time.ParseDuration(args[0])
		if err != nil || d < 0 || d > maxHold {
			return bad(args[0], nil)
		}
		cfg.hold = d
	case "max_held":
		n, err := strconv.Atoi(args[0])
		if err != nil || n < 1 || n > limitMaxHeld {
			return bad(args[0], nil)
		}
		cfg.maxHeld = n
	case "deny":
		for _, a := range args {
			if _, ok := dns.IsDomainName(a); !ok {
				return bad(a, nil)
			}
			cfg.deny = append(cfg.deny, strings.ToLower(dns.Fqdn(a)))
		}
	}
	return nil
}

// dial connects to the lease service over TLS.
func dial(cfg *config, src *tlsid.Source) (service, error) {
	conn, err := leaseclient.New(leaseclient.Options{Servers: cfg.to, TLS: src.Client(cfg.server), Identity: src})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := src.Watch(ctx); err != nil && ctx.Err() == nil {
			log.Errorf("TLS files are no longer watched: %v", err)
		}
	}()
	return &remote{conn: conn, stop: func() { cancel(); <-done }}, nil
}

// remote is the lease service behind a connection.
type remote struct {
	conn *leaseclient.Conn
	stop func()
}

func (r *remote) WatchHosts(ctx context.Context, clients []netip.Prefix) (watch, error) {
	w, err := r.conn.WatchHosts(ctx, clients)
	if err != nil {
		return nil, err // not w: a nil *Watch is no nil watch
	}
	return w, nil
}

func (r *remote) Hint(ctx context.Context, source netip.Addr) (hintReply, error) {
	res, reason, left, err := r.conn.Hint(ctx, source)
	return hintReply{res, reason, left}, err
}

func (r *remote) Close() error {
	r.stop()
	return r.conn.Close()
}
