package main

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/leaseclient"
)

// The views are the JSON of the tool: field names are part of the schema "dstm.NAME/1". Times are absent when unknown.
type (
	leaseView struct {
		Addr    string    `json:"addr"`
		Gen     string    `json:"gen"`
		State   string    `json:"state"`
		Host    string    `json:"host"`
		Source  string    `json:"source"`
		Pool    string    `json:"pool"`
		LeftMS  int64     `json:"left_ms"`
		Bound   time.Time `json:"bound,omitzero"`
		Waiting []string  `json:"waiting,omitempty"`
	}
	// portSet names the ports of an address (RFC 7597); a length of 0 is all of them.
	portSet struct {
		Addr    string  `json:"addr"`
		PSIDLen uint8   `json:"psid_len,omitempty"`
		PSID    *uint16 `json:"psid,omitempty"`
	}
	holdingView struct {
		portSet
		Gen     string    `json:"gen"`
		Host    string    `json:"host"`
		Source  string    `json:"source"`
		TEP     string    `json:"tep"`
		Bound   time.Time `json:"bound,omitzero"`
		Unbound time.Time `json:"unbound,omitzero"`
		Fenced  time.Time `json:"fenced,omitzero"`
		End     string    `json:"end,omitempty"`
	}
	tepView struct {
		ID         string `json:"id"`
		Connected  bool   `json:"connected"`
		Serving    bool   `json:"serving"`
		Session    uint64 `json:"session"`
		AckedRev   uint64 `json:"acked_rev"`
		HeadRev    uint64 `json:"head_rev"`
		DeadlineMS int64  `json:"deadline_left_ms"`
		Fenced     string `json:"fenced,omitempty"`
	}
)

func viewLease(l leaseclient.LeaseInfo) leaseView {
	return leaseView{
		Addr: l.Resource.String(), Gen: genText(l.Gen), State: l.State, Host: l.HostID, Source: addrText(l.Host), Pool: l.Pool,
		LeftMS: l.Left.Milliseconds(), Bound: l.Bound.UTC(), Waiting: l.Waiting,
	}
}

func viewHolding(h leaseclient.Holding) holdingView {
	v := holdingView{
		portSet: viewPorts(h.Resource), Gen: genText(h.Gen), Host: h.HostID, Source: addrText(h.Host), TEP: addrText(h.TEP),
		Bound: h.Bound.UTC(), Unbound: h.Unbound.UTC(), Fenced: h.Fenced.UTC(),
	}
	if h.End != lease.ReasonNone {
		v.End = h.End.String()
	}
	return v
}

func viewPorts(r lease.Resource) portSet {
	p := portSet{Addr: r.Addr.String(), PSIDLen: r.PSIDLen}
	if r.PSIDLen > 0 {
		p.PSID = &r.PSID
	}
	return p
}

// resource prints the address, and the port set behind it.
func (p portSet) resource() string {
	if p.PSID == nil {
		return p.Addr
	}
	return fmt.Sprintf("%s#%d/%d", p.Addr, *p.PSID, p.PSIDLen)
}

func viewTEP(t leaseclient.TEPInfo) tepView {
	return tepView{
		ID: t.ID, Connected: t.Connected, Serving: t.Serving, Session: t.Session, AckedRev: uint64(t.Acked),
		HeadRev: uint64(t.Head), DeadlineMS: t.DeadlineLeft.Milliseconds(), Fenced: t.Fenced,
	}
}

// views converts a list; none is "[]" in JSON.
func views[T, V any](list []T, view func(T) V) []V {
	out := make([]V, 0, len(list))
	for _, v := range list {
		out = append(out, view(v))
	}
	return out
}

// genText prints a generation; a reserved address has none.
func genText(g lease.Gen) string {
	if g == 0 {
		return ""
	}
	return g.String()
}

// addrText prints an address; a reserved one has no source.
func addrText(a netip.Addr) string {
	if !a.IsValid() {
		return ""
	}
	return a.String()
}
