package hostd

import (
	"fmt"
	"strings"

	"kernel.org/pub/linux/libs/security/libcap/cap"
)

// CheckCapabilities names the capabilities that the agent needs and this process does not have.
func CheckCapabilities() error {
	have := cap.GetProc()
	var missing []string
	for _, v := range []cap.Value{cap.NET_ADMIN, cap.NET_RAW, cap.BPF} {
		if on, err := have.GetFlag(cap.Effective, v); err != nil || !on {
			missing = append(missing, strings.ToUpper(v.String()))
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("missing %s: start it as root or with these ambient capabilities", strings.Join(missing, ", "))
	}
	return nil
}
