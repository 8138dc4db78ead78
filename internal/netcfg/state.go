package netcfg

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"github.com/google/renameio/v2"
)

// addrKey names an address in the kernel.
type addrKey struct {
	Link   string       `json:"link"`
	Prefix netip.Prefix `json:"prefix"`
}

// routeKey names a route in the kernel.
type routeKey struct {
	Prefix netip.Prefix `json:"prefix"`
	Metric uint32       `json:"metric"`
	Table  uint32       `json:"table"`
}

// record is what we put into the kernel, as the state file keeps it.
type record struct {
	Addrs   []addrKey         `json:"addrs,omitempty"`
	Routes  []routeKey        `json:"routes,omitempty"`
	Sysctls map[string]string `json:"sysctls,omitempty"` // name → the value before us
}

func (r *record) sort() {
	slices.SortFunc(r.Addrs, compareAddrKey)
	slices.SortFunc(r.Routes, compareRouteKey)
	r.Addrs, r.Routes = slices.Compact(r.Addrs), slices.Compact(r.Routes)
}

func (r record) equal(o record) bool {
	return slices.Equal(r.Addrs, o.Addrs) && slices.Equal(r.Routes, o.Routes) && maps.Equal(r.Sysctls, o.Sysctls)
}

// stateFile keeps a record where a reboot forgets it, as the kernel forgets what it describes.
type stateFile struct{ path string }

func (f stateFile) load() (record, error) {
	b, err := os.ReadFile(f.path)
	if errors.Is(err, fs.ErrNotExist) {
		return record{}, nil
	}
	var r record
	if err == nil {
		err = json.Unmarshal(b, &r)
	}
	if err != nil {
		return record{}, fmt.Errorf("network state file %s: %w", f.path, err)
	}
	r.sort()
	return r, nil
}

func (f stateFile) save(r record) error {
	b, err := json.Marshal(r)
	if err == nil {
		err = os.MkdirAll(filepath.Dir(f.path), 0o755)
	}
	if err == nil {
		err = renameio.WriteFile(f.path, append(b, '\n'), 0o600)
	}
	if err != nil {
		return fmt.Errorf("network state file %s: %w", f.path, err)
	}
	return nil
}

func (f stateFile) remove() error {
	if err := os.Remove(f.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("network state file: %w", err)
	}
	return nil
}
