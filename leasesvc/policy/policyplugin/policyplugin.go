// Package policyplugin is what an admission policy for leases is made with: a program of its own that the lease service
// starts and asks about each new lease. docs/policy-plugins.md has the contract, examples/policy-webhook is a whole one.
//
//	type nights struct{ policyv1.UnimplementedPolicyServer }
//
//	func (nights) Decide(ctx context.Context, r *policyv1.DecideRequest) (*policyv1.DecideReply, error) {
//		if time.Now().Hour() < 6 {
//			return policyplugin.Deny("no leases before six"), nil
//		}
//		return policyplugin.Allow(), nil
//	}
//
//	func main() {
//		if err := policyplugin.Serve(context.Background(), nights{}); err != nil {
//			fmt.Fprintln(os.Stderr, err)
//			os.Exit(1)
//		}
//	}
package policyplugin

import (
	"context"
	"os/signal"
	"syscall"

	"google.golang.org/grpc"

	policyv1 "github.com/dstm-project/dstm/api/policy/v1"
	"github.com/dstm-project/dstm/internal/plugproc"
)

// The handshake of hashicorp/go-plugin, for those who use that itself, or another language: the name of the plugin, the
// environment variable that the lease service sets to this name, and the version of the protocol.
const (
	Name     = "policy"
	Cookie   = "DSTM_POLICY"
	Protocol = 1
)

// ErrByHand means that Serve was called in a process that no lease service started.
var ErrByHand = plugproc.ErrByHand

// Serve offers the policy until the lease service ends the process, or has gone itself, or ctx ends. It takes over standard
// input and output; what the program writes to standard error is found in the log of the lease service. Decide is called
// from up to 64 goroutines at a time.
func Serve(ctx context.Context, p policyv1.PolicyServer) error {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM)
	defer stop()
	kind := plugproc.Kind{Name: Name, Cookie: Cookie, Protocol: Protocol}
	return kind.ServeChild(ctx, func(g *grpc.Server) { policyv1.RegisterPolicyServer(g, p) })
}

// Allow is the answer that has nothing against a lease.
func Allow() *policyv1.DecideReply { return &policyv1.DecideReply{Verdict: policyv1.Verdict_ALLOW} }

// Deny is the answer that refuses a lease. The reason is for the host and its user; its first 200 bytes count.
func Deny(reason string) *policyv1.DecideReply {
	return &policyv1.DecideReply{Verdict: policyv1.Verdict_DENY, Reason: reason}
}
