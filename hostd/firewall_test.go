package hostd

import (
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Getenv("DSTM_TEST_ROOT") != "1" {
		t.Skip("needs root: sudo DSTM_TEST_ROOT=1 go test ./hostd/")
	}
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatalf("own network namespace: %v", err)
	}
}

func ruleset(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("nft", "list", "ruleset").CombinedOutput()
	if err != nil {
		t.Fatalf("nft: %v\n%s", err, out)
	}
	var lines []string
	for l := range strings.Lines(string(out)) {
		lines = append(lines, strings.TrimSpace(l))
	}
	return strings.Join(lines, "\n")
}

// What nft shows is what is in the kernel, whoever wrote it.
func TestFirewall(t *testing.T) {
	needRoot(t)
	if out, err := exec.Command("nft", "add table ip others").CombinedOutput(); err != nil {
		t.Fatalf("nft: %v\n%s", err, out)
	}
	const others = "table ip others {\n}"
	rules := func(chain string) string {
		return "chain " + chain + ` {
type filter hook ` + chain + ` priority filter; policy accept;
iifname "dstm0" ct state established,related accept
iifname "dstm0" icmp type echo-request accept
iifname "dstm0" counter packets 0 bytes 0 drop
}`
	}
	established := "table ip dstm {\n" + rules("input") + "\n\n" + rules("forward") + "\n}"
	var f Firewall
	for _, s := range []struct {
		name string
		do   func() error
		want string
	}{
		{"established", func() error { return f.Set("dstm0", InboundEstablished) }, others + "\n" + established},
		{"again", func() error { return f.Set("dstm0", InboundEstablished) }, others + "\n" + established},
		{"open", func() error { return f.Set("dstm0", InboundOpen) }, others},
		{"back", func() error { return f.Set("dstm0", InboundEstablished) }, others + "\n" + established},
		{"removed", f.Remove, others},
		{"removed again", f.Remove, others},
	} {
		if err := s.do(); err != nil {
			t.Fatalf("%s: %v", s.name, err)
		}
		if d := cmp.Diff(s.want, ruleset(t)); d != "" {
			t.Errorf("%s: ruleset (-want +got):\n%s", s.name, d)
		}
	}
}
