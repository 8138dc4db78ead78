// Package dstm is a CoreDNS plugin that prepares IPv4 for hosts on IPv6-only networks: when a registered host asks for a
// name that has IPv4 addresses only, it tells the lease service so and lets the answer go as soon as the host's path is
// ready. It never alters an answer, and fails open.
package dstm

import (
	"context"
	"net"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/coredns/coredns/plugin"
	clog "github.com/coredns/coredns/plugin/pkg/log"
	"github.com/coredns/coredns/request"
	"github.com/miekg/dns"
)

// log is bound to CoreDNS's logger; it holds no state.
var log = clog.NewWithPlugin(name)

// lookupTime bounds the look-up of the other family. The answer is not held that long, but the host's path may still be
// ready for its next query.
const lookupTime = 2 * time.Second

// DSTM is the plugin in one server block.
type DSTM struct {
	Next plugin.Handler

	cfg    *config
	client *client // from OnStartup on
	lookup func(context.Context, request.Request, string, uint16) (*dns.Msg, error)
	met    *metrics
	held   atomic.Int64 // queries at work, at most cfg.maxHeld
}

// ownLookup is the key that marks a context: this query has been seen, here or in another server block, or it is one that
// dns64, file or we ourselves make to answer one that has.
type ownLookup struct{}

// Name implements plugin.Handler.
func (d *DSTM) Name() string { return name }

// ServeDNS implements plugin.Handler.
func (d *DSTM) ServeDNS(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	source, h := d.asker(ctx, w, r)
	if h == nil || !d.mayNeed(h, r) {
		return plugin.NextOrFailure(name, d.Next, ctx, w, r)
	}
	ctx = context.WithValue(ctx, ownLookup{}, true)
	// Plugins may write into the request; the look-up needs it as it came.
	req := r.Copy()
	rec := &recorder{ResponseWriter: w}
	rcode, err := plugin.NextOrFailure(name, d.Next, ctx, rec, r)
	if rec.raw == nil {
		d.prepare(ctx, request.Request{W: newPeer(w), Req: req}, source, h, answer{rec.msg, rcode})
	}
	if werr := rec.flush(); err == nil {
		err = werr
	}
	return rcode, err
}

// asker returns the registered host that asks, nil if the query does not concern us. It allocates nothing.
func (d *DSTM) asker(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) (netip.Addr, *host) {
	if d.client == nil || !asksForAddress(r) {
		return netip.Addr{}, nil
	}
	source := sourceOf(w)
	if !isClient(source, d.cfg.clients) {
		return netip.Addr{}, nil
	}
	h := d.client.table.find(source)
	if h == nil || ctx.Value(ownLookup{}) != nil {
		return netip.Addr{}, nil
	}
	return source, h
}

// asksForAddress: one question of class IN for A or AAAA. ANY (RFC 8482), CHAOS and the rest are not for us.
func asksForAddress(r *dns.Msg) bool {
	if r == nil || r.Response || r.Opcode != dns.OpcodeQuery || len(r.Question) != 1 {
		return false
	}
	q := &r.Question[0]
	return q.Qclass == dns.ClassINET && (q.Qtype == dns.TypeA || q.Qtype == dns.TypeAAAA)
}

// sourceOf returns the address that the query came from, the zero Addr if it has none.
func sourceOf(w dns.ResponseWriter) netip.Addr {
	switch a := w.RemoteAddr().(type) {
	case nil:
		return netip.Addr{}
	case *net.UDPAddr:
		return a.AddrPort().Addr().WithZone("").Unmap()
	case *net.TCPAddr:
		return a.AddrPort().Addr().WithZone("").Unmap()
	default:
		ap, _ := netip.ParseAddrPort(a.String())
		return ap.Addr().WithZone("").Unmap()
	}
}

// isClient: inside the prefixes that the operator serves. The source is the only identity taken; EDNS options are not.
func isClient(source netip.Addr, clients []netip.Prefix) bool {
	for _, p := range clients {
		if p.Contains(source) {
			return true
		}
	}
	return false
}

// mayNeed says whether the name could cause a lease for the host, as far as is known without any look-up.
func (d *DSTM) mayNeed(h *host, r *dns.Msg) bool {
	now := d.client.table.now()
	switch {
	case h.leased(now):
		d.met.query(queryLeased) // it renews by itself
	case h.quiet(now):
		d.met.query(queryQuiet)
	case d.client.table.off.Load():
		d.met.query(queryOff)
	case denied(r.Question[0].Name, d.cfg.deny):
		d.met.query(queryDenied)
	default:
		return true
	}
	return false
}

