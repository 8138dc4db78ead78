package policy

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/dstm-project/dstm/internal/config"
)

// Limits of the configuration.
const (
	minBudget  = time.Millisecond
	maxBudget  = 500 * time.Millisecond
	maxRules   = 256
	maxPlugins = 8
	maxBinds   = 1_000_000
	// maxDir bounds dir and the name of a plugin together, in bytes: the path of a unix socket has at most 107 (unix(7)),
	// and go-plugin adds two names of its own.
	maxDir = 60
)

// Config is the section policy of leasesvc.yaml; deploy/leasesvc.yaml explains every key.
type Config struct {
	Budget  time.Duration  `yaml:"budget"` // for one decision; 1 ms to 500 ms
	Dir     string         `yaml:"dir"`    // for the sockets of plugins, of this service alone
	Rules   []Rule         `yaml:"rules"`
	Quotas  QuotasConfig   `yaml:"quotas"`
	Plugins []PluginConfig `yaml:"plugins"`
}

// Rule allows or denies what all of its conditions match. A condition without entries matches everything. Later rules do not
// count for what a rule matches; quotas and plugins do.
type Rule struct {
	Action    Verdict        `yaml:"action"`
	Name      string         `yaml:"name"`
	Hosts     []Glob         `yaml:"hosts"`
	Sources   []netip.Prefix `yaml:"sources"`
	Pools     []string       `yaml:"pools"`
	Triggers  []Trigger      `yaml:"triggers"`
	Schedules []Schedule     `yaml:"schedules"`
	Reason    string         `yaml:"reason"` // of a denial; empty = "denied by rule NAME"
}

// Schedule is a part of each week.
type Schedule struct {
	Days []Days    `yaml:"days"` // empty = every day
	From TimeOfDay `yaml:"from"`
	To   TimeOfDay `yaml:"to"`   // not included; before From = on the next day; 0 = the end of the day
	Zone Zone      `yaml:"zone"` // of Days, From and To
}

// QuotasConfig limits new leases.
type QuotasConfig struct {
	PerHost Quota `yaml:"per_host"` // identity
	Per64   Quota `yaml:"per_64"`   // all hosts of a /64 together
}

// Quota allows Binds new leases at once, and as many again over each Window, a few at a time. No Binds = no limit.
type Quota struct {
	Binds  int           `yaml:"binds"`
	Window time.Duration `yaml:"window"`
}

func (q Quota) String() string { return fmt.Sprintf("%d new leases in %s", q.Binds, q.Window) }

// PluginConfig is one external policy.
type PluginConfig struct {
	Name      string        `yaml:"name"`
	Path      string        `yaml:"path"`
	SHA256    Digest        `yaml:"sha256"` // of the program
	Args      []string      `yaml:"args"`
	OnFailure OnFailure     `yaml:"on_failure"`
	Budget    time.Duration `yaml:"budget"` // 0 = that of the policy
}

// Defaults sets the defaults.
func (c *Config) Defaults() {
	c.Budget = 50 * time.Millisecond
	c.Dir = "/run/dstm-leasesvc"
}

// Check reports what is wrong with the section at the path at, such as "$.policy". pools are the pools that there are.
func (c *Config) Check(r *config.Report, at string, pools []string) {
	if c.Budget < minBudget || c.Budget > maxBudget {
		r.Errorf(at+".budget", "budget %s is outside %s..%s", c.Budget, minBudget, maxBudget)
	}
	if n := len(c.Rules); n > maxRules {
		r.Errorf(at+".rules", "%d rules: want at most %d", n, maxRules)
	}
	for i, u := range c.Rules {
		u.check(r, fmt.Sprintf("%s.rules[%d]", at, i), i+1, pools)
	}
	c.Quotas.PerHost.check(r, at+".quotas.per_host", "per_host")
	c.Quotas.Per64.check(r, at+".quotas.per_64", "per_64")
	c.checkPlugins(r, at)
}

