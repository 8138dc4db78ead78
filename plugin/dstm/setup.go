package dstm

import (
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

	"github.com/dstm-project/dstm/internal/tlsid"
)

const pluginName = "dstm"

func init() { plugin.Register(pluginName, setup) }

const (
	defaultHold    = 250 * time.Millisecond
	defaultMaxHeld = 10000

	// maxHold lies well under the 1.5 s after which common stub resolvers ask again.
	maxHold    = time.Second
	maxMaxHeld = 1_000_000
)

// builtinDeny are names whose answers say nothing about the host's need of IPv4: ipv4only.arpa is IPv4-only by design
// (RFC 7050, RFC 8880), reverse trees hold no hosts, local names (RFC 6761, RFC 6762) never leave the network.
var builtinDeny = [...]string{"ipv4only.arpa.", "in-addr.arpa.", "ip6.arpa.", "local.", "localhost."}

// config is one dstm block.
type config struct {
	clients    []netip.Prefix   // IPv6; whose queries are looked at
	to         []netip.AddrPort // the lease service
	tls        tlsid.Files
	serverName string
	hold       time.Duration // 0 = answers are never held
	maxHeld    int64         // queries worked on at once
	deny       plugin.Zones  // with everything below them
	native     []netip.Prefix
}

// key is equal for blocks that can share a connection and a host table.
func (c *config) key() string {
	return fmt.Sprintf("%v %v %q %q", c.clients, c.to, c.tls, c.serverName)
}

func setup(c *caddy.Controller) error {
	if err := checkOrder(dnsserver.Directives); err != nil {
		return plugin.Error(pluginName, err)
	}
	cfg, err := parse(c)
	if err != nil {
		return plugin.Error(pluginName, err)
	}
	server := dnsserver.GetConfig(c)
	for _, path := range []*string{&cfg.tls.Cert, &cfg.tls.Key, &cfg.tls.CA} {
		if !filepath.IsAbs(*path) && server.Root != "" {
			*path = filepath.Join(server.Root, *path)
		}
	}
	// A look before the start, so that a bad certificate is told with the place in the Corefile.
	if _, err := tlsid.Open(cfg.tls, tlsid.RoleResolver, slog.Default()); err != nil {
		return plugin.Error(pluginName, c.Errf("%v", err))
	}

	d := &DSTM{cfg: cfg, upstream: upstream.New()}
	c.OnStartup(func() error {
		cl, err := shared.acquire(cfg.key(), func() (*client, error) { return start(cfg) })
		if err != nil {
			return plugin.Error(pluginName, err)
		}
		d.client = cl
		return nil
	})
	c.OnRestart(func() error { shared.restarting(); return nil })
	c.OnRestartFailed(func() error { shared.restartFailed(); return nil })
	c.OnShutdown(func() error { shared.release(d.client); return nil })

	server.AddPlugin(func(next plugin.Handler) plugin.Handler {
		d.Next = next
		return d
	})
	return nil
}

// checkOrder refuses a build in which the plugin would not see what clients ask: below dns64 it takes synthesized
// answers for native ones, below cache it sees the first of many queries and the cache's own prefetches.
func checkOrder(directives []string) error {
	own := slices.Index(directives, pluginName)
	for _, below := range []string{"dns64", "cache"} {
		if at := slices.Index(directives, below); own < 0 || at >= 0 && at < own {
			return fmt.Errorf("the plugin must stand before %q in this build of CoreDNS: in plugin.cfg put the line "+
				"\"dstm:github.com/dstm-project/dstm/plugin/dstm\" before the line \"dns64:dns64\" and build again", below)
		}
	}
	return nil
}

// parse reads the one dstm block of a server block.
func parse(c *caddy.Controller) (*config, error) {
	cfg := &config{hold: defaultHold, maxHeld: defaultMaxHeld, deny: slices.Clone(builtinDeny[:])}
	for i := 0; c.Next(); i++ {
		if i > 0 {
			return nil, plugin.ErrOnce
		}
		if args := c.RemainingArgs(); len(args) > 0 {
			return nil, c.Errf("unexpected %q after dstm: want a block in braces", args[0])
		}
		seen := map[string]bool{}
		for c.NextBlock() {
			name := c.Val()
			if repeatable := name == "clients" || name == "deny" || name == "native"; seen[name] && !repeatable {
				return nil, c.Errf("%s is given twice: want one line", name)
			}
			seen[name] = true
			if err := cfg.property(c, name, c.RemainingArgs()); err != nil {
				return nil, err
			}
		}
		for _, name := range []string{"clients", "to", "tls", "tls_servername"} {
			if !seen[name] {
				return nil, c.Errf("%s is not given: it is required", name)
			}
		}
	}
	return cfg, nil
}

