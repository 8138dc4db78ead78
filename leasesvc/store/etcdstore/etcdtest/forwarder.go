package etcdtest

import (
	"context"
	"net"
	"strings"
	"sync"
)

// Path is one client's own way to the members, which can be cut while they and other clients live on.
type Path struct {
	scheme string
	to     []*forwarder
}

// Path makes a way to the members.
func (c *Cluster) Path() (*Path, error) {
	p := &Path{}
	for _, m := range c.members {
		scheme, host, _ := strings.Cut(m.cfg.Client, "://")
		f, err := newForwarder(host)
		if err != nil {
			p.Close()
			return nil, err
		}
		p.scheme, p.to = scheme, append(p.to, f)
	}
	return p, nil
}

// Endpoints returns the URLs of the members along this path.
func (p *Path) Endpoints() []string {
	var out []string
	for _, f := range p.to {
		out = append(out, p.scheme+"://"+f.addr)
	}
	return out
}

// Cut lets every byte vanish silently, as a partition of the network does, until Join.
func (p *Path) Cut() {
	for _, f := range p.to {
		f.cut(true)
	}
}

// Join ends a Cut. Connections that were cut are closed, for their streams lack bytes.
func (p *Path) Join() {
	for _, f := range p.to {
		f.cut(false)
	}
}

// Close ends the path.
func (p *Path) Close() {
	for _, f := range p.to {
		f.close()
	}
}

// forwarder passes connections on to one address.
type forwarder struct {
	addr string // where it listens
	to   string
	l    net.Listener
	wg   sync.WaitGroup

	mu     sync.Mutex
	closed bool
	broken bool
	conns  map[net.Conn]bool
}

func newForwarder(to string) (*forwarder, error) {
	l, err := net.Listen("tcp", "[::1]:0")
	if err != nil {
		return nil, err
	}
	f := &forwarder{addr: l.Addr().String(), to: to, l: l, conns: map[net.Conn]bool{}}
	f.wg.Go(f.accept)
	return f, nil
}

func (f *forwarder) accept() {
	for {
		in, err := f.l.Accept()
		if err != nil {
			return
		}
		if !f.add(in) {
			in.Close()
			continue
		}
		f.wg.Go(func() { f.forward(in) })
	}
}

// add keeps a connection to be closed later.
func (f *forwarder) add(c net.Conn) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return false
	}
	f.conns[c] = true
	return true
}

func (f *forwarder) drop(c net.Conn) {
	c.Close()
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.conns, c)
}

func (f *forwarder) forward(in net.Conn) {
	defer f.drop(in)
	var d net.Dialer
	out, err := d.DialContext(context.Background(), "tcp", f.to)
	if err != nil || !f.add(out) {
		return
	}
	defer f.drop(out)
	done := make(chan struct{})
	go func() {
		defer close(done)
		f.copy(out, in)
		out.Close()
	}()
	f.copy(in, out)
	in.Close()
	<-done
}

// copy passes bytes on; while the forwarder is cut it swallows them.
func (f *forwarder) copy(to, from net.Conn) {
	b := make([]byte, 64<<10)
	for {
		n, err := from.Read(b)
		if n > 0 && !f.isCut() {
			if _, werr := to.Write(b[:n]); werr != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

func (f *forwarder) isCut() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.broken
}

func (f *forwarder) cut(on bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.broken = on
	if !on {
		for c := range f.conns {
			c.Close()
		}
	}
}

func (f *forwarder) close() {
	f.mu.Lock()
	f.closed = true
	for c := range f.conns {
		c.Close()
	}
	f.mu.Unlock()
	f.l.Close()
	f.wg.Wait()
}