// denied: at or below a name whose answers do not mean "reach this by IPv4".
func denied(qname string, deny plugin.Zones) bool {
	return deny.Matches(plugin.Name(qname).Normalize()) != ""
}

// other returns the question that is left to ask after the first answer, 0 when that already decides.
func other(qtype uint16, first answer, native []netip.Prefix) uint16 {
	switch {
	case qtype == dns.TypeA && hasUsableIPv4(first, native):
		return dns.TypeAAAA
	case qtype == dns.TypeAAAA && lacksIPv6(first):
		return dns.TypeA
	}
	return 0
}

// ipv4Only decides by the second answer what the first one left open.
func ipv4Only(second uint16, a answer, native []netip.Prefix) bool {
	if second == dns.TypeAAAA {
		return lacksIPv6(a)
	}
	return hasUsableIPv4(a, native)
}

// prepare finds out whether the name is IPv4-only, hints if so and waits for the host's path, all of it for the time of
// cfg.hold at most. What is not done by then goes on without the query.
func (d *DSTM) prepare(ctx context.Context, state request.Request, source netip.Addr, h *host, first answer) {
	second := other(state.QType(), first, d.cfg.native)
	if second == 0 {
		d.met.query(queryNotOnly)
		return
	}
	hold := d.holdFor(h)
	if hold <= 0 && h.busy() {
		d.met.query(queryBusy) // the hint is under way and nobody is to wait for it: nothing to find out
		return
	}
	if d.held.Add(1) > int64(d.cfg.maxHeld) {
		d.held.Add(-1)
		d.met.query(queryOverload)
		return
	}
	ready, left := make(chan struct{}), make(chan struct{})
	work := func() {
		defer d.held.Add(-1)
		defer close(ready)
		d.work(ctx, state, source, h, second, left)
	}
	if !d.client.spawn(work) { // closed meanwhile
		d.held.Add(-1)
		return
	}
	defer close(left)
	if hold <= 0 {
		return
	}
	began := time.Now()
	d.met.held.Inc()
	defer func() {
		d.met.held.Dec()
		d.met.hold.Observe(time.Since(began).Seconds())
	}()
	timer := time.NewTimer(hold)
	defer timer.Stop()
	select {
	case <-ready:
	case <-timer.C:
	case <-ctx.Done():
	}
}

// holdFor returns how long an answer to the host may wait: no longer than until the hint under way is cfg.hold old, and
// not at all when the host did not answer the last offer or the lease service is not there.
func (d *DSTM) holdFor(h *host) time.Duration {
	if h.mute.Load() || !d.client.live.Load() {
		return 0
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.flight == nil {
		return d.cfg.hold
	}
	return d.cfg.hold - time.Duration(d.client.table.now()-h.flight.began)
}

func (h *host) busy() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.flight != nil
}

// work asks the second question, hints and waits until the hint is settled or left is closed.
func (d *DSTM) work(ctx context.Context, state request.Request, source netip.Addr, h *host, second uint16, left <-chan struct{}) {
	a := d.ask(ctx, state, second)
	if !ipv4Only(second, a, d.cfg.native) {
		d.met.query(queryNotOnly)
		return
	}
	d.met.query(queryOnly)
	f := d.client.hint(h, source)
	if f == nil {
		return
	}
	select {
	case <-f.done:
	case <-left:
	}
}

// ask looks up the other family through the whole chain of the server, whose dns64, cache and policies then count.
func (d *DSTM) ask(ctx context.Context, state request.Request, qtype uint16) answer {
	// The query may be answered before this is done; CoreDNS then ends its context.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), lookupTime)
	defer cancel()
	stop := context.AfterFunc(d.client.ctx, cancel)
	defer stop()

	got := make(chan answer, 1)
	go func() {
		msg, err := d.lookup(ctx, state, state.QName(), qtype)
		if err != nil || msg == nil {
			got <- none()
			return
		}
		got <- answer{msg: msg}
	}()
	select {
	case a := <-got:
		return a
	case <-ctx.Done():
		return none()
	}
}

// peer stands in for the connection in a look-up that may outlive its query: it says who asks and writes nothing.
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
