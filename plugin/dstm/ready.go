package dstm

// Ready implements ready.Readiness: true once the host table is complete, or once the lease service was tried in vain.
// Names resolve in either case; a lease service that is down must not take the resolvers down with it.
func (d *DSTM) Ready() bool {
	return d.client != nil && d.client.tried.Load()
}