func (cfg *config) property(c *caddy.Controller, name string, args []string) (err error) {
	switch name {
	case "clients":
		cfg.clients, err = appendPrefixes(c, name, cfg.clients, args, netip.Addr.Is6, "IPv6 prefixes such as 2001:db8:1::/64")
	case "native":
		cfg.native, err = appendPrefixes(c, name, cfg.native, args, netip.Addr.Is4, "IPv4 prefixes such as 198.51.100.0/24")
	case "to":
		cfg.to, err = parseServers(c, args)
	case "tls":
		if len(args) != 3 {
			return c.Errf("tls has %d arguments: want three PEM files: CERT KEY CA", len(args))
		}
		cfg.tls = tlsid.Files{Cert: args[0], Key: args[1], CA: args[2]}
	case "tls_servername":
		if len(args) != 1 {
			return c.Errf("tls_servername has %d arguments: want the DNS name in the lease service's certificate", len(args))
		}
		cfg.serverName = args[0]
	case "hold":
		cfg.hold, err = parseHold(c, args)
	case "max_held":
		cfg.maxHeld, err = parseMaxHeld(c, args)
	case "deny":
		cfg.deny, err = appendNames(c, cfg.deny, args)
	default:
		return c.Errf("unknown property %q: want clients, to, tls, tls_servername, hold, max_held, deny or native", name)
	}
	return err
}

func appendPrefixes(c *caddy.Controller, name string, to []netip.Prefix, args []string, family func(netip.Addr) bool, want string) ([]netip.Prefix, error) {
	if len(args) == 0 {
		return nil, c.Errf("%s has no argument: want %s", name, want)
	}
	for _, arg := range args {
		p, err := netip.ParsePrefix(arg)
		switch {
		case err != nil || !family(p.Addr()) || p.Addr().Is4In6():
			return nil, c.Errf("%s %q: want %s", name, arg, want)
		case p != p.Masked():
			return nil, c.Errf("%s %q has bits set after its length: want %s", name, arg, p.Masked())
		}
		to = append(to, p)
	}
	return to, nil
}

func parseServers(c *caddy.Controller, args []string) (to []netip.AddrPort, err error) {
	const want = "want addresses with a port such as [2001:db8:2::10]:3545"
	if len(args) == 0 {
		return nil, c.Errf("to has no argument: %s", want)
	}
	for _, arg := range args {
		a, err := netip.ParseAddrPort(arg)
		if err != nil || a.Port() == 0 {
			return nil, c.Errf("to %q: %s", arg, want)
		}
		to = append(to, a)
	}
	return to, nil
}

func parseHold(c *caddy.Controller, args []string) (time.Duration, error) {
	if len(args) != 1 {
		return 0, c.Errf("hold has %d arguments: want one duration from 0s to %s", len(args), maxHold)
	}
	d, err := time.ParseDuration(args[0])
	if err != nil || d < 0 || d > maxHold {
		return 0, c.Errf("hold %q: want a duration from 0s (answers are never held) to %s", args[0], maxHold)
	}
	return d, nil
}

func parseMaxHeld(c *caddy.Controller, args []string) (int64, error) {
	if len(args) != 1 {
		return 0, c.Errf("max_held has %d arguments: want one number from 1 to %d", len(args), maxMaxHeld)
	}
	n, err := strconv.ParseInt(args[0], 10, 64)
	if err != nil || n < 1 || n > maxMaxHeld {
		return 0, c.Errf("max_held %q: want a number from 1 to %d", args[0], maxMaxHeld)
	}
	return n, nil
}

func appendNames(c *caddy.Controller, to plugin.Zones, args []string) (plugin.Zones, error) {
	if len(args) == 0 {
		return nil, c.Errf("deny has no argument: want domain names")
	}
	for _, arg := range args {
		if _, ok := dns.IsDomainName(arg); !ok || strings.Trim(arg, ".") == "" {
			return nil, c.Errf("deny %q: want a domain name below the root; everything below it is denied as well", arg)
		}
		to = append(to, dns.CanonicalName(arg))
	}
	return to, nil
}
