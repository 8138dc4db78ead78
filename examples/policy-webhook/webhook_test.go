package main

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	policyv1 "github.com/dstm-project/dstm/api/policy/v1"
)

// endpoint answers each question with what it is given. It counts them.
type endpoint struct {
	*httptest.Server
	asked atomic.Int64
}

func newEndpoint(t *testing.T, answer http.HandlerFunc) *endpoint {
	t.Helper()
	e := &endpoint{}
	e.Server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		e.asked.Add(1)
		answer(w, r)
	}))
	t.Cleanup(e.Close)
	return e
}

// ca is a file with the endpoint's certificate.
func (e *endpoint) ca(t *testing.T) string {
	t.Helper()
	return file(t, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: e.Certificate().Raw}))
}

func file(t *testing.T, b []byte) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

func (e *endpoint) webhook(t *testing.T, args ...string) *webhook {
	t.Helper()
	w, err := parse(append([]string{"--url", e.URL + "/lease", "--ca", e.ca(t)}, args...))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.client.CloseIdleConnections)
	return w
}

func says(code int, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(code)
		_, _ = io.WriteString(w, body)
	}
}

func request() *policyv1.DecideRequest {
	return &policyv1.DecideRequest{Host: "lap7", Source: "2001:db8:1::7", Trigger: policyv1.Trigger_TRIGGER_DNS, Pool: "main"}
}

func TestQuestion(t *testing.T) {
	e := newEndpoint(t, func(w http.ResponseWriter, r *http.Request) {
		got, err := io.ReadAll(r.Body)
		const want = `{"schema":"dstm.policy/1","host":"lap7","source":"2001:db8:1::7","trigger":"dns","pool":"main"}`
		if err != nil || string(got) != want {
			t.Errorf("body %s, %v; want %s", got, err, want)
		}
		if r.Method != "POST" || r.URL.Path != "/lease" || r.Header.Get("Content-Type") != "application/json" || r.Header.Get("Authorization") != "Bearer s3cret" {
			t.Errorf("%s %s %v", r.Method, r.URL, r.Header)
		}
		_, _ = io.WriteString(w, `{"allow": true}`)
	})
	m, err := e.webhook(t, "--token-file", file(t, []byte("s3cret\n"))).Decide(t.Context(), request())
	if err != nil || m.GetVerdict() != policyv1.Verdict_ALLOW {
		t.Errorf("%v, %v", m, err)
	}
}

func TestAnswers(t *testing.T) {
	long := strings.Repeat("x", 199) + "ä"
	for _, c := range []struct {
		name    string
		code    int
		body    string
		verdict policyv1.Verdict
		reason  string
		err     string
	}{
		{"allow", 200, `{"allow":true}`, policyv1.Verdict_ALLOW, "", ""},
		{"deny", 200, `{"allow":false,"reason":"not today","more":[1]}`, policyv1.Verdict_DENY, "not today", ""},
		{"long reason", 200, `{"allow":false,"reason":"` + long + `"}`, policyv1.Verdict_DENY, long[:199], ""},
		{"no verdict", 200, `{"reason":"?"}`, 0, "", `endpoint's answer has no "allow"`},
		{"null", 200, `null`, 0, "", `endpoint's answer has no "allow"`},
		{"text for a verdict", 200, `{"allow":"yes"}`, 0, "", "endpoint's answer: json: cannot unmarshal"},
		{"not json", 200, `yes`, 0, "", "endpoint's answer: invalid character"},
		{"two values", 200, `{"allow":true}{"allow":false}`, 0, "", "endpoint's answer: invalid character"},
		{"empty", 200, ``, 0, "", "endpoint's answer: unexpected end"},
		{"too long", 200, `{"allow":true,"x":"` + strings.Repeat("x", maxReply) + `"}`, 0, "", "endpoint answers more than 16384 bytes"},
		{"error", 503, `{"allow":true}`, 0, "", "endpoint answers 503, want 200"},
		{"created", 201, `{"allow":true}`, 0, "", "endpoint answers 201, want 200"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newEndpoint(t, says(c.code, c.body)).webhook(t)
			m, err := w.Decide(t.Context(), request())
			if c.err != "" {
				if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), c.err) {
					t.Errorf("%v, %v; want %q", m, err, c.err)
				}
				return
			}
			if err != nil || m.GetVerdict() != c.verdict || m.GetReason() != c.reason {
				t.Errorf("%v, %v; want %s %q", m, err, c.verdict, c.reason)
			}
		})
	}
}

