// Package dstm is a CoreDNS plugin that notices when a registered IPv6 host is about to use IPv4, because a name it asked
// for has IPv4 addresses only, and has the lease service get the host an address before the answer goes out. Answers are
// never altered.
package dstm

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/metrics"
	"github.com/coredns/coredns/plugin/pkg/nonwriter"
	"github.com/coredns/coredns/request"
	"github.com/miekg/dns"
)

const (
	// lookupBudget bounds the own look-up. It outlives the hold: a slow name still prefetches for the next try.
	lookupBudget = 2 * time.Second
	// minHintBudget is what a hint gets at least; with a shorter hold, or none, it goes on in the background.
	minHintBudget = 250 * time.Millisecond
)

// lookuper asks the whole server a question, from the top of the chain. It may return nil, nil.
type lookuper interface {
	Lookup(ctx context.Context, state request.Request, name string, typ uint16) (*dns.Msg, error)
}

// DSTM is the handler of one server block.
type DSTM struct {
	Next plugin.Handler

	cfg      *config
	client   *client
	upstream lookuper
	held     atomic.Int64
}

// Name implements plugin.Handler.
func (d *DSTM) Name() string { return pluginName }

// ServeDNS implements plugin.Handler.
func (d *DSTM) ServeDNS(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	if ownLookup(ctx) {
		return plugin.NextOrFailure(pluginName, d.Next, ctx, w, r)
	}
	source := clientOf(w)
	h := d.concerned(source)
	if h == nil {
		return plugin.NextOrFailure(pluginName, d.Next, ctx, w, r)
	}
	// From here on all that the chain below asks the server anew (dns64, a CNAME out of a zone) is marked, denied names
	// included: it belongs to this query.
	ctx = context.WithValue(ctx, marker{}, true)
	if !asksForAddress(r) || d.denied(r.Question[0].Name) {
		return plugin.NextOrFailure(pluginName, d.Next, ctx, w, r)
	}

	nw := nonwriter.New(w)
	rcode, err := plugin.NextOrFailure(pluginName, d.Next, ctx, nw, r)
	if other := d.otherFamily(r.Question[0].Qtype, nw.Msg, rcode); other != dns.TypeNone {
		d.prefetch(ctx, h, source, request.Request{W: newPeer(w), Req: r}, other)
	}
	if nw.Msg == nil {
		return rcode, err
	}
	if werr := w.WriteMsg(nw.Msg); werr != nil && err == nil {
		err = werr
	}
	return rcode, err
}

// concerned returns the host that a query is from, if a hint for it would be of use: inside clients, registered, without
// a lease, not refused. Nil is the common case and costs no allocation, no look-up and no call.
func (d *DSTM) concerned(source netip.Addr) *host {
	if d.client == nil || !inAny(d.cfg.clients, source) {
		return nil
	}
	return d.client.hosts.needs(source)
}

// otherFamily returns the type to look up in order to know whether a name is IPv4-only, or TypeNone if the answer
// already says that it is not.
func (d *DSTM) otherFamily(asked uint16, m *dns.Msg, rcode int) uint16 {
	switch {
	case asked == dns.TypeA && d.usableA(m):
		return dns.TypeAAAA
	case asked == dns.TypeAAAA && emptyAAAA(m, rcode):
		return dns.TypeA
	}
	return dns.TypeNone
}

// prefetch looks up the other family and, if the name is IPv4-only, hints. It returns when the host's path is ready, when
// nothing is to be waited for, or after hold; the work then goes on without the query.
func (d *DSTM) prefetch(ctx context.Context, h *host, source netip.Addr, state request.Request, other uint16) {
	server := metrics.WithServer(ctx)
	if d.held.Add(1) > d.cfg.maxHeld {
		d.held.Add(-1)
		unheldTotal.WithLabelValues(server).Inc()
		return
	}
	heldNow.Inc()
	state.Req = state.Req.Copy() // plugins above may change theirs once we returned
	done := make(chan struct{})
	go func() {
		defer func() {
			d.held.Add(-1)
			heldNow.Dec()
			close(done)
		}()
		if d.ipv4Only(context.WithoutCancel(ctx), state, other) {
			d.client.hint(h, source, max(d.cfg.hold, minHintBudget))
		}
	}()
	if d.cfg.hold == 0 {
		return
	}
	begin := time.Now()
	timer := time.NewTimer(d.cfg.hold)
	defer timer.Stop()
	select {
	case <-done:
	case <-timer.C:
	case <-ctx.Done():
	}
	holdSeconds.WithLabelValues(server).Observe(time.Since(begin).Seconds())
}

