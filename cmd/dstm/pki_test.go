package main

import (
	"log/slog"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dstm-project/dstm/internal/daemon"
	"github.com/dstm-project/dstm/internal/tlsid"
)

func TestPKI(t *testing.T) {
	dir := t.TempDir()
	if out, err := dstm(t, &fake{}, "pki", "init", "--dir", dir, "--trust-domain", "example.net"); err != nil || !strings.Contains(out, "ca.pem") {
		t.Fatalf("%q, %v", out, err)
	}
	if _, err := dstm(t, &fake{}, "pki", "init", "--dir", dir, "--trust-domain", "example.net"); err == nil || daemon.ExitCode(err) != daemon.ExitFailed {
		t.Errorf("a second root: %v", err)
	}
	for _, role := range tlsid.Roles() {
		name := string(role) + "1"
		out, err := dstm(t, &fake{}, "pki", "issue", "--dir", dir, "--out", dir, "--role", string(role), "--name", name,
			"--dns", "lease1.example.net", "--ip", "2001:db8:2::10", "--json")
		if err != nil || !strings.Contains(out, `"schema":"dstm.pki/1"`) {
			t.Fatalf("%s: %q, %v", role, out, err)
		}
		src, err := tlsid.Open(tlsid.Files{
			Cert: filepath.Join(dir, name+".pem"), Key: filepath.Join(dir, name+".key"), CA: filepath.Join(dir, "ca.pem"),
		}, role, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		if want := (tlsid.ID{TrustDomain: "example.net", Cell: "lab", Role: role, Name: name}); src.ID() != want {
			t.Errorf("issued %s, want %s", src.ID(), want)
		}
	}
}

func TestPKIErrors(t *testing.T) {
	dir := t.TempDir()
	for _, tt := range []struct {
		name string
		args []string
		want string
		code int
	}{
		{"no trust domain", []string{"init"}, "--trust-domain is missing", daemon.ExitUsage},
		{"no name", []string{"issue", "--role", "tep"}, "--name is missing", daemon.ExitUsage},
		{"role", []string{"issue", "--role", "king", "--name", "x"}, `--role "king" is unknown, want one of [svc tep resolver host operator]`, daemon.ExitUsage},
		{"address", []string{"issue", "--role", "svc", "--name", "x", "--ip", "here"}, `--ip "here" is not an IP address`, daemon.ExitUsage},
		{"no root", []string{"issue", "--role", "svc", "--name", "x"}, "no root in " + dir + ": run dstm pki init first", daemon.ExitFailed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := dstm(t, &fake{}, append(append([]string{"pki"}, tt.args...), "--dir", dir)...)
			if err == nil || !strings.Contains(err.Error(), tt.want) || daemon.ExitCode(err) != tt.code {
				t.Errorf("got %v (exit code %d), want %s (%d)", err, daemon.ExitCode(err), tt.want, tt.code)
			}
		})
	}
}
