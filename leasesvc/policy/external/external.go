// Package external runs the external policies of package policy as plugin processes. It is constructed in cmd:
//
//	policy.New(c, policy.Deps{Start: external.Starter(c.Dir, log), ...})
package external

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	policyv1 "github.com/dstm-project/dstm/api/policy/v1"
	"github.com/dstm-project/dstm/internal/plugproc"
	"github.com/dstm-project/dstm/leasesvc/policy"
	"github.com/dstm-project/dstm/leasesvc/policy/policyplugin"
)

// maxError is how much of an error that a plugin had a part in is kept, in bytes.
const maxError = 500

// Starter returns what starts the processes of plugins. Their sockets lie below dir, which is for one service alone; what
// they write to standard output and error goes to log.
func Starter(dir string, log *slog.Logger) policy.Starter {
	return func(ctx context.Context, c policy.PluginConfig) (policy.Process, error) {
		conf := plugproc.Config{
			Kind: plugproc.Kind{Name: policyplugin.Name, Cookie: policyplugin.Cookie, Protocol: policyplugin.Protocol},
			// The name alone could be that of somebody else's directory, and this one is emptied.
			Dir:     filepath.Join(dir, "policy-"+c.Name),
			Program: c.Path,
			Args:    c.Args,
			SHA256:  c.SHA256[:],
		}
		child, err := conf.StartChild(ctx, newOutput(log.With("plugin", c.Name)))
		if err != nil {
			return nil, errors.New(policy.Clean(err.Error(), maxError)) // may repeat what the plugin wrote
		}
		return &process{child, policyv1.NewPolicyClient(child.Conn())}, nil
	}
}

// process is a policy at the other end of a socket.
type process struct {
	*plugproc.Child
	client policyv1.PolicyClient
}

// Decide implements policy.Process.
func (p *process) Decide(ctx context.Context, r policy.Request) (policy.Decision, error) {
	m, err := p.client.Decide(ctx, toWire(r))
	if err != nil {
		return policy.Decision{}, failure(err)
	}
	return fromWire(m)
}

// failure returns the error of a call. An answer that cannot be read is an answer.
func failure(err error) error {
	st, _ := status.FromError(err)
	err = fmt.Errorf("%s: %s", st.Code(), policy.Clean(st.Message(), maxError))
	switch st.Code() {
	case codes.ResourceExhausted, codes.Internal, codes.Unimplemented:
		return fmt.Errorf("%w: %w", policy.ErrInvalid, err)
	case codes.DeadlineExceeded:
		return fmt.Errorf("%w: %w", context.DeadlineExceeded, err)
	}
	return err
}

func toWire(r policy.Request) *policyv1.DecideRequest {
	return &policyv1.DecideRequest{
		Host: r.Host, Source: r.Source.String(), Trigger: policyv1.Trigger(r.Trigger), Pool: r.Pool,
	}
}

// fromWire takes nothing from a plugin that it does not understand.
func fromWire(m *policyv1.DecideReply) (policy.Decision, error) {
	reason := policy.Clean(m.GetReason(), policy.MaxReason)
	switch m.GetVerdict() {
	case policyv1.Verdict_ALLOW:
		return policy.Decision{Verdict: policy.Allow}, nil
	case policyv1.Verdict_DENY:
		return policy.Decision{Verdict: policy.Deny, Reason: reason}, nil
	}
	return policy.Decision{}, fmt.Errorf("%w: verdict %d", policy.ErrInvalid, m.GetVerdict())
}