// ipv4Only completes what the client's own query left open.
func (d *DSTM) ipv4Only(ctx context.Context, state request.Request, other uint16) bool {
	ctx, cancel := context.WithTimeout(ctx, lookupBudget)
	defer cancel()
	lookupsTotal.WithLabelValues(dns.TypeToString[other]).Inc()
	m, err := d.upstream.Lookup(ctx, state, state.Req.Question[0].Name, other)
	if err != nil {
		m = nil
	}
	if other == dns.TypeA {
		return d.usableA(m)
	}
	return emptyAAAA(m, dns.RcodeServerFailure)
}

// marker is the key under which a context says that a query is part of another one.
type marker struct{}

// ownLookup says whether a query comes from below ourselves: our look-up, or one of dns64, which arrives with the
// client's address and an ordinary writer.
func ownLookup(ctx context.Context) bool { return ctx.Value(marker{}) != nil }

// asksForAddress: one question, class IN, type A or AAAA. ANY (RFC 8482) and the other types say nothing about what the
// host will connect to.
func asksForAddress(r *dns.Msg) bool {
	return r.Opcode == dns.OpcodeQuery && len(r.Question) == 1 && r.Question[0].Qclass == dns.ClassINET &&
		(r.Question[0].Qtype == dns.TypeA || r.Question[0].Qtype == dns.TypeAAAA)
}

// denied: names that are IPv4-only by design or local (RFC 7050, RFC 8880, RFC 6761, RFC 6762), and the operator's.
func (d *DSTM) denied(name string) bool {
	return d.cfg.deny.Matches(dns.CanonicalName(name)) != ""
}

// emptyAAAA is the rule of RFC 6147 sections 5.1.1 to 5.1.4 for an AAAA answer, m, or for none at all, when rcode is what
// the chain returned: NXDOMAIN is never empty; any other error, or no answer, is; and so is an answer that has no AAAA
// record outside ::ffff:0:0/96 after its CNAME and DNAME chain. A truncated answer says nothing yet.
func emptyAAAA(m *dns.Msg, rcode int) bool {
	if m == nil {
		return rcode != dns.RcodeNameError
	}
	switch {
	case m.Rcode == dns.RcodeNameError || m.Truncated:
		return false
	case m.Rcode != dns.RcodeSuccess:
		return true
	}
	for _, rr := range m.Answer {
		if aaaa, ok := rr.(*dns.AAAA); ok && aaaa.AAAA.To4() == nil {
			return false
		}
	}
	return true
}

// usableA says whether an answer has an address that the host would reach through DSTM.
func (d *DSTM) usableA(m *dns.Msg) bool {
	if m == nil || m.Rcode != dns.RcodeSuccess {
		return false
	}
	for _, rr := range m.Answer {
		if a, ok := rr.(*dns.A); ok {
			if addr, ok := netip.AddrFromSlice(a.A); ok && reachable(addr.Unmap()) && !inAny(d.cfg.native, addr.Unmap()) {
				return true
			}
		}
	}
	return false
}

// reachable excludes what is no unicast destination beyond the link (RFC 6890): 0/8, 127/8 (also the answers of
// blocklists, RFC 5782), 169.254/16 and 224/3.
func reachable(a netip.Addr) bool {
	b := a.As4()
	return b[0] != 0 && b[0] != 127 && b[0] < 224 && (b[0] != 169 || b[1] != 254)
}

func inAny(ps []netip.Prefix, a netip.Addr) bool {
	return slices.ContainsFunc(ps, func(p netip.Prefix) bool { return p.Contains(a) })
}

// clientOf returns the source address of a query, the zero Addr if it has none.
func clientOf(w dns.ResponseWriter) netip.Addr {
	switch a := w.RemoteAddr().(type) {
	case *net.UDPAddr:
		return a.AddrPort().Addr().WithZone("").Unmap()
	case *net.TCPAddr:
		return a.AddrPort().Addr().WithZone("").Unmap()
	case nil:
		return netip.Addr{}
	default:
		ap, _ := netip.ParseAddrPort(a.String())
		return ap.Addr().WithZone("").Unmap()
	}
}

// peer stands in for the client's writer in a look-up that may outlive the query. It only says who asks.
type peer struct{ local, remote net.Addr }

func newPeer(w dns.ResponseWriter) *peer { return &peer{w.LocalAddr(), w.RemoteAddr()} }

func (p *peer) LocalAddr() net.Addr       { return p.local }
func (p *peer) RemoteAddr() net.Addr      { return p.remote }
func (*peer) WriteMsg(*dns.Msg) error     { return nil }
func (*peer) Write(b []byte) (int, error) { return len(b), nil }
func (*peer) Close() error                { return nil }
func (*peer) TsigStatus() error           { return nil }
func (*peer) TsigTimersOnly(bool)         {}
func (*peer) Hijack()                     {}
