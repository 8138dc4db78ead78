package acme

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"go.uber.org/zap"

	"github.com/dstm-project/dstm/internal/pki"
	"github.com/dstm-project/dstm/internal/tlsid"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m,
		// certmagic keeps one rate limiter per account for the life of the process, and notices up to 5 s late that a
		// lock file is gone.
		goleak.IgnoreAnyFunction("github.com/caddyserver/certmagic.(*RingBufferRateLimiter).loop"),
		goleak.IgnoreAnyFunction("github.com/caddyserver/certmagic.keepLockfileFresh"))
}

func good() Config {
	return Config{
		Directory: "https://ca.example.net/dir", Listen: netip.MustParseAddrPort("[2001:db8:2::10]:443"),
		Names: []string{"lease1.example.net"}, Dir: "/var/lib/dstm/acme",
	}
}

func TestCheck(t *testing.T) {
	if err := good().Check(); err != nil {
		t.Fatal(err)
	}
	for want, change := range map[string]func(*Config){
		`acme: directory "http://ca.example.net/dir": want an https URL`: func(c *Config) { c.Directory = "http://ca.example.net/dir" },
		`acme: directory "": want an https URL`:                          func(c *Config) { c.Directory = "" },
		`acme: listen "[2001:db8:2::10]:0": want address:port`:           func(c *Config) { c.Listen = netip.AddrPortFrom(c.Listen.Addr(), 0) },
		`acme: names: none given`:                                        func(c *Config) { c.Names = nil },
		`acme: name "a b": want a DNS name or an IP address`:             func(c *Config) { c.Names = []string{"a b"} },
		`acme: dir "acme": want an absolute path`:                        func(c *Config) { c.Dir = "acme" },
	} {
		c := good()
		change(&c)
		if err := c.Check(); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("error %v, want %q", err, want)
		}
	}
}

func TestNewRefusesBadRoots(t *testing.T) {
	c := good()
	c.Root = filepath.Join(t.TempDir(), "root.pem")
	if _, err := New(c, slog.New(slog.DiscardHandler)); err == nil || !strings.HasPrefix(err.Error(), "acme: root: open ") {
		t.Errorf("missing file: %v", err)
	}
	if err := os.WriteFile(c.Root, []byte("no PEM"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := New(c, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), "no certificate in it") {
		t.Errorf("no PEM: %v", err)
	}
}

func TestLog(t *testing.T) {
	var b bytes.Buffer
	log := slog.New(slog.NewTextHandler(&b, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}}))
	z := zapTo(log).With(zap.String("b", "1"))
	z.Info("not shown")
	z.Error("shown", zap.Error(io.EOF), zap.Int("a", 2))
	if got, want := b.String(), "level=ERROR msg=shown a=2 b=1 err=EOF\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// world is a private CA, a real ACME directory whose own certificate is of that CA, and a manager that is to use it.
type world struct {
	cfg     Config
	private *x509.CertPool // of the private CA
	service *tlsid.Source  // of the private CA
	issuer  *x509.CertPool // of the directory's certificates
	client  tls.Certificate
	stop    func() // of the directory
}

func pebble(t *testing.T) string {
	t.Helper()
	path, err := exec.LookPath("pebble")
	if err == nil {
		return path
	}
	const hint = "no pebble, a real ACME server: install it with `hack/deps test`, then go test ./internal/acme/"
	if os.Getenv("DSTM_TEST_ROOT") == "1" {
		t.Fatal(hint)
	}
	t.Skip(hint)
	return ""
}

func freePort(t *testing.T) netip.AddrPort {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return netip.MustParseAddrPort(ln.Addr().String())
}

