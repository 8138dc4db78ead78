// policy-webhook is an admission policy for DSTM leases that asks an HTTP endpoint. It is an example of a plugin as third
// parties write them: of DSTM it uses only what other modules can import. README.md says how to run it.
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"flag"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/dstm-project/dstm/leasesvc/policy/policyplugin"
)

func main() {
	if err := run(context.Background(), os.Args[1:]); err != nil {
		slog.Error("policy-webhook", "err", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	w, err := parse(args)
	if err != nil {
		return err
	}
	return policyplugin.Serve(ctx, w)
}

// parse makes the policy that the arguments describe.
func parse(args []string) (*webhook, error) {
	fs := flag.NewFlagSet("policy-webhook", flag.ContinueOnError)
	var files tlsFiles
	endpoint := fs.String("url", "", "`URL` to ask; https, or http to this machine")
	tokenFile := fs.String("token-file", "", "`file` with a bearer token")
	fs.StringVar(&files.ca, "ca", "", "PEM `file` with the authorities of the endpoint; default: the system's")
	fs.StringVar(&files.cert, "cert", "", "PEM `file` with our certificate")
	fs.StringVar(&files.key, "key", "", "PEM `file` with its key")
	size := fs.Int("cache", 4096, "how many answers are kept; 0 = none")
	ttl := fs.Duration("ttl", 30*time.Second, "how long an answer that allows is kept; 0 = not")
	negative := fs.Duration("negative-ttl", 5*time.Second, "how long an answer that denies is kept; 0 = not")
	if err := fs.Parse(args); err != nil {
		return nil, err
	}
	if fs.NArg() > 0 {
		return nil, fmt.Errorf("unexpected argument %q", fs.Arg(0))
	}
	if err := checkURL(*endpoint); err != nil {
		return nil, fmt.Errorf("url: %w", err)
	}
	if *size < 0 || *size > 1<<20 || *ttl < 0 || *negative < 0 {
		return nil, fmt.Errorf("cache %d, ttl %s, negative-ttl %s: want 0 or more, and at most %d answers", *size, *ttl, *negative, 1<<20)
	}
	token, err := readToken(*tokenFile)
	if err != nil {
		return nil, err
	}
	conf, err := files.load()
	if err != nil {
		return nil, err
	}
	return &webhook{
		url: *endpoint, token: token, client: newClient(conf),
		cache: newCache(*size, *ttl, *negative, time.Now),
	}, nil
}

// checkURL wants an endpoint that nobody on the way can impersonate.
func checkURL(s string) error {
	u, err := url.Parse(s)
	if err != nil {
		return err
	}
	addr, _ := netip.ParseAddr(u.Hostname())
	if u.Host == "" || u.Scheme != "https" && (u.Scheme != "http" || !addr.IsLoopback()) {
		return fmt.Errorf("%q: want https://..., or http:// and a loopback address", s)
	}
	return nil
}

func readToken(file string) (string, error) {
	if file == "" {
		return "", nil
	}
	b, err := os.ReadFile(file)
	token := strings.TrimSpace(string(b))
	if err == nil && (token == "" || strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' })) {
		err = fmt.Errorf("%s: want one word", file)
	}
	if err != nil {
		return "", fmt.Errorf("token: %w", err)
	}
	return token, nil
}

type tlsFiles struct{ ca, cert, key string }

func (f tlsFiles) load() (*tls.Config, error) {
	conf := &tls.Config{MinVersion: tls.VersionTLS12}
	if f.ca != "" {
		b, err := os.ReadFile(f.ca)
		if err != nil {
			return nil, fmt.Errorf("ca: %w", err)
		}
		conf.RootCAs = x509.NewCertPool()
		if !conf.RootCAs.AppendCertsFromPEM(b) {
			return nil, fmt.Errorf("ca: %s has no certificate", f.ca)
		}
	}
	if f.cert != "" || f.key != "" {
		pair, err := tls.LoadX509KeyPair(f.cert, f.key)
		if err != nil {
			return nil, fmt.Errorf("cert: %w", err)
		}
		conf.Certificates = []tls.Certificate{pair}
	}
	return conf, nil
}

// newClient keeps as many connections open as the lease service asks questions at a time: a new one would cost more than the
// budget of an answer. It follows no redirects, since they could lead anywhere.
func newClient(conf *tls.Config) *http.Client {
	const most = 64
	return &http.Client{
		Transport: &http.Transport{
			TLSClientConfig: conf, ForceAttemptHTTP2: true, MaxIdleConns: most, MaxIdleConnsPerHost: most, MaxConnsPerHost: most,
			IdleConnTimeout: 5 * time.Minute, MaxResponseHeaderBytes: 16 << 10,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}
