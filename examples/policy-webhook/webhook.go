package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	policyv1 "github.com/dstm-project/dstm/api/policy/v1"
	"github.com/dstm-project/dstm/leasesvc/policy/policyplugin"
)

const (
	// maxReply bounds what is read of an answer, in bytes.
	maxReply  = 16 << 10
	maxReason = 200 // bytes that the lease service uses of it
	// maxTime is for callers without a deadline; the lease service has one of 500 ms at most.
	maxTime = time.Second
)

// question is the body of a request.
type question struct {
	Schema  string `json:"schema"`
	Host    string `json:"host"`
	Source  string `json:"source"`
	Trigger string `json:"trigger"` // dns, packet, socket, manual, unspecified
	Pool    string `json:"pool"`
}

// reply is the body of an answer. Other keys are ignored.
type reply struct {
	Allow  *bool  `json:"allow"` // there must be one: an empty object is no permission
	Reason string `json:"reason"`
}

// webhook is the policy. Its methods may be called from any goroutine.
type webhook struct {
	policyv1.UnimplementedPolicyServer
	url    string
	token  string // secret; empty = none
	client *http.Client
	cache  *cache
}

// Decide implements the policy. An endpoint that does not answer as it should is an error, not a decision: what counts then
// is on_failure of the lease service.
func (w *webhook) Decide(ctx context.Context, r *policyv1.DecideRequest) (*policyv1.DecideReply, error) {
	q := question{
		Schema: "dstm.policy/1", Host: r.GetHost(), Source: r.GetSource(), Pool: r.GetPool(),
		Trigger: strings.ToLower(strings.TrimPrefix(r.GetTrigger().String(), "TRIGGER_")),
	}
	if a, ok := w.cache.get(q); ok {
		return a.toWire(), nil
	}
	ctx, cancel := context.WithTimeout(ctx, maxTime)
	defer cancel()
	a, err := w.ask(ctx, q)
	if err != nil {
		if ctx.Err() != nil {
			return nil, status.FromContextError(ctx.Err()).Err()
		}
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	w.cache.put(q, a)
	return a.toWire(), nil
}

// ask asks the endpoint.
func (w *webhook) ask(ctx context.Context, q question) (answer, error) {
	body, err := json.Marshal(q)
	if err != nil {
		return answer{}, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, w.url, bytes.NewReader(body))
	if err != nil {
		return answer{}, err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Accept", "application/json")
	if w.token != "" {
		req.Header.Set("Authorization", "Bearer "+w.token)
	}
	resp, err := w.client.Do(req)
	if err != nil {
		return answer{}, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxReply+1))
	switch {
	case err != nil:
		return answer{}, err
	case resp.StatusCode != http.StatusOK:
		return answer{}, fmt.Errorf("endpoint answers %d, want 200", resp.StatusCode)
	case len(b) > maxReply:
		return answer{}, fmt.Errorf("endpoint answers more than %d bytes", maxReply)
	}
	return parseReply(b)
}

func parseReply(b []byte) (answer, error) {
	var m reply
	if err := json.Unmarshal(b, &m); err != nil {
		return answer{}, fmt.Errorf("endpoint's answer: %w", err)
	}
	if m.Allow == nil {
		return answer{}, errors.New(`endpoint's answer has no "allow"`)
	}
	// What is kept must not be larger than what is used.
	return answer{*m.Allow, strings.Clone(strings.ToValidUTF8(m.Reason[:min(len(m.Reason), maxReason)], ""))}, nil
}

// answer is what the endpoint said.
type answer struct {
	allow  bool
	reason string
}

func (a answer) toWire() *policyv1.DecideReply {
	if a.allow {
		return policyplugin.Allow()
	}
	return policyplugin.Deny(a.reason)
}
