package caps

import (
	"slices"
	"testing"

	"kernel.org/pub/linux/libs/security/libcap/cap"
)

func TestCheck(t *testing.T) {
	for _, c := range []struct {
		has  []cap.Value
		want string
	}{
		{[]cap.Value{cap.NET_ADMIN, cap.NET_RAW, cap.BPF, cap.PERFMON}, ""},
		{[]cap.Value{cap.NET_ADMIN, cap.NET_RAW, cap.SYS_ADMIN}, ""},
		{[]cap.Value{cap.NET_ADMIN, cap.NET_RAW, cap.BPF}, "missing CAP_PERFMON: start it as root or with these ambient capabilities"},
		{[]cap.Value{cap.NET_RAW}, "missing CAP_NET_ADMIN, CAP_BPF, CAP_PERFMON: start it as root or with these ambient capabilities"},
	} {
		got := ""
		if err := check(func(v cap.Value) bool { return slices.Contains(c.has, v) }); err != nil {
			got = err.Error()
		}
		if got != c.want {
			t.Errorf("with %v: %q, want %q", c.has, got, c.want)
		}
	}
}