func TestRedirectIsNotFollowed(t *testing.T) {
	other := newEndpoint(t, says(200, `{"allow":true}`))
	e := newEndpoint(t, func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, other.URL, http.StatusTemporaryRedirect)
	})
	if m, err := e.webhook(t).Decide(t.Context(), request()); status.Code(err) != codes.Unavailable || other.asked.Load() != 0 {
		t.Errorf("%v, %v, other asked %d times", m, err, other.asked.Load())
	}
}

func TestStrangersCertificate(t *testing.T) {
	e := newEndpoint(t, says(200, `{"allow":true}`))
	w, err := parse([]string{"--url", e.URL}) // with the system's authorities
	if err != nil {
		t.Fatal(err)
	}
	if m, err := w.Decide(t.Context(), request()); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "certificate") || e.asked.Load() != 0 {
		t.Errorf("%v, %v, asked %d times", m, err, e.asked.Load())
	}
}

// TestDeadline: the deadline of the lease service ends the question, and nothing is kept.
func TestDeadline(t *testing.T) {
	var slow atomic.Bool
	slow.Store(true)
	e := newEndpoint(t, func(w http.ResponseWriter, r *http.Request) {
		if slow.Load() {
			_, _ = io.Copy(io.Discard, r.Body) // or the server does not see that the client has gone
			<-r.Context().Done()
			return
		}
		_, _ = io.WriteString(w, `{"allow":true}`)
	})
	w := e.webhook(t)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if m, err := w.Decide(ctx, request()); status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("%v, %v; want the deadline", m, err)
	}
	slow.Store(false)
	if m, err := w.Decide(t.Context(), request()); err != nil || m.GetVerdict() != policyv1.Verdict_ALLOW {
		t.Errorf("afterwards %v, %v", m, err)
	}
}

func TestCache(t *testing.T) {
	body := `{"allow":true}`
	e := newEndpoint(t, func(w http.ResponseWriter, r *http.Request) { says(200, body)(w, r) })
	w := e.webhook(t, "--cache", "2", "--ttl", "30s", "--negative-ttl", "5s")
	now := time.Now()
	w.cache.now = func() time.Time { return now }
	for i, c := range []struct {
		after time.Duration // since the step before
		host  string
		body  string
		want  string // verdict
		asked int64  // in all
	}{
		{0, "a", `{"allow":true}`, "ALLOW", 1},
		{30*time.Second - 1, "a", `{"allow":false}`, "ALLOW", 1},
		{1, "a", `{"allow":false}`, "DENY", 2},
		{5*time.Second - 1, "a", `{"allow":true}`, "DENY", 2},
		{1, "a", `{"allow":true}`, "ALLOW", 3},
		{0, "b", `{"allow":true}`, "ALLOW", 4},
		{0, "a", `{"allow":false}`, "ALLOW", 4}, // the last one used
		{0, "c", `{"allow":true}`, "ALLOW", 5},  // takes the place of b
		{0, "a", `{"allow":false}`, "ALLOW", 5},
		{0, "b", `{"allow":false}`, "DENY", 6},
		{0, "x", `broken`, "", 7},
		{0, "x", `{"allow":true}`, "ALLOW", 8}, // an error is not kept
	} {
		now = now.Add(c.after)
		body = c.body
		r := request()
		r.Host = c.host
		m, err := w.Decide(t.Context(), r)
		if got := m.GetVerdict().String(); (c.want != "" && got != c.want) || (err == nil) != (c.want != "") || e.asked.Load() != c.asked {
			t.Errorf("step %d: %s, %v, asked %d times; want %s, %d", i, got, err, e.asked.Load(), c.want, c.asked)
		}
		if n := w.cache.entries.Len(); n > 2 {
			t.Fatalf("step %d: %d answers kept", i, n)
		}
	}
}

