package leasesim

import (
	"net/netip"
	"slices"
	"time"

	"github.com/dstm-project/dstm/lease"
)

// truth is what an onlooker knows who sees every party at once. Checks compare the parties with it; the parties never
// look at it.
type truth struct {
	w       *world
	slots   []slot
	hosts   map[string]int       // identity → slot of its lease
	who     map[lease.Gen]string // generation → identity
	digests []lease.Digest       // of the table at each revision
	dirty   []int                // slots to look at after this event
	audits  map[lease.Ref]lease.Audit
	samples []sample
	orders  map[lease.Resource]bool // that an operator has revoked
	gone    map[lease.Gen]bool      // that their host has given back
	sources map[string]netip.Addr   // of binds, by identity
	moves   map[string]bool         // identities that have used more than one source
	restore time.Duration           // when an older copy was put in place; -1 = never
}

// slot is one resource: an address, or a port set of it.
type slot struct {
	res     lease.Resource
	rec     lease.Address // as the disk has it
	newest  lease.Gen     // ever written
	granted lease.Gen     // highest that a client was told of (I4)
	promise promise
	has     bool // a gateway's table at the newest revision has the entry
	entry   lease.Binding
	quiet   []lastUse
	copied  lease.Gen // what a copy that was restored knows
	overlap []int     // other slots with ports of this one
}

// promise is what the holder was told last.
type promise struct {
	gen    lease.Gen
	until  time.Duration
	source netip.Addr // of a lease from before a restore; whoever comes from there keeps the address
}

// lastUse says until when a gateway forwarded by a generation.
type lastUse struct {
	gen   lease.Gen
	until time.Duration
}

// sample is one packet that a gateway forwarded, for the audit (I14).
type sample struct {
	addr netip.Addr
	port uint16
	at   time.Time
	gen  lease.Gen
}

func newTruth(w *world) *truth {
	t := &truth{
		w: w, hosts: map[string]int{}, who: map[lease.Gen]string{}, digests: make([]lease.Digest, 1), audits: map[lease.Ref]lease.Audit{},
		orders: map[lease.Resource]bool{}, gone: map[lease.Gen]bool{}, sources: map[string]netip.Addr{}, moves: map[string]bool{}, restore: -1,
	}
	for i := range w.p.pools {
		a := w.p.pools[i].Addr()
		for range 1 << (32 - w.p.pools[i].Bits()) {
			t.addSlots(a)
			a = a.Next()
		}
	}
	return t
}

// addSlots adds an address and its port sets.
func (t *truth) addSlots(a netip.Addr) {
	first, sets := len(t.slots), 0
	if t.w.p.psidLen > 0 {
		sets = 1 << t.w.p.psidLen
	}
	whole := slot{res: lease.Whole(a)}
	for i := range sets {
		whole.overlap = append(whole.overlap, first+1+i)
	}
	t.slots = append(t.slots, whole)
	for i := range sets {
		t.slots = append(t.slots, slot{
			res:     lease.Resource{Addr: a, PSIDLen: t.w.p.psidLen, PSID: uint16(i)},
			overlap: []int{first},
		})
	}
}

// slot returns the number of a resource.
func (w *world) slot(r lease.Resource) int {
	per := 1
	if w.p.psidLen > 0 {
		per += 1 << w.p.psidLen
	}
	base := 0
	for _, p := range w.p.pools {
		if p.Contains(r.Addr) {
			base += int(addrValue(r.Addr)-addrValue(p.Addr())) * per
			if r.PSIDLen > 0 {
				base += 1 + int(r.PSID)
			}
			return base
		}
		base += per << (32 - p.Bits())
	}
	panic("leasesim: resource " + r.String() + " is in no pool")
}

func addrValue(a netip.Addr) uint32 {
	b := a.As4()
	return uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3])
}

// touch asks for a look at a slot after this event.
func (t *truth) touch(i int) { t.dirty = append(t.dirty, i) }

// resumed notes that the packet path of a gateway may forward again: everything in it counts anew.
func (t *truth) resumed(g *gateway) {
	for i, has := range g.path.has {
		if has {
			t.touch(i)
		}
	}
}

