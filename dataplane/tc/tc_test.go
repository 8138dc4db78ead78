package tc

import (
	"errors"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/dstm-project/dstm/dataplane"
)

// TestReasonsMatchHeader keeps the numbers of C and Go the same.
func TestReasonsMatchHeader(t *testing.T) {
	b, err := os.ReadFile("../bpf/c/dstm.h")
	if err != nil {
		t.Fatal(err)
	}
	found := regexp.MustCompile(`\bDROP_([A-Z0-9_]+) = (\d+)`).FindAllStringSubmatch(string(b), -1)
	if len(found) != len(dataplane.Reasons()) {
		t.Errorf("the header has %d reasons, Go has %d", len(found), len(dataplane.Reasons()))
	}
	for _, m := range found {
		n, err := strconv.Atoi(m[2])
		if err != nil {
			t.Fatal(err)
		}
		if got := dataplane.DropReason(n).String(); got != strings.ToLower(m[1]) {
			t.Errorf("reason %d is %s in C and %s in Go", n, strings.ToLower(m[1]), got)
		}
		if strings.Contains(dataplane.DropReason(n).Explain(), "does not know") {
			t.Errorf("reason %d has no explanation", n)
		}
	}
}

func TestKernelCheck(t *testing.T) {
	no := errors.New("invalid argument")
	for _, c := range []struct {
		name string
		k    Kernel
		want string
	}{
		{"good", Kernel{Release: "6.12.1"}, ""},
		{
			"old",
			Kernel{Release: "6.1.0-56-amd64", TCX: no, Decap: no},
			"data path tc: kernel 6.1.0-56-amd64 has no BPF decapsulation of IPv4 in IPv6 " +
				"(BPF_F_ADJ_ROOM_DECAP_L3_IPV4): want 6.3 or later (invalid argument)",
		},
		{
			"between",
			Kernel{Release: "6.5.0", TCX: no},
			"data path tc: kernel 6.5.0 has no TCX links: want 6.6 or later (invalid argument)",
		},
	} {
		got := ""
		if err := c.k.Check(); err != nil {
			got = err.Error()
			var u *UnsupportedError
			if !errors.As(err, &u) || !errors.Is(err, no) {
				t.Errorf("%s: error is %T", c.name, err)
			}
		}
		if got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}
