package tlsid

import "time"

// SetClock makes a source live at another time.
func (s *Source) SetClock(now func() time.Time) { s.now = now }

// TicketPeriod is for tests of what comes after it.
const TicketPeriod = ticketPeriod

// Linger is for tests of what comes after it.
const Linger = linger
