package tlsid

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc/credentials"
)

// Conns makes the connections of one gRPC server, or of one caller, and keeps count of them: it closes those whose other
// side's certificate is taken back, and tells which are more than one caller may have. It implements
// credentials.TransportCredentials.
type Conns struct {
	s      *Source
	conf   *tls.Config
	most   int    // of one caller; 0 = no limit
	excess func() // called when there are more
	unhook func()

	mu    sync.Mutex
	open  map[*conn]struct{}
	peers map[string]int // open connections by who is on the other side
}

// Conns returns the credentials of a server or a caller with a configuration of this source. Close it when no more
// connections are made.
func (s *Source) Conns(conf *tls.Config) *Conns {
	c := &Conns{s: s, conf: conf, open: map[*conn]struct{}{}, peers: map[string]int{}}
	c.unhook = s.OnChange(c.closeRevoked)
	return c
}

// Limit says how many connections one caller may have, by its identity, or by its address when it has none; 0 = no limit.
// One that is more stays open for a moment, so that Peer.Excess can be answered with a reason. over is called for each.
func (c *Conns) Limit(most int, over func()) *Conns {
	c.most, c.excess = most, over
	return c
}

// Close forgets the connections. They stay open.
func (c *Conns) Close() { c.unhook() }

// Peer is the other side of a connection.
type Peer struct {
	credentials.CommonAuthInfo
	ID     ID
	Err    error             // instead of ID: ErrNoCert, ErrNoID or what is wrong with it
	Cert   *x509.Certificate // verified; nil = none was shown
	Excess bool              // more connections than one caller may have; this one ends soon
}

// AuthType implements credentials.AuthInfo.
func (*Peer) AuthType() string { return "tls" }

func newPeer(cs tls.ConnectionState) *Peer {
	p := &Peer{CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}, Err: ErrNoCert}
	if len(cs.PeerCertificates) > 0 {
		p.Cert = cs.PeerCertificates[0]
		p.ID, p.Err = FromCert(p.Cert)
	}
	return p
}

// conn is an open connection.
type conn struct {
	*tls.Conn
	raw  net.Conn // below TLS
	in   bool     // the other side called
	of   *Conns
	key  string
	cert *x509.Certificate
	once sync.Once
}

// Close implements net.Conn.
func (c *conn) Close() error {
	c.once.Do(func() { c.of.remove(c) })
	return c.Conn.Close()
}

// linger is how long a connection stays that is one too many, or whose caller's certificate was taken back: the calls on it
// are refused, and this is the time to say why.
const linger = time.Second

// add counts a connection, and reports whether its caller has more than it may have.
func (c *Conns) add(n *conn, p *Peer) bool {
	n.cert = p.Cert
	if n.key = p.ID.Name + "/" + string(p.ID.Role); p.Err != nil {
		n.key, _, _ = net.SplitHostPort(n.raw.RemoteAddr().String()) // of no address: all together
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.open[n] = struct{}{}
	c.peers[n.key]++
	return c.most > 0 && c.peers[n.key] > c.most
}

func (c *Conns) remove(n *conn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.open, n)
	if c.peers[n.key]--; c.peers[n.key] == 0 {
		delete(c.peers, n.key)
	}
}

// Len returns how many connections are open.
func (c *Conns) Len() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.open)
}

// closeRevoked closes what a list takes back: connections to others at once.
func (c *Conns) closeRevoked() {
	var gone, soon []net.Conn // gRPC sees that they are closed, and closes the rest
	c.mu.Lock()
	for n := range c.open {
		switch {
		case n.cert == nil || c.s.Revoked(n.cert) == nil:
		case n.in:
			soon = append(soon, n.raw)
		default:
			gone = append(gone, n.raw)
		}
	}
	c.mu.Unlock()
	c.s.m.Load().revoked(len(gone) + len(soon))
	for _, raw := range gone {
		raw.Close()
	}
	if len(soon) > 0 {
		time.AfterFunc(linger, func() {
			for _, raw := range soon {
				raw.Close()
			}
		})
	}
}

// ServerHandshake implements credentials.TransportCredentials.
func (c *Conns) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	t := tls.Server(raw, c.conf)
	err := t.Handshake()
	cs := t.ConnectionState()
	c.s.m.Load().handshake(cs, err)
	if err != nil {
		t.Close()
		return nil, nil, err
	}
	n := &conn{Conn: t, raw: raw, in: true, of: c}
	p := newPeer(cs)
	if p.Excess = c.add(n, p); p.Excess {
		c.excess()
		time.AfterFunc(linger, func() { raw.Close() })
	}
	return n, p, nil
}

// ClientHandshake implements credentials.TransportCredentials.
func (c *Conns) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conf := c.conf
	if conf.ServerName == "" { // of a gateway: its address, which is not looked at
		host, _, err := net.SplitHostPort(authority)
		if err != nil {
			host = authority
		}
		conf = conf.Clone()
		conf.ServerName = host
	}
	t := tls.Client(raw, conf)
	err := t.HandshakeContext(ctx)
	cs := t.ConnectionState()
	c.s.m.Load().handshake(cs, err)
	if err != nil {
		t.Close()
		return nil, nil, err
	}
	if cs.NegotiatedProtocol != "h2" {
		t.Close()
		return nil, nil, fmt.Errorf("tls: the other side speaks %q: want h2", cs.NegotiatedProtocol)
	}
	n := &conn{Conn: t, raw: raw, of: c}
	p := newPeer(cs)
	c.add(n, p)
	return n, p, nil
}

// Info implements credentials.TransportCredentials.
func (c *Conns) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

// Clone implements credentials.TransportCredentials. Connections are counted together.
func (c *Conns) Clone() credentials.TransportCredentials { return c }

// OverrideServerName implements credentials.TransportCredentials. The name is that of the configuration.
func (c *Conns) OverrideServerName(string) error {
	return errors.New("tls: the name of the server is configured")
}
