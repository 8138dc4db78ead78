package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dstm-project/dstm/internal/daemon"
)

func TestCommandLine(t *testing.T) {
	bad := filepath.Join(t.TempDir(), "bad.yaml")
	if err := os.WriteFile(bad, []byte("cell: lab\nadmin: \"[2001:db8::1]:1\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		args []string
		code int
		out  string // in standard output or the error
	}{
		{"check", []string{"-t", "-c", "../../deploy/dstmd.yaml"}, daemon.ExitOK, "../../deploy/dstmd.yaml: ok\n"},
		{"check of a bad file", []string{"-t", "-c", bad}, daemon.ExitUsage, bad + ":2:8: admin address"},
		{"no file", []string{"-t", "-c", bad + ".not"}, daemon.ExitUsage, "no such file"},
		{"version", []string{"--version"}, daemon.ExitOK, "dstmd "},
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