// written follows a transaction that is on the disk now.
func (t *truth) written(x tx) {
	for _, c := range x.commits {
		t.commit(c, true)
	}
	for _, r := range x.pools {
		t.record(r)
	}
}

// commit takes one event of an address. With check it also looks for breaches.
func (t *truth) commit(c lease.Commit, check bool) {
	i := t.w.slot(c.Address.Resource)
	sl := &t.slots[i]
	if check {
		t.checkCommit(i, c)
	}
	old := sl.rec
	if old.State == lease.Bound && (c.Address.State != lease.Bound || c.Address.Host != old.Host) && t.hosts[old.Host] == i {
		delete(t.hosts, old.Host)
	}
	if sl.promise.source == old.Source && old.State == lease.Bound && (c.Address.End == lease.ReasonIdle || c.Address.End == lease.ReasonMoved) {
		sl.promise = promise{} // its holder wants no more of it
	}
	if check && c.Address.State == lease.Bound && old.State != lease.Bound && old.Host != "" && old.Host != c.Address.Host {
		t.w.counts.reused++
	}
	sl.rec = c.Address
	sl.newest = max(sl.newest, c.Address.Gen)
	if c.Address.State == lease.Bound {
		t.hosts[c.Address.Host] = i
		t.who[c.Address.Gen] = c.Address.Host
	}
	if c.Audit.Ref != (lease.Ref{}) {
		t.audits[c.Audit.Ref] = c.Audit
	}
	t.record(c.Record)
	t.touch(i)
	if check {
		t.w.book.written(old, c)
	}
}

// record takes one revision of the table that gateways follow.
func (t *truth) record(r lease.Record) {
	d := t.digests[len(t.digests)-1]
	switch r.Kind {
	case lease.KindBind:
		sl := &t.slots[t.w.slot(r.Bind.Resource)]
		if sl.has {
			d.RemoveBinding(sl.entry)
		}
		sl.has, sl.entry = true, r.Bind
		d.AddBinding(r.Bind)
	case lease.KindUnbind:
		if sl := &t.slots[t.w.slot(r.Unbind.Resource)]; sl.has {
			d.RemoveBinding(sl.entry)
			sl.has = false
		}
	case lease.KindPool:
		if !r.Pool.Removed {
			d.AddPool(r.Pool.Pool)
		}
	case lease.KindNone, lease.KindUnknown:
	}
	t.digests = append(t.digests, d)
}

// rebuild follows the log of an older copy that took the place of the disk. What clients were told stays told: a lease that
// a gateway forwards for stays with its tunnel source, for as long as Adopt can know.
func (t *truth) rebuild(d *disk) {
	kept := t.w.now + max(t.w.p.timers.Valid, t.w.grace())
	for i := range t.slots {
		sl := &t.slots[i]
		p := promise{}
		live := sl.promise.until > t.w.now && sl.rec.State == lease.Bound && sl.rec.Gen == sl.promise.gen
		for _, g := range t.w.gates {
			if live && g.forwards() && g.path.has[i] && g.path.entries[i].Gen == sl.promise.gen {
				p = promise{until: min(kept, sl.promise.until), source: g.path.entries[i].Host}
			}
		}
		sl.rec, sl.has, sl.promise, sl.granted = lease.Address{}, false, p, 0
	}
	clear(t.hosts)
	t.digests = t.digests[:1]
	t.restore = t.w.now
	t.samples = nil
	for _, x := range d.log {
		for _, c := range x.commits {
			t.commit(c, false)
		}
		for _, r := range x.pools {
			t.record(r)
		}
	}
	for i := range t.slots { // of a lease that the copy knows, it knows how long it was promised then
		sl := &t.slots[i]
		sl.copied = sl.rec.Gen
		if sl.rec.State == lease.Bound && sl.rec.Source == sl.promise.source {
			sl.promise.until = min(sl.promise.until, t.w.now+max(t.w.grace(), sl.rec.Valid))
		}
	}
}

