package lease

import "time"

// Weaken switches one rule of the core off, so that a property test can show that it would notice.
func (c *Core) Weaken(name string) {
	switch name {
	case "ack compared with generation":
		c.rules.fencedAt = func(e *entry) Rev { return e.gen.Rev() }
	case "reservation binds others":
		c.rules.takesReserved = false
	case "renewals not written":
		c.rules.writes = func(_, _ time.Duration) bool { return false }
	case "generation without revision":
		c.rules.newGen = func(cell *Cell, r Rev) Gen { return MakeGen(cell.epoch, r/16) }
	}
}

// Weaken switches one rule of the fence set off.
func (f *FenceSet) Weaken(name string) {
	switch name {
	case "deadlines forgotten at restart":
		for _, m := range f.teps {
			m.deadline = 0
		}
	case "any witness":
		f.rules.member = func(*member, string) bool { return true }
	case "witness without an answer from after the grant":
		f.rules.echo = func(uint64, time.Duration) bool { return true }
	case "witness without a continuous session":
		f.rules.continuous = func(time.Duration, time.Duration) bool { return true }
	}
}
