// Package caps says which capabilities a packet path needs.
package caps

import (
	"fmt"
	"strings"

	"kernel.org/pub/linux/libs/security/libcap/cap"
)

// Check names the capabilities that a packet path needs and this process does not have. CAP_PERFMON is for what programs do
// with packet pointers; CAP_SYS_ADMIN stands for it and for CAP_BPF, as in kernels before 5.8 (capabilities(7)).
func Check() error {
	have := cap.GetProc()
	return check(func(v cap.Value) bool {
		on, err := have.GetFlag(cap.Effective, v)
		return err == nil && on
	})
}

func check(has func(cap.Value) bool) error {
	var missing []string
	for _, v := range []cap.Value{cap.NET_ADMIN, cap.NET_RAW, cap.BPF, cap.PERFMON} {
		if !has(v) && !((v == cap.BPF || v == cap.PERFMON) && has(cap.SYS_ADMIN)) {
			missing = append(missing, strings.ToUpper(v.String()))
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("missing %s: start it as root or with these ambient capabilities", strings.Join(missing, ", "))
	}
	return nil
}
