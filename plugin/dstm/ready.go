package dstm

// Ready implements ready.Readiness: true once the list of hosts was received, or could not be. DNS never waits for leases,
// so a lease service that is down keeps no resolver out of service; a resolver that starts beside a healthy one knows
// its hosts before it is asked.
func (d *DSTM) Ready() bool { return d.client != nil && d.client.tried.Load() }
