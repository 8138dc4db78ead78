// Package cmd has no code: its test runs the programs as they are installed and gives them what they must refuse.
package cmd

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/dstm-project/dstm/internal/daemon"
	"github.com/dstm-project/dstm/internal/pki"
	"github.com/dstm-project/dstm/internal/tlsid"
	"github.com/dstm-project/dstm/leasesvc/store/etcdstore/etcdtest"
)

// programs is where TestMain has built them.
var programs string

func TestMain(m *testing.M) {
	etcdtest.Main()
	os.Exit(func() int {
		// Under the system's own directory, where another user may look.
		dir, err := os.MkdirTemp("", "dstm-programs")
		if err == nil {
			defer os.RemoveAll(dir)
			err = os.Chmod(dir, 0o755)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		programs = dir
		if out, err := exec.Command("go", "build", "-o", dir+"/", "./leasesvc", "./tepd", "./dstmd", "./dstm").CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "build: %v\n%s", err, out)
			return 1
		}
		return m.Run()
	}())
}

// place is a directory with a certificate authority and configurations that work.
type place struct {
	t     testing.TB
	dir   string
	edits int
}

func newPlace(t testing.TB) *place {
	t.Helper()
	dir, err := os.MkdirTemp("", "dstm-bad")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	p := &place{t: t, dir: dir}
	if err := pki.Init(dir, "example.net", time.Hour); err != nil {
		t.Fatal(err)
	}
	p.issue(tlsid.RoleSvc, "svc", pki.Options{})
	p.issue(tlsid.RoleTEP, "tep", pki.Options{})
	p.issue(tlsid.RoleHost, "host", pki.Options{})
	p.issue(tlsid.RoleOperator, "noc", pki.Options{})
	p.issue(tlsid.RoleHost, "old", pki.Options{NotBefore: time.Now().Add(-2 * time.Hour), Valid: time.Hour})
	p.write("leasesvc.yaml", `cell: lab
trust_domain: example.net
listen: "[::1]:3545"
tls: {cert: DIR/svc.pem, key: DIR/svc.key, ca: DIR/ca.pem}
store: {path: DIR/lease.db}
pools: [{name: main, prefix: 198.51.100.0/24, tep_address: "2001:db8:a::1"}]
teps: [tep]
hosts: {prefixes: ["2001:db8:1::/48"]}
`)
	service := `lease_service: {servers: ["[::1]:1"], name: lease1.example.net, tls: {cert: DIR/NAME.pem, key: DIR/NAME.key, ca: DIR/ca.pem}}
`
	p.write("tepd.yaml", "cell: lab\nid: tep\n"+strings.ReplaceAll(service, "NAME", "tep")+
		`tunnel: {address: "2001:db8:a::1", ipv4_address: 192.0.2.1, uplinks: [lo]}
paths: {run: DIR/run, bpf: DIR/bpf}
`)
	p.write("dstmd.yaml", "cell: lab\n"+strings.ReplaceAll(service, "NAME", "host")+"paths: {run: DIR/run, bpf: DIR/bpf}\n")
	p.write("dstm.yaml", strings.ReplaceAll(service, "NAME", "noc"))
	return p
}

func (p *place) issue(role tlsid.Role, name string, o pki.Options) {
	p.t.Helper()
	id := tlsid.ID{TrustDomain: "example.net", Cell: "lab", Role: role, Name: name}
	if _, err := pki.Issue(p.dir, p.dir, id, o); err != nil {
		p.t.Fatal(err)
	}
}

func (p *place) path(name string) string { return filepath.Join(p.dir, name) }

func (p *place) write(name, text string) {
	p.t.Helper()
	if err := os.WriteFile(p.path(name), []byte(strings.ReplaceAll(text, "DIR", p.dir)), 0o644); err != nil {
		p.t.Fatal(err)
	}
}

// edit returns the path of a copy of a configuration in which old is new.
func (p *place) edit(name, old, text string) string {
	p.t.Helper()
	b, err := os.ReadFile(p.path(name))
	if err != nil {
		p.t.Fatal(err)
	}
	if !bytes.Contains(b, []byte(old)) {
		p.t.Fatalf("%s has no %q", name, old)
	}
	p.edits++
	edited := fmt.Sprintf("edit%d-%s", p.edits, name)
	p.write(edited, strings.Replace(string(b), old, text, 1))
	return p.path(edited)
}

// run starts a program and returns what it says and its exit code. It must end by itself.
func (p *place) run(attr *syscall.SysProcAttr, program string, args ...string) (string, int) {
	p.t.Helper()
	path := filepath.Join(programs, program)
	if program == "start" {
		path = p.path(program)
	}
	c := exec.Command(path, args...)
	c.SysProcAttr, c.Dir = attr, p.dir
	var out bytes.Buffer
	c.Stdout, c.Stderr = &out, &out
	if err := c.Start(); err != nil {
		p.t.Fatal(err)
	}
	late := time.AfterFunc(time.Minute, func() { _ = c.Process.Kill() })
	err := c.Wait()
	if !late.Stop() {
		p.t.Fatalf("%s %v does not end:\n%s", program, args, out.String())
	}
	var ee *exec.ExitError
	switch {
	case err == nil:
		return out.String(), 0
	case errors.As(err, &ee):
		return out.String(), ee.ExitCode()
	}
	p.t.Fatal(err)
	return "", 0
}

func (p *place) check(name, out string, code, wantCode int, want ...string) {
	p.t.Helper()
	for _, w := range want {
		if !strings.Contains(out, w) {
			p.t.Errorf("%s: without %q:\n%s", name, w, out)
		}
	}
	if code != wantCode {
		p.t.Errorf("%s: exit code %d, want %d:\n%s", name, code, wantCode, out)
	}
}

