package tepd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
)

// Cleanup removes what tepd put into this machine, and nothing else: the speaker with its announcements, the packet path
// with its pins and device, addresses, routes, sysctls (back to their old values) and the files of the run directory. It
// goes on after a failure and returns all of them. With a running tepd it refuses.
//
// endSpeaker makes a speaker that still runs withdraw and end.
func Cleanup(ctx context.Context, cfg *Config, d Deps, endSpeaker func(context.Context) error) error {
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
	add("bgp speaker", endSpeaker(ctx))
	h, err := loadHandover(cfg.Paths)
	add("handover", err)
	// Routes and addresses before their device: the kernel would take them along, and netcfg could not tell that they
	// were ours.
	add("kernel", d.Kernel.Cleanup())
	if h.Device != "" {
		add("packet path", removePath(ctx, cfg, d, h))
	}
	if len(errs) == 0 {
		if err := os.Remove(handoverPath(cfg.Paths)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			add("handover", err)
		}
	}
	return errors.Join(errs...)
}

// removePath removes the packet path and the device, unless somebody else has made one of that name since.
func removePath(ctx context.Context, cfg *Config, d Deps, h handover) error {
	l, there, err := d.Kernel.Link(h.Device)
	if err != nil {
		return err
	}
	if there && !h.owns(l) {
		return fmt.Errorf("interface %s is not the one that tepd made (index %d, ours was %d): it stays, and so do the pins in %s",
			h.Device, l.Index, h.Index, cfg.Paths.BPF)
	}
	// An engine removes what it holds, so it first takes over what is pinned.
	path := desiredPath(cfg, h.Pools)
	path.Device = h.Device
	if err := d.Path.Configure(ctx, path); err != nil {
		return errors.Join(err, d.Path.Close(false), d.Kernel.RemoveLink(h.Device))
	}
	return errors.Join(d.Path.Close(false), d.Kernel.RemoveLink(h.Device))
}
