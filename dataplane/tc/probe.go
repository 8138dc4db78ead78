// Package tc is the packet path in BPF programs on TCX links beside a TUN. It is the only importer of cilium/ebpf.
package tc

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
	"golang.org/x/sys/unix"
)

// Kernel is what a probe finds out.
type Kernel struct {
	Release string // of the running kernel
	TCX     error  // nil = links can be attached (since 6.6)
	Decap   error  // nil = BPF_F_ADJ_ROOM_DECAP_L3_IPV4 is known (since 6.3)
}

// UnsupportedError says which feature the running kernel lacks.
type UnsupportedError struct {
	Feature, Since, Release string
	Err                     error
}

// Error names the feature, the version that has it and the one that runs.
func (e *UnsupportedError) Error() string {
	return fmt.Sprintf("data path tc: kernel %s has no %s: want %s or later (%v)", e.Release, e.Feature, e.Since, e.Err)
}

func (e *UnsupportedError) Unwrap() error { return e.Err }

// Check is the decision over a probe.
func (k Kernel) Check() error {
	switch {
	case k.Decap != nil:
		const decap = "BPF decapsulation of IPv4 in IPv6 (BPF_F_ADJ_ROOM_DECAP_L3_IPV4)"
		return &UnsupportedError{decap, "6.3", k.Release, k.Decap}
	case k.TCX != nil:
		return &UnsupportedError{"TCX links", "6.6", k.Release, k.TCX}
	}
	return nil
}

// Probe asks the running kernel.
func Probe() (Kernel, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return Kernel{}, fmt.Errorf("data path tc: %w", err)
	}
	k := Kernel{Release: unix.ByteSliceToString(u.Release[:])}
	if err := features.HaveProgramType(ebpf.SchedCLS); err != nil && !errors.Is(err, ebpf.ErrNotSupported) {
		return Kernel{}, fmt.Errorf("data path tc: BPF programs cannot be loaded: %w", err)
	}
	k.TCX = probeTCX()
	k.Decap = probeDecap()
	return k, nil
}

// probeTCX loads a program with the attach type that came with TCX.
func probeTCX() error {
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SchedCLS, AttachType: ebpf.AttachTCXIngress, License: "Dual MIT/GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
	})
	if err != nil {
		return err
	}
	defer p.Close()
	return queryTCX()
}

// probeDecap runs a program over a packet of IPv4 in IPv6 that takes the outer header off; its verdict is the helper's
// answer.
func probeDecap() error {
	const (
		flags    = 1 << 7 // BPF_F_ADJ_ROOM_DECAP_L3_IPV4
		roomMAC  = 1      // BPF_ADJ_ROOM_MAC
		ethernet = 14
	)
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SchedCLS, License: "Dual MIT/GPL",
		Instructions: asm.Instructions{
			asm.Mov.Imm(asm.R2, -40), asm.Mov.Imm(asm.R3, roomMAC), asm.Mov.Imm(asm.R4, flags),
			asm.FnSkbAdjustRoom.Call(), asm.Return(),
		},
	})
	if err != nil {
		return err
	}
	defer p.Close()
	pkt := make([]byte, ethernet+40+64)
	pkt[12], pkt[13] = 0x86, 0xdd
	pkt[ethernet], pkt[ethernet+6], pkt[ethernet+40] = 0x60, unix.IPPROTO_IPIP, 0x45
	rc, _, err := p.Test(pkt)
	if err != nil {
		return err
	}
	if int32(rc) != 0 {
		return unix.Errno(-int32(rc))
	}
	return nil
}
