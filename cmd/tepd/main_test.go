package main

import (
	"bytes"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dstm-project/dstm/internal/daemon"
	"github.com/dstm-project/dstm/internal/pki"
	"github.com/dstm-project/dstm/internal/tlsid"
	"github.com/dstm-project/dstm/tepd"
)

func TestCommandLine(t *testing.T) {
	bad := filepath.Join(t.TempDir(), "bad.yaml")
	writeFile(t, bad, "cell: lab\nadmin: \"[2001:db8::1]:1\"\n")
	for _, c := range []struct {
		name string
		args []string
		code int
		out  string // in standard output or the error
	}{
		{"check", []string{"-t", "-c", "../../deploy/tepd.yaml"}, daemon.ExitOK, "../../deploy/tepd.yaml: ok\n"},
		{"check of a bad file", []string{"-t", "-c", bad}, daemon.ExitUsage, bad + ":2:8: admin address"},
		{"no file", []string{"-t", "-c", bad + ".not"}, daemon.ExitUsage, "no such file"},
		{"version", []string{"--version"}, daemon.ExitOK, "tepd "},
		{"unknown flag", []string{"-x"}, daemon.ExitUsage, "-x"},
		{"argument", []string{"go"}, daemon.ExitUsage, `unexpected argument "go"`},
		{"help", []string{"-h"}, daemon.ExitOK, ""},
	} {
		var out, errOut bytes.Buffer
		err := run(t.Context(), c.args, &out, &errOut)
		text := out.String()
		if err != nil {
			text += err.Error()
		}
		if code := daemon.ExitCode(err); code != c.code || !strings.Contains(text, c.out) {
			t.Errorf("%s: exit code %d, %q; want %d, %q", c.name, code, text, c.code, c.out)
		}
	}
}

func TestIdentity(t *testing.T) {
	dir := t.TempDir()
	if err := pki.Init(dir, "example.net", time.Hour); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		id   tlsid.ID
		want string // in the error
	}{
		{"good", tlsid.ID{Cell: "lab", Role: tlsid.RoleTEP, Name: "tep1"}, ""},
		{"role", tlsid.ID{Cell: "lab", Role: tlsid.RoleHost, Name: "tep1"}, `has role "host": this program needs role "tep"`},
		{"cell", tlsid.ID{Cell: "other", Role: tlsid.RoleTEP, Name: "tep1"}, `is of cell "other", the configuration of cell "lab"`},
		{"name", tlsid.ID{Cell: "lab", Role: tlsid.RoleTEP, Name: "tep2"}, `is of gateway "tep2", the configuration of "tep1"`},
	} {
		c.id.TrustDomain = "example.net"
		files, err := pki.Issue(dir, filepath.Join(dir, c.name), c.id, pki.Options{Valid: time.Hour, IPs: []netip.Addr{netip.IPv6Loopback()}})
		if err != nil {
			t.Fatal(err)
		}
		cfg := &tepd.Config{Cell: "lab", ID: "tep1", LeaseService: tepd.LeaseService{TLS: files}}
		_, err = identity(cfg, slog.New(slog.DiscardHandler))
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: error %v, want %q", c.name, err, c.want)
		}
	}
}

func writeFile(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}
