package tepd

import (
	"fmt"
	"strings"

	"kernel.org/pub/linux/libs/security/libcap/cap"
)

// CheckCapabilities names the capabilities that a gateway needs and this process does not have.
func CheckCapabilities() error {
	have := cap.GetProc()
	return missing(func(v cap.Value) bool {
		on, err := have.GetFlag(cap.Effective, v)
		return err == nil && on
	})
}

func missing(has func(cap.Value) bool) error {
	var names []string
	for _, v := range []cap.Value{cap.NET_ADMIN, cap.NET_RAW, cap.BPF} {
		if !has(v) {
			names = append(names, strings.ToUpper(v.String()))
		}
	}
	if len(names) > 0 {
		return fmt.Errorf("missing %s: start it as root or with these ambient capabilities", strings.Join(names, ", "))
	}
	return nil
}