func TestBadInput(t *testing.T) {
	p := newPlace(t)
	for _, c := range []struct {
		name    string
		program string
		args    []string
		code    int
		want    []string
	}{
		{"good configurations", "leasesvc", []string{"-t", "-c", p.path("leasesvc.yaml")}, 0, []string{"leasesvc.yaml: ok"}},
		{"unknown key, lease service", "leasesvc", []string{"-t", "-c", p.edit("leasesvc.yaml", "cell: lab", "cell: lab\ncel: x")}, daemon.ExitUsage, []string{"-leasesvc.yaml:2:1: unknown key \"cel\""}},
		{"unknown key, gateway", "tepd", []string{"-t", "-c", p.edit("tepd.yaml", "uplinks:", "uplink:")}, daemon.ExitUsage, []string{`-tepd.yaml:4:`, `unknown key "uplink" (did you mean "uplinks"?)`}},
		{"unknown key, host", "dstmd", []string{"-t", "-c", p.edit("dstmd.yaml", "cell:", "celll:")}, daemon.ExitUsage, []string{`-dstmd.yaml:1:1: unknown key "celll"`}},
		{"certificate of another role", "tepd", []string{"-c", p.edit("tepd.yaml", "tep.pem, key: "+p.dir+"/tep.key", "host.pem, key: "+p.dir+"/host.key")}, daemon.ExitUsage, []string{`host.pem`, `has role "host": this program needs role "tep"`}},
		{"expired certificate", "dstmd", []string{"-c", p.edit("dstmd.yaml", "host.pem, key: "+p.dir+"/host.key", "old.pem, key: "+p.dir+"/old.key")}, daemon.ExitUsage, []string{"old.pem: expired at ", ": issue a new one"}},
		{"no certificate file", "leasesvc", []string{"-c", p.edit("leasesvc.yaml", "svc.pem", "missing.pem")}, daemon.ExitUsage, []string{"missing.pem: no such file"}},
		{"empty pool", "leasesvc", []string{"-t", "-c", p.edit("leasesvc.yaml", "198.51.100.0/24,", "198.51.100.7/32, exclude: [198.51.100.7],")}, daemon.ExitUsage, []string{"every address of 198.51.100.7/32 is excluded, nothing is left to lease"}},
		{"tunnel address outside of allow_advertise", "tepd", []string{"-t", "-c", p.edit("tepd.yaml", "paths:", "bgp: {asn: 64512, allow_advertise: [198.51.100.0/24], peers: [{address: \"::1\", asn: 1}]}\npaths:")}, daemon.ExitUsage, []string{"tunnel address 2001:db8:a::1/128 is outside of allow_advertise: add it, or set announce.tep to false"}},
		{"unreachable lease service", "dstm", []string{"-c", p.path("dstm.yaml"), "lease", "ls"}, daemon.ExitFailed, []string{"[::1]:1", "connection refused"}},
		{"speaker by hand", "tepd", []string{"speaker"}, daemon.ExitUsage, []string{"its daemon starts it"}},
		{"unknown flag", "tepd", []string{"-x"}, daemon.ExitUsage, []string{"-x"}},
	} {
		out, code := p.run(nil, c.program, c.args...)
		p.check(c.name, out, code, c.code, c.want...)
	}

	p.write("lease.db", strings.Repeat("not a database\n", 1000))
	out, code := p.run(nil, "leasesvc", "-c", p.path("leasesvc.yaml"))
	p.check("damaged store", out, code, daemon.ExitFailed, "lease.db", "is damaged")
	if err := os.Remove(p.path("lease.db")); err != nil {
		t.Fatal(err)
	}
	out, code = p.run(nil, "leasesvc", "-c", p.path("leasesvc.yaml"))
	p.check("no store", out, code, daemon.ExitFailed, "lease.db", "--create-store")
}

func TestBadMachine(t *testing.T) {
	if os.Getenv("DSTM_TEST_ROOT") != "1" {
		t.Skip("needs root: DSTM_TEST_ROOT=1 go test ./cmd")
	}
	p := newPlace(t)
	if err := os.Chmod(p.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	nobody := &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	for _, program := range []string{"tepd", "dstmd"} {
		out, code := p.run(nobody, program, "-c", p.path(program+".yaml"))
		p.check(program+" without capabilities", out, code, daemon.ExitMissing, "missing CAP_NET_ADMIN, CAP_NET_RAW, CAP_BPF, CAP_PERFMON")
		// The verifier would say so too, but not in these words.
		p.write("start", "#!/bin/sh\nexec setpriv --bounding-set=-all,+net_admin,+net_raw,+bpf "+
			programs+"/"+program+" -c DIR/"+program+".yaml\n")
		if err := os.Chmod(p.path("start"), 0o755); err != nil {
			t.Fatal(err)
		}
		out, code = p.run(nil, "start")
		p.check(program+" without CAP_PERFMON", out, code, daemon.ExitMissing, "missing CAP_PERFMON:")

		// A namespace of its own with an interface that somebody else made.
		p.write("start", "#!/bin/sh\nip link add dstm0 type veth peer name other || exit 99\n"+
			"exec "+programs+"/"+program+" -c DIR/"+program+".yaml\n")
		if err := os.Chmod(p.path("start"), 0o755); err != nil {
			t.Fatal(err)
		}
		out, code = p.run(&syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS}, "start")
		p.check(program+" with a foreign dstm0", out, code, daemon.ExitFailed, "dstm0", "exists already")
	}
}
