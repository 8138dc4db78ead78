package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/dstm-project/dstm/internal/daemon"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/leaseclient"
)

var update = flag.Bool("update", os.Getenv("DSTM_UPDATE") == "1", "write the golden files")

var noon = time.Date(2026, 1, 2, 12, 0, 0, 0, time.UTC)

// fake is a lease service that says what a test put into it and notes what it was asked.
type fake struct {
	err     error
	who     []leaseclient.Holding
	config  Config
	revoked lease.Ref
	tep     string // what was done to which gateway
	at      time.Time
	asked   leaseclient.AuditRange
	events  []leaseclient.AuditEvent
	backup  func(io.Writer) error
}

func ref(addr string, gen lease.Gen) lease.Ref {
	return lease.Ref{Resource: lease.Whole(netip.MustParseAddr(addr)), Gen: gen}
}

var (
	host1 = netip.MustParseAddr("2001:db8:1::a")
	host2 = netip.MustParseAddr("2001:db8:1::b")

	tepAddr = netip.MustParseAddr("2001:db8:a::1")
)

func (f *fake) Leases(_ context.Context, pool string) ([]leaseclient.LeaseInfo, error) {
	return []leaseclient.LeaseInfo{
		{Ref: ref("198.51.100.1", lease.MakeGen(1, 42)), State: "BOUND", HostID: "host1", Host: host1, Pool: pool, Left: 10 * time.Minute, Bound: noon.Add(-time.Hour)},
		{Ref: ref("198.51.100.2", lease.MakeGen(1, 7)), State: "REVOKING", HostID: "host2", Host: host2, Pool: pool, Waiting: []string{"tep1", "tep2"}},
		{Ref: ref("198.51.100.3", 0), State: "RESERVED", HostID: "host3", Pool: pool, Left: 9 * time.Second},
	}, f.err
}

func (f *fake) Who(_ context.Context, _ netip.Addr, _ uint16, at time.Time) ([]leaseclient.Holding, error) {
	f.at = at
	return f.who, f.err
}

func (f *fake) Pools(context.Context) ([]leaseclient.PoolInfo, error) {
	return pools(), f.err
}

func (f *fake) TEPs(context.Context) ([]leaseclient.TEPInfo, error) {
	return []leaseclient.TEPInfo{
		{ID: "tep1", Connected: true, Serving: true, Session: 3, Acked: 42, Head: 42, DeadlineLeft: 4 * time.Hour},
		{ID: "tep2", Session: 1, Acked: 7, Head: 42, Fenced: "witness"},
	}, f.err
}

func (f *fake) Revoke(_ context.Context, r lease.Ref) error {
	f.revoked = r
	return f.err
}

func (f *fake) FenceTEP(_ context.Context, id string) error {
	f.tep = "fence " + id
	return f.err
}

func (f *fake) RemoveTEP(_ context.Context, id string) error {
	f.tep = "remove " + id
	return f.err
}

func (f *fake) AuditExport(_ context.Context, r leaseclient.AuditRange, yield func(leaseclient.AuditEvent) error) error {
	f.asked = r
	for _, ev := range f.events {
		if err := yield(ev); err != nil {
			return err
		}
	}
	return f.err
}

func (f *fake) Backup(_ context.Context, w io.Writer) error {
	if f.backup != nil {
		return f.backup(w)
	}
	return f.err
}

// dstm runs the tool against a lease service.
func dstm(t *testing.T, f *fake, args ...string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	err := run(t.Context(), env{
		out: &out, now: func() time.Time { return noon },
		connect: func(c *Config) (operator, func() error, error) {
			f.config = *c
			return f, func() error { return nil }, nil
		},
	}, args)
	return out.String(), err
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name+".txt")
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s: -want +got:\n%s", path, diff)
	}
}

func holdings() []leaseclient.Holding {
	return []leaseclient.Holding{
		{Ref: ref("198.51.100.1", lease.MakeGen(1, 42)), HostID: "host2", Host: host2, TEP: tepAddr, Bound: noon.Add(-30 * time.Minute)},
		{
			Ref: ref("198.51.100.1", lease.MakeGen(1, 7)), HostID: "host1", Host: host1, TEP: tepAddr, Bound: noon.Add(-2 * time.Hour),
			Unbound: noon.Add(-time.Hour), Fenced: noon.Add(-time.Hour + time.Second), End: lease.ReasonIdle,
		},
	}
}