// TestCacheKeepsApart: every part of the question counts.
func TestCacheKeepsApart(t *testing.T) {
	e := newEndpoint(t, says(200, `{"allow":true}`))
	w := e.webhook(t)
	changes := []func(*policyv1.DecideRequest){
		func(*policyv1.DecideRequest) {},
		func(r *policyv1.DecideRequest) { r.Host = "lap8" },
		func(r *policyv1.DecideRequest) { r.Source = "2001:db8:1::8" },
		func(r *policyv1.DecideRequest) { r.Trigger = policyv1.Trigger_TRIGGER_PACKET },
		func(r *policyv1.DecideRequest) { r.Pool = "guests" },
	}
	for range 2 {
		for _, change := range changes {
			r := request()
			change(r)
			if _, err := w.Decide(t.Context(), r); err != nil {
				t.Fatal(err)
			}
		}
	}
	if n := e.asked.Load(); n != int64(len(changes)) {
		t.Errorf("asked %d times, want %d", n, len(changes))
	}
}

func TestCacheOff(t *testing.T) {
	for _, args := range [][]string{{"--cache", "0"}, {"--ttl", "0s"}} {
		e := newEndpoint(t, says(200, `{"allow":true}`))
		w := e.webhook(t, args...)
		for range 3 {
			if _, err := w.Decide(t.Context(), request()); err != nil {
				t.Fatal(err)
			}
		}
		if e.asked.Load() != 3 {
			t.Errorf("%v: asked %d times, want 3", args, e.asked.Load())
		}
	}
}

func TestArguments(t *testing.T) {
	empty, pair := file(t, nil), file(t, []byte("two words"))
	for _, c := range []struct{ args, want string }{
		{"", `url: "": want https://..., or http:// and a loopback address`},
		{"--url http://192.0.2.1/", "want https"},
		{"--url http://localhost/", "a loopback address"},
		{"--url ftp://[::1]/", "want https"},
		{"--url https:///x", "want https"},
		{"--url https://[::1", "missing ']'"},
		{"--url https://x --cache -1", "cache -1, ttl 30s, negative-ttl 5s: want 0 or more"},
		{"--url https://x --ttl -1s", "ttl -1s"},
		{"--url https://x --token-file /nowhere", "token: open /nowhere"},
		{"--url https://x --token-file " + empty, "want one word"},
		{"--url https://x --token-file " + pair, "want one word"},
		{"--url https://x --ca " + empty, "has no certificate"},
		{"--url https://x --cert " + empty, "cert: "},
		{"--url https://x y", `unexpected argument "y"`},
	} {
		if _, err := parse(strings.Fields(c.args)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error %v, want %q", c.args, err, c.want)
		}
	}
	for _, url := range []string{"https://policy.example.net/x?y=z", "http://[::1]:8080/", "http://127.0.0.1/"} {
		if _, err := parse([]string{"--url", url}); err != nil {
			t.Errorf("%s: %v", url, err)
		}
	}
}

// TestReadme: the arguments of README.md are there, with these defaults.
func TestReadme(t *testing.T) {
	b, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, _ := strings.Cut(string(b), "\n| argument |")
	args := regexp.MustCompile("`--([a-z-]+)`").FindAllStringSubmatch(table, -1)
	if len(args) < 8 {
		t.Fatalf("arguments %v", args)
	}
	for _, a := range args {
		if _, err := parse([]string{"--" + a[1]}); err == nil || !strings.Contains(err.Error(), "flag needs an argument") {
			t.Errorf("--%s: %v", a[1], err)
		}
	}
	w, err := parse([]string{"--url", "https://policy.example.net/"})
	if err != nil {
		t.Fatal(err)
	}
	for arg, def := range map[string]string{"ttl": w.cache.ttl.String(), "negative-ttl": w.cache.negative.String()} {
		if !regexp.MustCompile("`--" + arg + "` .* " + def + " \\|").MatchString(table) {
			t.Errorf("--%s: the default is %s", arg, def)
		}
	}
}

func FuzzParseReply(f *testing.F) {
	f.Add([]byte(`{"allow":false,"reason":"\ud800 no"}`))
	f.Add([]byte(`{"allow":true}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		a, err := parseReply(b)
		if err != nil && a != (answer{}) || len(a.reason) > maxReason || !utf8.ValidString(a.reason) {
			t.Errorf("%+v, %v", a, err)
		}
		var m map[string]any
		if err == nil && json.Unmarshal(b, &m) != nil {
			t.Errorf("%s is accepted", fmt.Sprintf("%.100q", b))
		}
	})
}
