// Package etcdtest runs real etcd members for tests: child processes of the test's own binary, on loopback, that can be
// killed and paused.
package etcdtest

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

// patience is how long the cluster may take to come up.
const patience = 30 * time.Second

// Options of a cluster.
type Options struct {
	Dir     string // members keep their files below it
	Members int
	TLS     TLS         // of the members; none = plain text
	Client  *tls.Config // of the cluster's own client
}

// Cluster is a set of members.
type Cluster struct {
	members []*member
	// Client talks to all members, past every Path.
	Client *clientv3.Client
}

type member struct {
	cfg   config
	cmd   *exec.Cmd // nil = stopped
	stdin io.Closer
}

// Start starts a cluster and waits until it has a leader. Main must stand in TestMain.
func Start(o Options) (*Cluster, error) {
	c := &Cluster{}
	scheme := "http"
	if o.TLS != (TLS{}) {
		scheme = "https"
	}
	var initial []string
	for i := range o.Members {
		hosts, err := FreeHosts(2)
		if err != nil {
			return nil, err
		}
		name := fmt.Sprintf("e%d", i+1)
		m := &member{cfg: config{
			Name: name, Dir: filepath.Join(o.Dir, name), TLS: o.TLS, Peer: "http://" + hosts[0], Client: scheme + "://" + hosts[1],
		}}
		c.members = append(c.members, m)
		initial = append(initial, name+"="+m.cfg.Peer)
	}
	for i, m := range c.members {
		m.cfg.Initial = strings.Join(initial, ",")
		if err := c.Restart(i); err != nil {
			return nil, errors.Join(err, c.Close())
		}
	}
	client, err := clientv3.New(clientv3.Config{Endpoints: c.Endpoints(), TLS: o.Client, Logger: zap.NewNop()})
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	c.Client = client
	for end := time.Now().Add(patience); c.Leader() < 0; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			return nil, errors.Join(fmt.Errorf("etcdtest: no leader after %s", patience), c.Close())
		}
	}
	return c, nil
}

// Ports of members lie below those that systems choose for outgoing connections (Linux: from 32768 on), one of which would
// take the place of a member that is down.
const lowestPort, highestPort = 10000, 32767

// FreeHosts returns addresses on loopback whose ports were free just now and are not chosen for outgoing connections.
func FreeHosts(n int) ([]string, error) {
	var out []string
	for tries := 0; len(out) < n; tries++ {
		port := lowestPort + rand.IntN(highestPort-lowestPort+1)
		l, err := net.Listen("tcp", fmt.Sprintf("[::1]:%d", port))
		if err != nil {
			if tries == 100 {
				return nil, err
			}
			continue
		}
		defer l.Close() // after all are chosen, so that they differ
		out = append(out, l.Addr().String())
	}
	return out, nil
}

// Restart starts a stopped member, with what it has on disk.
func (c *Cluster) Restart(i int) error {
	m := c.members[i]
	text, err := json.Marshal(m.cfg)
	if err != nil {
		return err
	}
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), memberEnv+"="+string(text))
	cmd.Stderr = os.Stderr
	if m.stdin, err = cmd.StdinPipe(); err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	m.cmd = cmd
	return nil
}

// Stop kills a member.
func (c *Cluster) Stop(i int) {
	m := c.members[i]
	if m.cmd == nil {
		return
	}
	_ = m.cmd.Process.Kill()
	_ = m.cmd.Wait() // says that it was killed
	m.stdin.Close()
	m.cmd = nil
}

// Pause stops a member's process where it is, until Resume.
func (c *Cluster) Pause(i int) error { return c.members[i].cmd.Process.Signal(syscall.SIGSTOP) }

// Resume ends a Pause.
func (c *Cluster) Resume(i int) error { return c.members[i].cmd.Process.Signal(syscall.SIGCONT) }

// Endpoints returns the URLs for clients.
func (c *Cluster) Endpoints() []string {
	var out []string
	for _, m := range c.members {
		out = append(out, m.cfg.Client)
	}
	return out
}

// Leader returns the index of the member that leads and has a majority behind it, -1 without one.
func (c *Cluster) Leader() int {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if _, err := c.Client.Get(ctx, "leader?"); err != nil {
		return -1
	}
	for i, m := range c.members {
		if m.cmd == nil {
			continue
		}
		if r, err := c.Client.Status(ctx, m.cfg.Client); err == nil && r.Leader == r.Header.MemberId {
			return i
		}
	}
	return -1
}

// Close kills all members.
func (c *Cluster) Close() error {
	for i := range c.members {
		c.Stop(i)
	}
	if c.Client == nil {
		return nil
	}
	return c.Client.Close()
}
