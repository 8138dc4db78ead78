// Package etcdtest runs real etcd members inside a test's process, on loopback and in files of the test.
package etcdtest

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
)

// patience is how long a member may take to come up.
const patience = 30 * time.Second

// Cluster is a set of members that can be stopped and started again.
type Cluster struct {
	dir     string
	members []*member
}

type member struct {
	cfg *embed.Config

	mu   sync.Mutex
	etcd *embed.Etcd // nil = stopped
}

// Start starts a cluster of n members with its files below dir. configure may change the configuration of each.
func Start(dir string, n int, configure func(*embed.Config)) (*Cluster, error) {
	c := &Cluster{dir: dir}
	var initial []string
	for i := range n {
		cfg := embed.NewConfig()
		cfg.Name = fmt.Sprintf("e%d", i+1)
		cfg.Dir = filepath.Join(dir, cfg.Name)
		cfg.Logger = "zap"
		cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
		urls, err := freeURLs(2)
		if err != nil {
			return nil, err
		}
		cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = urls[:1], urls[:1]
		cfg.ListenClientUrls, cfg.AdvertiseClientUrls = urls[1:], urls[1:]
		if configure != nil {
			configure(cfg)
		}
		c.members = append(c.members, &member{cfg: cfg})
		initial = append(initial, cfg.Name+"="+urls[0].String())
	}
	var wg sync.WaitGroup
	errs := make([]error, n)
	for i, m := range c.members {
		m.cfg.InitialCluster = strings.Join(initial, ",")
		wg.Go(func() { errs[i] = m.start() })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

// freeURLs returns URLs of loopback ports that were free just now.
func freeURLs(n int) ([]url.URL, error) {
	var urls []url.URL
	for range n {
		l, err := net.Listen("tcp", "[::1]:0")
		if err != nil {
			return nil, err
		}
		defer l.Close() // after all are chosen, so that they differ
		urls = append(urls, url.URL{Scheme: "http", Host: l.Addr().String()})
	}
	return urls, nil
}

func (m *member) start() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.etcd != nil {
		return nil
	}
	e, err := embed.StartEtcd(m.cfg)
	if err != nil {
		return fmt.Errorf("%s: %w", m.cfg.Name, err)
	}
	select {
	case <-e.Server.ReadyNotify():
		m.etcd = e
		return nil
	case err := <-e.Err():
		e.Close()
		return fmt.Errorf("%s: %w", m.cfg.Name, err)
	case <-time.After(patience):
		e.Close()
		return fmt.Errorf("%s: not ready after %s", m.cfg.Name, patience)
	}
}

func (m *member) stop() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.etcd != nil {
		m.etcd.Close()
		m.etcd = nil
	}
}

// Endpoints returns the URLs for clients.
func (c *Cluster) Endpoints() []string {
	var out []string
	for _, m := range c.members {
		out = append(out, m.cfg.ListenClientUrls[0].String())
	}
	return out
}

// Leader returns the index of the member that leads, -1 without one.
func (c *Cluster) Leader() int {
	for i, m := range c.members {
		m.mu.Lock()
		e := m.etcd
		m.mu.Unlock()
		if e != nil && e.Server.Leader() == e.Server.MemberID() {
			return i
		}
	}
	return -1
}

// Stop stops a member.
func (c *Cluster) Stop(i int) { c.members[i].stop() }

// Restart starts a stopped member again, with what it has on disk.
func (c *Cluster) Restart(i int) error { return c.members[i].start() }

// Close stops all members and removes their files.
func (c *Cluster) Close() error {
	var wg sync.WaitGroup
	for _, m := range c.members {
		wg.Go(m.stop)
	}
	wg.Wait()
	var errs []error
	for _, m := range c.members {
		errs = append(errs, os.RemoveAll(m.cfg.Dir))
	}
	return errors.Join(errs...)
}
