package tepd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/dstm-project/dstm/bgp"
)

// Cleanup removes what tepd put into this machine, and nothing else: the speaker with its announcements, the packet path
// with its pins and device, addresses, routes, sysctls (back to their old values) and the files of the run directory. It
// goes on after a failure and returns all of them. With a running tepd it refuses.
//
// running returns the speaker that still runs, nil when there is none.
func Cleanup(ctx context.Context, cfg *Config, d Deps, running func(context.Context) (Speaker, error)) error {
	unlock, err := lock(cfg.Paths)
	if err != nil {
		return err
	}
	defer unlock()
	var errs []error
	add := func(what string, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", what, err))
		}
	}
	if running != nil {
		sp, err := running(ctx)
		if err == nil && sp != nil {
			err = sp.Close(ctx, bgp.Withdraw)
		}
		add("bgp speaker", err)
	}
	h, err := loadHandover(cfg.Paths)
	add("handover", err)
	// Routes and addresses before their device: the kernel would take them along, and netcfg could not tell that they
	// were ours.
	add("kernel", d.Kernel.Cleanup())
	add("packet path", d.Path.Close(false))
	add("device", removeDevice(d.Kernel, h))
	if len(errs) == 0 {
		if err := os.Remove(handoverPath(cfg.Paths)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			add("handover", err)
		}
	}
	return errors.Join(errs...)
}

// removeDevice removes the device if it is still the one that we made.
func removeDevice(k Kernel, h handover) error {
	if h.Device == "" {
		return nil
	}
	l, there, err := k.Link(h.Device)
	if err != nil || !there || l.Index != h.Index {
		return err
	}
	return k.RemoveLink(h.Device)
}