func newWorld(t *testing.T) *world {
	t.Helper()
	bin, dir := pebble(t), t.TempDir()
	if err := pki.Init(dir, "example.net", time.Hour); err != nil {
		t.Fatal(err)
	}
	issue := func(role tlsid.Role, name string) tlsid.Files {
		f, err := pki.Issue(dir, dir, tlsid.ID{TrustDomain: "example.net", Cell: "lab", Role: role, Name: name}, pki.Options{
			DNS: []string{"localhost"}, Valid: time.Hour,
		})
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	server, host := issue(tlsid.RoleSvc, "directory"), issue(tlsid.RoleHost, "host1")
	api, manage, challenge := freePort(t), freePort(t), freePort(t)
	conf, err := json.Marshal(map[string]any{"pebble": map[string]any{
		"listenAddress": api.String(), "managementListenAddress": manage.String(),
		"certificate": server.Cert, "privateKey": server.Key, "httpPort": 1, "tlsPort": challenge.Port(),
	}})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "directory.json")
	if err := os.WriteFile(file, conf, 0o600); err != nil {
		t.Fatal(err)
	}
	w := &world{private: roots(t, server.CA), cfg: Config{
		Directory: "https://localhost:" + portOf(api) + "/dir", Root: server.CA, Listen: challenge,
		Names: []string{"localhost"}, Dir: filepath.Join(dir, "acme"),
	}}
	if w.client, err = tls.LoadX509KeyPair(host.Cert, host.Key); err != nil {
		t.Fatal(err)
	}
	if w.service, err = tlsid.Open(server, tlsid.RoleSvc, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	w.startDirectory(t, bin, file)
	w.issuer = w.fetchIssuer(t, "https://localhost:"+portOf(manage)+"/roots/0")
	return w
}

// stranger is a service of another private CA.
func stranger(t *testing.T) *tlsid.Source {
	t.Helper()
	dir := t.TempDir()
	if err := pki.Init(dir, "example.net", time.Hour); err != nil {
		t.Fatal(err)
	}
	f, err := pki.Issue(dir, dir, tlsid.ID{TrustDomain: "example.net", Cell: "lab", Role: tlsid.RoleSvc, Name: "other"}, pki.Options{})
	if err != nil {
		t.Fatal(err)
	}
	s, err := tlsid.Open(f, tlsid.RoleSvc, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func portOf(a netip.AddrPort) string { return a.String()[strings.LastIndexByte(a.String(), ':')+1:] }

func roots(t *testing.T, file string) *x509.CertPool {
	t.Helper()
	pem, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	p := x509.NewCertPool()
	p.AppendCertsFromPEM(pem)
	return p
}

func (w *world) startDirectory(t *testing.T, bin, file string) {
	t.Helper()
	var out bytes.Buffer
	cmd := exec.Command(bin, "-config", file)
	cmd.Env = append(os.Environ(), "PEBBLE_VA_NOSLEEP=1", "PEBBLE_WFE_NONCEREJECT=0")
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w.stop = sync.OnceFunc(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("directory:\n%s", out.String())
		}
	})
	t.Cleanup(w.stop)
}

// fetchIssuer waits for the directory and reads the root that it issues from, which is new at each of its starts.
func (w *world) fetchIssuer(t *testing.T, url string) *x509.CertPool {
	t.Helper()
	tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: w.private}}
	defer tr.CloseIdleConnections()
	client := &http.Client{Transport: tr, Timeout: 5 * time.Second}
	var last error
	for range 100 {
		resp, err := client.Get(url)
		if err != nil {
			last = err
			time.Sleep(100 * time.Millisecond)
			continue
		}
		defer resp.Body.Close()
		pem, err := io.ReadAll(resp.Body)
		p := x509.NewCertPool()
		if err != nil || !p.AppendCertsFromPEM(pem) {
			t.Fatalf("root of the directory: %s, %v", pem, err)
		}
		return p
	}
	t.Fatalf("the directory did not start: %v", last)
	return nil
}

// run runs a manager until the end of the test or until stop is called.
func (w *world) run(t *testing.T, tm timing) (m *Manager, ready <-chan struct{}, stop func()) {
	t.Helper()
	m, err := New(w.cfg, slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatal(err)
	}
	m.timing = tm
	ctx, cancel := context.WithCancel(context.Background())
	up, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- m.Run(ctx, func() { close(up) }) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("run: %v", err)
		}
	})
	t.Cleanup(stop)
	return m, up, stop
}

func waitFor(t *testing.T, ready <-chan struct{}) {
	t.Helper()
	select {
	case <-ready:
	case <-time.After(30 * time.Second):
		t.Fatal("no certificate within 30 s")
	}
}