// Every command that asks the lease service, as a table and as JSON with its schema.
func TestRemote(t *testing.T) {
	for _, tt := range []struct {
		name, schema string
		args         []string
	}{
		{"lease-ls", "dstm.lease/1", []string{"lease", "ls", "--pool", "main"}},
		{"lease-revoke", "dstm.revoke/1", []string{"lease", "revoke", "198.51.100.1", "--gen", "1.42"}},
		{"who", "dstm.who/1", []string{"who", "198.51.100.1:443"}},
		{"pool-ls", "dstm.pool/1", []string{"pool", "ls"}},
		{"pool-advise", "dstm.advice/1", []string{"pool", "advise", "--hosts", "100000", "--use", "60s/1h", "--tail", "2m", "--port-sets", "4"}},
		{"pool-measured", "dstm.advice/1", []string{"pool", "advise", "--measured", "busy", "--hosts", "1000"}},
		{"tep-ls", "dstm.tep/1", []string{"tep", "ls"}},
		{"tep-fence", "dstm.tep/1", []string{"tep", "fence", "tep2", "--is-off"}},
		{"tep-remove", "dstm.tep/1", []string{"tep", "remove", "tep2"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			args := append(tt.args, "--server", "[2001:db8:2::10]:3545")
			out, err := dstm(t, &fake{who: holdings()}, args...)
			if err != nil {
				t.Fatal(err)
			}
			golden(t, tt.name, out)
			out, err = dstm(t, &fake{who: holdings()}, append(args, "--json")...)
			if err != nil {
				t.Fatal(err)
			}
			golden(t, tt.name+".json", out)
			var got struct {
				Schema string `json:"schema"`
			}
			if err := json.Unmarshal([]byte(out), &got); err != nil || got.Schema != tt.schema {
				t.Errorf("schema %q (%v), want %q", got.Schema, err, tt.schema)
			}
		})
	}
}

func TestArguments(t *testing.T) {
	server := []string{"--server", "[2001:db8:2::10]:3545"}
	for _, tt := range []struct {
		name string
		args []string
		want string
	}{
		{"no such command", []string{"lose"}, `unknown command or argument "lose"; see dstm --help`},
		{"half a command", []string{"lease"}, "lease needs a command"},
		{"no such flag", []string{"who", "--when", "x"}, "unknown flag: --when"},
		{"no server", []string{"pool", "ls"}, "no lease service: neither lease_service.servers in " + DefaultPath + " nor --server"},
		{"server without port", []string{"pool", "ls", "--server", "lease1"}, `--server "lease1" is not ADDRESS:PORT, for example [2001:db8:2::10]:3545`},
		{"no address", append(server, "who"), "who wants one address, got 0 arguments"},
		{"IPv6", append(server, "who", "2001:db8::1"), `"2001:db8::1" is not an IPv4 address`},
		{"generation", append(server, "lease", "revoke", "198.51.100.1", "--gen", "42"), `--gen "42" is not EPOCH.REVISION, for example 1.42`},
		{"time", append(server, "who", "198.51.100.1", "--at", "soon"), `--at "soon": want 2026-01-02T15:04:05Z, 15:04:05 (today, UTC) or a duration ago such as 90m`},
		{"fence without a word", append(server, "tep", "fence", "tep2"), "--is-off is missing"},
		{"admin", []string{"status", "--admin", "9546"}, `--admin "9546" is not ADDRESS:PORT, for example [::1]:9546`},
		{"no file", []string{"status", "--config", "nowhere.yaml"}, "nowhere.yaml"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := dstm(t, &fake{}, tt.args...)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("got %v, want %s", err, tt.want)
			}
			if code := daemon.ExitCode(err); code != daemon.ExitUsage {
				t.Errorf("exit code %d, want %d", code, daemon.ExitUsage)
			}
		})
	}
	_, err := dstm(t, &fake{err: errors.New("lease service is away")}, append(server, "pool", "ls")...)
	if err == nil || daemon.ExitCode(err) != daemon.ExitFailed {
		t.Errorf("a failed call: %v, exit code %d", err, daemon.ExitCode(err))
	}
}

func TestWhat(t *testing.T) {
	server := []string{"--server", "[2001:db8:2::10]:3545"}
	for at, want := range map[string]time.Time{
		"":                          {},
		"90m":                       noon.Add(-90 * time.Minute),
		"11:00:01":                  noon.Add(-59*time.Minute - 59*time.Second),
		"2026-01-01T01:00:00+01:00": noon.Add(-36 * time.Hour),
	} {
		f := &fake{}
		out, err := dstm(t, f, append(server, "who", "198.51.100.9", "--at", at)...)
		if err != nil || !f.at.Equal(want) || !strings.HasPrefix(out, "no record of a holder of 198.51.100.9") {
			t.Errorf("--at %q: asked for %s, want %s; %q, %v", at, f.at, want, out, err)
		}
	}
	f := &fake{}
	if _, err := dstm(t, f, append(server, "lease", "revoke", "198.51.100.1", "--gen", "1.42")...); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"tep", "fence", "tep2", "--is-off"}, {"tep", "remove", "tep2"}} {
		if _, err := dstm(t, f, append(server, args...)...); err != nil || f.tep != args[1]+" tep2" {
			t.Errorf("%v did %q, %v", args, f.tep, err)
		}
	}
	if want := ref("198.51.100.1", lease.MakeGen(1, 42)); f.revoked != want {
		t.Errorf("revoked %s, want %s", f.revoked, want)
	}
}

