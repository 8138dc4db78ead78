package main

import (
	"context"
	"crypto/sha256"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/policy"
	"github.com/dstm-project/dstm/leasesvc/policy/external"
)

// TestPlugin builds the program as README.md says and lets the lease service's side run it.
func TestPlugin(t *testing.T) {
	program := filepath.Join(t.TempDir(), "policy-webhook")
	build := exec.Command("go", "build", "-o", program, "./examples/policy-webhook")
	build.Dir = "../.."
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	b, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	e := newEndpoint(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		if strings.Contains(string(body), `"host":"lap7"`) {
			_, _ = io.WriteString(w, `{"allow":true}`)
		} else {
			_, _ = io.WriteString(w, `{"allow":false,"reason":"who are you?"}`)
		}
	})
	dir, err := os.MkdirTemp("", "pol") // short: unix sockets have at most 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	engine := policy.New(policy.Config{
		Budget: 500 * time.Millisecond,
		Plugins: []policy.PluginConfig{{
			Name: "webhook", Path: program, SHA256: sha256.Sum256(b), Args: []string{"--url", e.URL, "--ca", e.ca(t)}, OnFailure: policy.Closed,
		}},
	}, policy.Deps{Start: external.Starter(dir, log), Log: log})
	ctx, cancel := context.WithCancel(t.Context())
	ready, ended := make(chan struct{}), make(chan error)
	go func() { ended <- engine.Run(ctx, func() { close(ready) }) }()
	<-ready
	r := policy.Request{Host: "lap7", Source: netip.MustParseAddr("2001:db8:1::7"), Trigger: lease.TriggerDNS, Pool: "main"}
	stranger := r
	stranger.Host = "lap8"
	if got := engine.Decide(t.Context(), r); !got.Allowed() {
		t.Errorf("lap7: %+v", got)
	}
	if got := engine.Decide(t.Context(), stranger); got != (policy.Decision{Verdict: policy.Deny, Reason: "who are you?"}) {
		t.Errorf("lap8: %+v", got)
	}
	e.Close()
	if got := engine.Decide(t.Context(), r); !got.Allowed() || e.asked.Load() != 2 {
		t.Errorf("lap7 from the cache: %+v, asked %d times", got, e.asked.Load())
	}
	stranger.Host = "lap9"
	if got := engine.Decide(t.Context(), stranger); got != (policy.Decision{Verdict: policy.Deny, Reason: "policy webhook does not answer"}) {
		t.Errorf("lap9 without the endpoint: %+v", got)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// TestByHand: a person who starts it learns what it is.
func TestByHand(t *testing.T) {
	err := run(t.Context(), []string{"--url", "https://policy.example.net/"})
	if err == nil || !strings.Contains(err.Error(), "its daemon starts it") {
		t.Errorf("error %v", err)
	}
}
