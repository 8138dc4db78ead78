package tlsid

import (
	"crypto/tls"
	"crypto/x509"
	"sync"
)

// session is the session that a caller can resume: the newest. It implements tls.ClientSessionCache.
type session struct {
	s *Source

	mu    sync.Mutex
	key   string
	state *tls.ClientSessionState
	as    *x509.Certificate // own certificate of then; nil = none
}

// Get implements tls.ClientSessionCache. A session of a certificate that was replaced since is not resumed: the other side
// would go on seeing the old one.
func (c *session) Get(key string) (*tls.ClientSessionState, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state == nil || c.key != key || c.as != c.s.cur.Load().cert.Leaf {
		return nil, false
	}
	return c.state, true
}

// Put implements tls.ClientSessionCache.
func (c *session) Put(key string, state *tls.ClientSessionState) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.key, c.state, c.as = key, state, c.s.cur.Load().cert.Leaf
}

func (c *session) forget() { c.Put("", nil) }
