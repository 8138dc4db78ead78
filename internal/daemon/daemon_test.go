package daemon

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

func TestRunReturnsFirstErrorWithTaskName(t *testing.T) {
	boom := errors.New("boom")
	waits := NewTask("waits", func(ctx context.Context, ready func()) error { ready(); <-ctx.Done(); return ctx.Err() })
	fails := NewTask("fails", func(context.Context, func()) error { return boom })
	err := Run(t.Context(), quiet(), waits, fails)
	if !errors.Is(err, boom) || err.Error() != "fails: boom" {
		t.Errorf("error %v, want fails: boom", err)
	}
}

func TestRunTellsServiceManager(t *testing.T) {
	sock := filepath.Join(t.TempDir(), "n")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: sock, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	t.Setenv("NOTIFY_SOCKET", sock)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- Run(ctx, quiet(), NewTask("a", func(ctx context.Context, ready func()) error { ready(); <-ctx.Done(); return nil }))
	}()
	read := func() string {
		b := make([]byte, 64)
		_ = c.SetReadDeadline(time.Now().Add(30 * time.Second))
		n, err := c.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		return string(b[:n])
	}
	if got := read(); got != "READY=1" {
		t.Errorf("first message %q, want READY=1", got)
	}
	cancel()
	if got := read(); got != "STOPPING=1" {
		t.Errorf("second message %q, want STOPPING=1", got)
	}
	if err := <-done; err != nil {
		t.Errorf("Run returned %v, want nil after the context's end", err)
	}
}

func TestExitCode(t *testing.T) {
	plain := errors.New("x")
	for _, c := range []struct {
		name string
		err  error
		want int
	}{
		{"none", nil, 0},
		{"plain", plain, 1},
		{"usage", Usage(plain), 2},
		{"missing", Missing(plain), 3},
		{"usage of nil", Usage(nil), 0},
		{"wrapped", errors.Join(Missing(plain)), 3},
	} {
		if got := ExitCode(c.err); got != c.want {
			t.Errorf("%s: exit code %d, want %d", c.name, got, c.want)
		}
	}
}

func TestAdminPages(t *testing.T) {
	notReady := errors.New("table not synced")
	a := &Admin{
		Registry: NewRegistry(),
		Ready:    func() error { return notReady },
		Handlers: map[string]http.Handler{
			"GET /status": JSON("dstm.status/1", func(*http.Request) (any, error) { return map[string]int{"leases": 3}, nil }),
			"GET /bad":    JSON("dstm.bad/1", func(*http.Request) (any, error) { return []int{1}, nil }),
		},
	}
	s := httptest.NewServer(a.Handler())
	defer s.Close()
	for _, c := range []struct {
		path string
		code int
		body string
	}{
		{"/healthz", 200, "ok\n"},
		{"/readyz", 503, "table not synced\n"},
		{"/status", 200, `{"schema":"dstm.status/1","leases":3}` + "\n"},
		{"/bad", 500, "json of schema dstm.bad/1: []int is not an object\n"},
		{"/metrics", 200, "go_goroutines"},
		{"/debug/pprof/cmdline", 200, ""},
	} {
		resp, err := http.Get(s.URL + c.path)
		if err != nil {
			t.Fatal(err)
		}
		var b bytes.Buffer
		if _, err := b.ReadFrom(resp.Body); err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != c.code || !strings.Contains(b.String(), c.body) {
			t.Errorf("%s: %d %q, want %d %q", c.path, resp.StatusCode, b.String(), c.code, c.body)
		}
	}
}

func TestCheckAdmin(t *testing.T) {
	if err := CheckAdmin(netip.MustParseAddrPort("[2001:db8::1]:9545")); err == nil || !strings.Contains(err.Error(), "want a loopback address such as [::1]:9545") {
		t.Errorf("error %v, want one that asks for loopback", err)
	}
	for _, ok := range []netip.AddrPort{{}, netip.MustParseAddrPort("[::1]:9545"), netip.MustParseAddrPort("127.0.0.1:1")} {
		if err := CheckAdmin(ok); err != nil {
			t.Errorf("%v: %v", ok, err)
		}
	}
}

func TestLogConfig(t *testing.T) {
	for _, c := range []struct {
		cfg  LogConfig
		want string
	}{
		{LogConfig{}, ""},
		{LogConfig{"debug", "json"}, ""},
		{LogConfig{"loud", ""}, `log level "loud": want debug, info, warn or error`},
		{LogConfig{"", "xml"}, `log format "xml": want text or json`},
	} {
		got := ""
		if err := c.cfg.Check(); err != nil {
			got = err.Error()
		}
		if got != c.want {
			t.Errorf("%+v: %q, want %q", c.cfg, got, c.want)
		}
	}
	var b bytes.Buffer
	LogConfig{Level: "warn", Format: "json"}.Logger(&b).Info("hidden")
	if b.Len() != 0 {
		t.Errorf("info logged at level warn: %s", b.String())
	}
}