func (u Rule) check(r *config.Report, at string, n int, pools []string) {
	if u.Action != Allow && u.Action != Deny {
		r.Errorf(at, "rule %d has no action: want allow or deny", n)
	}
	if u.Reason != Clean(u.Reason, MaxReason) {
		r.Errorf(at+".reason", "rule %d: reason: want one line of at most %d bytes", n, MaxReason)
	}
	for i, p := range u.Sources {
		if !p.Addr().Is6() || p != p.Masked() {
			r.Errorf(fmt.Sprintf("%s.sources[%d]", at, i), "rule %d: source %s: want an IPv6 prefix without host bits", n, p)
		}
	}
	for i, p := range u.Pools {
		if !slices.Contains(pools, p) {
			r.Errorf(fmt.Sprintf("%s.pools[%d]", at, i), "rule %d: there is no pool %q", n, p)
		}
	}
	for i, s := range u.Schedules {
		if s.From == endOfDay || s.From == s.To && s.From != 0 {
			r.Errorf(fmt.Sprintf("%s.schedules[%d]", at, i), "rule %d: schedule from %s to %s is empty", n, s.From, s.To)
		}
	}
}

func (q Quota) check(r *config.Report, at, name string) {
	const shortest, longest = time.Second, 24 * time.Hour
	switch {
	case q.Binds < 0 || q.Binds > maxBinds:
		r.Errorf(at+".binds", "%s: binds %d is outside 0..%d", name, q.Binds, maxBinds)
	case q.Binds == 0 && q.Window != 0:
		r.Errorf(at, "%s: binds is not set: want how many new leases a window has", name)
	case q.Binds > 0 && (q.Window < shortest || q.Window > longest):
		r.Errorf(at+".window", "%s: window %s is outside %s..%s", name, q.Window, shortest, longest)
	}
}

func (c *Config) checkPlugins(r *config.Report, at string) {
	if n := len(c.Plugins); n > maxPlugins {
		r.Errorf(at+".plugins", "%d plugins: want at most %d", n, maxPlugins)
	}
	if len(c.Plugins) > 0 && !filepath.IsAbs(c.Dir) {
		r.Errorf(at+".dir", "dir %q: want an absolute path", c.Dir)
	}
	name := regexp.MustCompile(`^[a-z0-9][a-z0-9-]*$`)
	for i, p := range c.Plugins {
		at := fmt.Sprintf("%s.plugins[%d]", at, i)
		switch {
		case !name.MatchString(p.Name):
			r.Errorf(at+".name", "plugin %d: name %q: want letters a to z, digits and -", i+1, p.Name)
		case slices.ContainsFunc(c.Plugins[:i], func(o PluginConfig) bool { return o.Name == p.Name }):
			r.Errorf(at+".name", "plugin name %q is used twice", p.Name)
		case len(c.Dir)+len(p.Name) > maxDir:
			r.Errorf(at+".name", "plugin %q: name and dir %s have more than %d bytes together", p.Name, c.Dir, maxDir)
		}
		p.check(r, at, c.Budget)
	}
}

func (p PluginConfig) check(r *config.Report, at string, budget time.Duration) {
	if err := checkProgram(p.Path); err != nil {
		r.Errorf(at+".path", "plugin %q: path: %v", p.Name, err)
	}
	if p.SHA256 == (Digest{}) {
		r.Errorf(at, "plugin %q: sha256 is not set: want what `sha256sum %s` prints", p.Name, p.Path)
	}
	for i, a := range p.Args {
		if strings.ContainsRune(a, 0) {
			r.Errorf(fmt.Sprintf("%s.args[%d]", at, i), "plugin %q: argument %d has a zero byte", p.Name, i+1)
		}
	}
	if p.OnFailure == 0 {
		r.Errorf(at, "plugin %q: on_failure is not set: want open (leases without it) or closed (none)", p.Name)
	}
	if p.Budget != 0 && (p.Budget < minBudget || p.Budget > budget) {
		r.Errorf(at+".budget", "plugin %q: budget %s is outside %s..%s, the policy's budget", p.Name, p.Budget, minBudget, budget)
	}
}

func checkProgram(path string) error {
	if !filepath.IsAbs(path) {
		return fmt.Errorf("%q: want the absolute path of a program", path)
	}
	st, err := os.Stat(path)
	switch {
	case err != nil:
		return err
	case !st.Mode().IsRegular() || st.Mode()&0o111 == 0:
		return fmt.Errorf("%s has mode %s: want a file that can be executed", path, st.Mode())
	}
	return nil
}
