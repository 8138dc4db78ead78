package netcfg

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

const sysctlDir = "/proc/sys"

func checkSysctl(name string) error {
	if !filepath.IsLocal(name) || !strings.HasPrefix(name, "net/") {
		return fmt.Errorf("sysctl %q: want a name below net/, with slashes", name)
	}
	return nil
}

func readSysctl(name string) (string, error) {
	b, err := os.ReadFile(filepath.Join(sysctlDir, name))
	if err != nil {
		return "", fmt.Errorf("sysctl: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

func writeSysctl(name, value string) error {
	if err := os.WriteFile(filepath.Join(sysctlDir, name), []byte(value), 0o644); err != nil {
		return fmt.Errorf("sysctl: %w", err)
	}
	return nil
}

// applySysctls sets what d wants and gives back what it no longer wants. keep holds the old values and loses those that
// were given back.
func (c *Config) applySysctls(d Desired, keep *record) error {
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(keep.Sysctls)) {
		value, wanted := d.Sysctls[name]
		if !wanted {
			value = keep.Sysctls[name]
		}
		have, err := readSysctl(name)
		if err == nil && have != value {
			err = writeSysctl(name, value)
			c.log.Debug("sysctl set", "name", name, "old", have, "new", value)
		}
		if !wanted && errors.Is(err, fs.ErrNotExist) {
			err = nil // its interface is gone, and the value with it
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if !wanted {
			delete(keep.Sysctls, name)
		}
	}
	return errors.Join(errs...)
}
