package lease

import (
	"net/netip"
	"slices"
	"strings"
)

// Adopt says what a gateway holds that the store, restored from an older copy, may not know: the lease under the highest
// generation that any gateway has for the resource. It is for the time before anything is leased again: everybody who may
// still forward has said what it holds, and nobody forwards for an older generation of this resource any more.
//
// A lease that the store does not know is kept for whoever comes from its tunnel source, under the name of that source.
type Adopt struct{ Binding }

func (Adopt) event() {}

// unknownHost begins the identity of a holder of whom only the tunnel source is known. It cannot be one of a certificate.
const unknownHost = "unknown@"

// UnknownHost returns the identity under which an adopted lease is kept.
func UnknownHost(source netip.Addr) string { return unknownHost + source.String() }

func (c *Core) adopt(now Now, b Binding) {
	i, ok := c.fit(now, b)
	if !ok {
		return
	}
	e := &c.entries[i]
	if e.gen >= b.Gen || e.state == Conflict || e.excluded || e.cut {
		return // the store knows as much, or the address is not one to lease
	}
	host, valid := UnknownHost(b.Host), c.cfg.Timers.Valid
	if e.state == Bound && e.source == bytes16(b.Host) { // bound again since the copy was made
		host, valid = e.host, e.valid
	}
	c.supersede(now, i, ReasonExpired)
	if _, other := c.cell.Where(host); other { // one source, two addresses: the other one has been adopted already
		host += "/" + b.Resource.String()
	}
	c.hold(now, i, Bind{Host: host, Source: b.Host, MTU: b.MTU}, b.TEP, max(valid, c.restartGrace()))
}

// fit returns the entry of a lease that gateways hold. Where the store knows the address cut and gateways hold it whole, or
// the other way round, the address changes, unless what is known of it is newer.
func (c *Core) fit(now Now, b Binding) (int32, bool) {
	if seeded("adopted beside port sets") {
		return c.index(b.Resource)
	}
	w, ok := c.index(Whole(b.Addr))
	if !ok || b.PSIDLen > 0 && b.PSIDLen != c.cfg.PSIDLen {
		return 0, false
	}
	e := &c.entries[w]
	switch {
	case b.PSIDLen == 0 && e.cut:
		sets := c.entries[e.other : e.other+1<<c.cfg.PSIDLen]
		if slices.ContainsFunc(sets, func(s entry) bool { return s.gen >= b.Gen || s.state == Conflict }) {
			return 0, false
		}
		for j := range sets {
			c.vacate(now, e.other+int32(j)) // the last one makes the address whole
		}
	case b.PSIDLen > 0 && !e.cut:
		if e.gen >= b.Gen || e.state == Conflict || e.excluded || c.fixedFor[w] != "" {
			return 0, false
		}
		c.vacate(now, w)
		c.cutUp(w)
	}
	return c.index(b.Resource)
}

// vacate ends whatever an address is in the middle of, for the same reason as supersede.
func (c *Core) vacate(now Now, i int32) {
	c.supersede(now, i, ReasonExpired)
	switch c.entries[i].state {
	case Free:
	case Reserved:
		c.unreserve(i)
	default:
		c.free(i)
	}
}

// supersede ends what an address is in the middle of, with its audit record, because a newer lease of it takes its place
// and nobody can forward for the older one, or only to the same host.
func (c *Core) supersede(now Now, i int32, reason Reason) {
	e := &c.entries[i]
	if e.state == Bound {
		c.end(now, i, reason)
	}
	if e.state == Revoking {
		e.rev = c.cell.NextRev()
		e.fenced = nanos(now.Wall)
		c.commit(i, Record{Rev: e.rev}, true)
	}
}

// claim finds the adopted lease of a host that is known by its tunnel source alone.
func (c *Core) claim(ev Bind) (int32, bool) {
	r, ok := c.cell.Where(UnknownHost(ev.Source))
	if !ok || strings.HasPrefix(ev.Host, unknownHost) {
		return 0, false
	}
	i, here := c.index(r)
	return i, here && c.entries[i].tep == c.tep
}