// collected forgets promises of before a restore that nobody knows any more: every gateway that had the lease has been
// powered off since.
func (t *truth) collected(held map[lease.Resource]lease.Binding) {
	for i := range t.slots {
		sl := &t.slots[i]
		if _, ok := held[sl.res]; !ok && sl.promise.source.IsValid() && (sl.rec.State != lease.Bound || sl.rec.Source != sl.promise.source) {
			sl.promise = promise{}
		}
	}
}

// forwarded notes that a gateway stops to forward for an entry.
func (t *truth) forwarded(g *gateway, i int) {
	if !g.on {
		return
	}
	t.used(i, g.path.entries[i].Gen, min(t.w.now, g.realTime(g.path.deadline)))
}

func (t *truth) used(i int, gen lease.Gen, until time.Duration) {
	sl := &t.slots[i]
	for j := range sl.quiet {
		if sl.quiet[j].gen == gen {
			sl.quiet[j].until = max(sl.quiet[j].until, until)
			return
		}
	}
	sl.quiet = append(sl.quiet, lastUse{gen, until})
}

// lastOther returns until when a gateway forwarded for another host than this one, at a slot or one that overlaps. Of before
// a restore only leases count that the copy knows.
func (t *truth) lastOther(i int, host string) (time.Duration, string) {
	last, whose := time.Duration(-1), ""
	for _, j := range append([]int{i}, t.slots[i].overlap...) {
		for _, g := range t.w.gates {
			if g.on && g.path.has[j] {
				t.used(j, g.path.entries[j].Gen, min(t.w.now, g.realTime(g.path.deadline)))
			}
		}
		sl := &t.slots[j]
		for _, u := range sl.quiet {
			known := t.restore < 0 || u.gen.Epoch() == t.w.disk.epoch || u.gen == sl.copied
			if h := t.w.machine(t.who[u.gen]); known && h != host && u.until > last {
				last, whose = u.until, h
			}
		}
		sl.quiet = slices.DeleteFunc(sl.quiet, func(u lastUse) bool { return u.until+t.w.p.timers.HoldDown < t.w.now })
	}
	return last, whose
}

// sampleOne notes what some gateway forwards right now.
func (t *truth) sampleOne() {
	s := t.w.owner
	if s == nil || s.recover != nil || s.machineWall().Before(s.wall) {
		return // while the wall clock stands still an instant has no name
	}
	g := t.w.gates[t.w.rng.IntN(len(t.w.gates))]
	if !g.forwards() || g.path.n == 0 {
		return
	}
	i := t.w.rng.IntN(len(g.path.has))
	for !g.path.has[i] {
		i = (i + 1) % len(g.path.has)
	}
	b := g.path.entries[i]
	if b.Gen.Epoch() != s.epoch {
		return
	}
	var port uint16 = 40000
	if b.PSIDLen > 0 {
		for first := range b.Ports() {
			port = first
		}
	}
	t.samples = append(t.samples, sample{addr: b.Addr, port: port, at: s.now().Wall, gen: b.Gen})
}

// ordered notes that an operator ends whatever lease there is.
func (t *truth) ordered(i int, revoke func(lease.Resource)) {
	t.orders[t.slots[i].res] = true
	if t.slots[i].promise.source.IsValid() {
		t.slots[i].promise = promise{}
	}
	revoke(t.slots[i].res)
}

// begins forgets what was looked at after the newest time in the store, if the clock of a service that starts is behind it: the
// same times come again.
func (t *truth) begins(s *service) {
	t.samples = slices.DeleteFunc(t.samples, func(x sample) bool { return x.at.After(s.wall) && s.machineWall().Before(x.at) })
}

// history returns who may have sent from an address at an instant, as the audit log of the store answers it.
func (t *truth) history(addr netip.Addr, port uint16, at time.Time) []lease.Audit {
	var out []lease.Audit
	for _, a := range t.audits {
		if a.Addr == addr && a.HasPort(port) && !a.Bound.After(at) && (a.Fenced.IsZero() || a.Fenced.After(at)) {
			out = append(out, a)
		}
	}
	slices.SortFunc(out, func(a, b lease.Audit) int { return int(a.Gen) - int(b.Gen) })
	return out
}
