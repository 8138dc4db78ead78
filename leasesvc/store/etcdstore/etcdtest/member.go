package etcdtest

import (
	"encoding/json"
	"fmt"
	"io"
	"net/url"
	"os"

	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
)

// memberEnv holds the configuration of a child process that is a member.
const memberEnv = "ETCDTEST_MEMBER"

// config is one member.
type config struct {
	Name, Dir, Peer, Client, Initial string
	TLS                              TLS
}

// TLS names the PEM files with which members take clients; without them they take plain text.
type TLS struct{ Cert, Key, CA string }

// Main belongs at the beginning of TestMain: in a child process of Start it is the member, and never returns.
func Main() {
	text, ok := os.LookupEnv(memberEnv)
	if !ok {
		return
	}
	if err := run(text); err != nil {
		fmt.Fprintln(os.Stderr, "etcdtest:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// run is a member until the parent closes standard input, or dies.
func run(text string) error {
	var c config
	if err := json.Unmarshal([]byte(text), &c); err != nil {
		return err
	}
	cfg := embed.NewConfig()
	cfg.Name, cfg.Dir, cfg.InitialCluster = c.Name, c.Dir, c.Initial
	cfg.Logger, cfg.LogLevel = "zap", "error"
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	peer, client, err := parse(c.Peer, c.Client)
	if err != nil {
		return err
	}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{client}, []url.URL{client}
	if c.TLS != (TLS{}) {
		cfg.ClientTLSInfo.CertFile, cfg.ClientTLSInfo.KeyFile = c.TLS.Cert, c.TLS.Key
		cfg.ClientTLSInfo.TrustedCAFile, cfg.ClientTLSInfo.ClientCertAuth = c.TLS.CA, true
	}
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		return err
	}
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	return <-e.Err()
}

func parse(peer, client string) (p, c url.URL, err error) {
	pp, err := url.Parse(peer)
	if err != nil {
		return p, c, err
	}
	cc, err := url.Parse(client)
	if err != nil {
		return p, c, err
	}
	return *pp, *cc, nil
}