// handshake calls a listener of the manager's configuration and returns the certificate that it shows.
func (w *world) handshake(t *testing.T, m *Manager, certs ...tls.Certificate) (*x509.Certificate, error) {
	t.Helper()
	ln, err := tls.Listen("tcp", "127.0.0.1:0", w.service.ServerShowing(m.GetCertificate))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	served := make(chan error, 1)
	go func() {
		c, err := ln.Accept()
		if err == nil {
			defer c.Close()
			if err = c.(*tls.Conn).Handshake(); err == nil {
				_, err = c.Write([]byte{1})
			}
		}
		served <- err
	}()
	c, err := tls.Dial("tcp", ln.Addr().String(), &tls.Config{
		RootCAs: w.issuer, ServerName: "localhost", NextProtos: []string{"h2"}, Certificates: certs,
	})
	if err != nil {
		return nil, err
	}
	defer c.Close()
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil { // in TLS 1.3 a refusal comes with the first read
		return nil, err
	}
	return c.ConnectionState().PeerCertificates[0], <-served
}

// TestObtain gets a certificate from a real directory by a real tls-alpn-01, serves it together with the private CA, and
// finds it on disk again when the directory is gone.
func TestObtain(t *testing.T) {
	w := newWorld(t)
	m, ready, stop := w.run(t, timing{})
	waitFor(t, ready)
	first, err := w.handshake(t, m, w.client)
	if err != nil {
		t.Fatal(err)
	}
	if err := first.VerifyHostname("localhost"); err != nil {
		t.Error(err)
	}
	if _, err := w.handshake(t, m); err == nil || !strings.Contains(err.Error(), "certificate required") {
		t.Errorf("caller without certificate: %v", err)
	}
	foreign := &world{service: stranger(t), issuer: w.issuer}
	if _, err := foreign.handshake(t, m, w.client); err == nil || !strings.Contains(err.Error(), "certificate authority") {
		t.Errorf("caller of another CA: %v", err)
	}
	if ln, err := net.Listen("tcp", w.cfg.Listen.String()); err != nil {
		t.Errorf("the challenge listener stayed open: %v", err)
	} else {
		ln.Close()
	}
	stop()
	if _, err := m.GetCertificate(&tls.ClientHelloInfo{ServerName: "localhost"}); err == nil {
		t.Error("a stopped manager serves")
	}

	w.stop()
	m, ready, _ = w.run(t, timing{})
	waitFor(t, ready)
	again, err := w.handshake(t, m, w.client)
	if err != nil {
		t.Fatal(err)
	}
	if !again.Equal(first) {
		t.Error("another certificate after a restart without the directory")
	}
}

// TestRenew lets every certificate be due at once: new handshakes see a new one while the manager runs. It stops between
// two renewals, because certmagic remembers a renewal that was cut off for the life of the process and then waits.
func TestRenew(t *testing.T) {
	w := newWorld(t)
	m, ready, _ := w.run(t, timing{ratio: 1, every: time.Second})
	waitFor(t, ready)
	first, err := w.handshake(t, m, w.client)
	if err != nil {
		t.Fatal(err)
	}
	for range 150 {
		next, err := w.handshake(t, m, w.client)
		if err != nil {
			t.Fatal(err)
		}
		if !next.Equal(first) {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Error("no new certificate within 15 s")
}

// TestDirectoryDown: the manager waits for the directory and ends when told to, without an error.
func TestDirectoryDown(t *testing.T) {
	dir := t.TempDir()
	w := &world{cfg: Config{
		Directory: "https://" + freePort(t).String() + "/dir", Listen: freePort(t), Names: []string{"localhost"}, Dir: dir,
	}}
	_, ready, stop := w.run(t, timing{})
	select {
	case <-ready:
		t.Error("ready without a certificate")
	case <-time.After(500 * time.Millisecond):
	}
	stop()
}

// TestListenTaken: an address that is taken is found at the start.
func TestListenTaken(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c := good()
	c.Listen, c.Dir = netip.MustParseAddrPort(ln.Addr().String()), t.TempDir()
	m, err := New(c, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Run(t.Context(), func() {}); err == nil || !strings.Contains(err.Error(), "address already in use") {
		t.Errorf("run: %v", err)
	}
}
