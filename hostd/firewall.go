package hostd

import (
	"errors"
	"fmt"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Inbound says what may reach the leased address from outside.
type Inbound string

// The values of device.inbound.
const (
	InboundEstablished Inbound = "established" // answers, related errors and echo requests
	InboundOpen        Inbound = "open"        // everything; the host's own firewall decides
)

// tableName is the nft table that is ours alone.
const tableName = "dstm"

// Firewall is the nft table of this host.
type Firewall struct {
	Table string // "" = dstm
}

func (f Firewall) table() *nftables.Table {
	name := f.Table
	if name == "" {
		name = tableName
	}
	return &nftables.Table{Family: nftables.TableFamilyIPv4, Name: name}
}

// Set makes the table hold the rules for device, in one transaction. It replaces what an earlier life left.
func (f Firewall) Set(device string, in Inbound) error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("nft: %w", err)
	}
	t := c.AddTable(f.table()) // so that the removal finds one
	c.DelTable(t)
	if in == InboundEstablished {
		t = c.AddTable(f.table())
		policy := nftables.ChainPolicyAccept
		for _, hook := range []*nftables.ChainHook{nftables.ChainHookInput, nftables.ChainHookForward} {
			chain := c.AddChain(&nftables.Chain{
				Name: hookName(hook), Table: t, Type: nftables.ChainTypeFilter,
				Hooknum: hook, Priority: nftables.ChainPriorityFilter, Policy: &policy,
			})
			for _, r := range establishedRules(device) {
				c.AddRule(&nftables.Rule{Table: t, Chain: chain, Exprs: r})
			}
		}
	}
	err = c.Flush()
	if in == InboundOpen && (errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPROTONOSUPPORT)) {
		return nil // a kernel without nf_tables has no table to remove
	}
	if err != nil {
		return fmt.Errorf("nft: table %s: %w", f.table().Name, err)
	}
	return nil
}

// Remove removes the table; absence is success.
func (f Firewall) Remove() error { return f.Set("", InboundOpen) }

func hookName(h *nftables.ChainHook) string {
	if *h == *nftables.ChainHookInput {
		return "input"
	}
	return "forward"
}

// establishedRules are: iifname DEVICE ct state established,related accept; the same for ICMP echo requests, by which
// the path is checked; everything else from DEVICE is counted and dropped.
func establishedRules(device string) [][]expr.Any {
	from := func(more ...expr.Any) []expr.Any {
		name := make([]byte, unix.IFNAMSIZ)
		copy(name, device)
		return append([]expr.Any{
			&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: name},
		}, more...)
	}
	const icmpEchoRequest = 8 // RFC 792
	return [][]expr.Any{
		from(
			&expr.Ct{Key: expr.CtKeySTATE, Register: 1},
			&expr.Bitwise{
				SourceRegister: 1, DestRegister: 1, Len: 4,
				Mask: binaryutil.NativeEndian.PutUint32(expr.CtStateBitESTABLISHED | expr.CtStateBitRELATED),
				Xor:  binaryutil.NativeEndian.PutUint32(0),
			},
			&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(0)},
			&expr.Verdict{Kind: expr.VerdictAccept},
		),
		from(
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_ICMP}},
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{icmpEchoRequest}},
			&expr.Verdict{Kind: expr.VerdictAccept},
		),
		from(&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop}),
	}
}