// The reference configuration is read, and flags go before it.
func TestConfig(t *testing.T) {
	f := &fake{}
	if _, err := dstm(t, f, "pool", "ls", "-c", "../../deploy/dstm.yaml", "--cert", "mine.pem"); err != nil {
		t.Fatal(err)
	}
	var want Config
	want.Defaults()
	want.LeaseService.Servers = []netip.AddrPort{netip.MustParseAddrPort("[2001:db8:2::10]:3545")}
	want.LeaseService.Name = "lease1.example.net"
	want.LeaseService.TLS.Cert, want.LeaseService.TLS.Key, want.LeaseService.TLS.CA = "mine.pem", "/etc/dstm/operator.key", "/etc/dstm/ca.pem"
	if diff := cmp.Diff(want, f.config, cmpopts.EquateComparable(netip.AddrPort{})); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	path := filepath.Join(t.TempDir(), "dstm.yaml")
	if err := os.WriteFile(path, []byte("lease_service:\n  servers: [\"[::1]:1\"]\n  name: x\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadConfig(path); err == nil || !strings.Contains(err.Error(), "cert is missing") {
		t.Errorf("a server without certificates: %v", err)
	}
}

// admin serves pages as daemons do.
func admin(t *testing.T, pages map[string]string) string {
	t.Helper()
	mux := http.NewServeMux()
	for path, body := range pages {
		mux.HandleFunc("GET "+path, func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(body)) })
	}
	s := httptest.NewServer(mux)
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

func TestLocal(t *testing.T) {
	addr := admin(t, map[string]string{
		"/status": `{"schema":"dstm.tepd/1","id":"tep1","session":3,"synced":true,"deadline":"3h59m","uplinks":["eth1","eth2"],"path":{"engine":"tc","why":""}}`,
		"/drops":  `{"schema":"dstm.drops/1","up":{"rx":10,"drops":{"no_binding":2}},"down":{"rx":4,"drops":{}}}`,
		"/bgp":    `{"schema":"dstm.bgp/1","speaker":"up","peers":[{"addr":"2001:db8:3::1","state":"ESTABLISHED"},{"addr":"2001:db8:3::2","last_error":"hold timer"}]}`,
	})
	for _, name := range []string{"status", "drops", "bgp"} {
		t.Run(name, func(t *testing.T) {
			for suffix, extra := range map[string][]string{"": nil, ".json": {"--json"}} {
				out, err := dstm(t, &fake{}, append([]string{name, "--admin", addr}, extra...)...)
				if err != nil {
					t.Fatal(err)
				}
				golden(t, name+suffix, strings.ReplaceAll(out, addr, "ADMIN"))
			}
		})
	}
	t.Run("nobody there", func(t *testing.T) {
		dead := httptest.NewServer(nil)
		gone := dead.Listener.Addr().String()
		dead.Close()
		_, err := dstm(t, &fake{}, "status", "--admin", gone)
		if err == nil || err.Error() != "daemon at "+gone+": connect: connection refused" || daemon.ExitCode(err) != daemon.ExitFailed {
			t.Errorf("got %v", err)
		}
		path := filepath.Join(t.TempDir(), "dstm.yaml")
		text := "admin: {leasesvc: \"GONE\", tepd: \"GONE\", dstmd: \"GONE\"}\n"
		if err := os.WriteFile(path, []byte(strings.ReplaceAll(text, "GONE", gone)), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err = dstm(t, &fake{}, "bgp", "-c", path)
		if err == nil || err.Error() != "no daemon answers: tried tepd at "+gone {
			t.Errorf("got %v", err)
		}
	})
	t.Run("no such page", func(t *testing.T) {
		_, err := dstm(t, &fake{}, "bgp", "--admin", admin(t, nil))
		if err == nil || !strings.Contains(err.Error(), "/bgp answers 404 Not Found") {
			t.Errorf("got %v", err)
		}
	})
}

func TestSentence(t *testing.T) {
	refusal := &leaseclient.Error{Code: codes.FailedPrecondition, Reason: lease.ReasonStaleGeneration, Msg: "not bound"}
	for _, tt := range []struct {
		err  error
		want string
	}{
		{nil, ""},
		{fmt.Errorf("revoke: %w", refusal), "revoke: " + refusal.Error()},
		{fmt.Errorf("pools: %w", status.Error(codes.Unavailable, "no route to host")), "lease service cannot be reached: no route to host"},
		{fmt.Errorf("pools: %w", status.Error(codes.DeadlineExceeded, "x")), "lease service does not answer in time; see --timeout"},
		{fmt.Errorf("pools: %w", context.DeadlineExceeded), "lease service does not answer in time; see --timeout"},
		{fmt.Errorf("pools: %w", status.Error(codes.PermissionDenied, "role host may not")), "lease service: role host may not"},
		{errors.New("other"), "other"},
	} {
		got := ""
		if err := sentence(tt.err); err != nil {
			got = err.Error()
		}
		if got != tt.want {
			t.Errorf("%v: got %q, want %q", tt.err, got, tt.want)
		}
	}
}
