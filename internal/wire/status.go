package wire

import (
	"errors"
	"fmt"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	leasev1 "github.com/dstm-project/dstm/api/lease/v1"
	"github.com/dstm-project/dstm/lease"
)

// Domain is the domain of every ErrorInfo of ours.
const Domain = "dstm"

// Error is a refusal of the lease service with its reason.
type Error struct {
	Code   codes.Code
	Reason lease.Reason // ReasonNone when the error is not about a lease
	Msg    string
}

// Error returns the message with the reason.
func (e *Error) Error() string {
	if e.Reason == lease.ReasonNone {
		return e.Msg
	}
	return fmt.Sprintf("%s (%s)", e.Msg, e.Reason)
}

// Temporary reports whether the same call may succeed later: only UNAVAILABLE and RESOURCE_EXHAUSTED.
func (e *Error) Temporary() bool {
	return e.Code == codes.Unavailable || e.Code == codes.ResourceExhausted
}

// ToStatus returns the gRPC error of a refusal.
func ToStatus(e *Error) error {
	st := status.New(e.Code, e.Msg)
	if e.Reason == lease.ReasonNone {
		return st.Err()
	}
	with, err := st.WithDetails(&errdetails.ErrorInfo{Reason: e.Reason.String(), Domain: Domain})
	if err != nil { // an OK status cannot carry details; refusals never have one
		return st.Err()
	}
	return with.Err()
}

// FromStatus returns the refusal in a gRPC error, or err itself when it is none of ours.
func FromStatus(err error) error {
	st, ok := status.FromError(err)
	if err == nil || !ok {
		return err
	}
	e := &Error{Code: st.Code(), Msg: st.Message()}
	for _, d := range st.Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok && info.Domain == Domain {
			e.Reason = lease.Reason(leasev1.Reason_value[info.Reason])
		}
	}
	return e
}

// ReasonOf returns the reason of a refusal, ReasonNone for any other error.
func ReasonOf(err error) lease.Reason {
	var e *Error
	if errors.As(err, &e) {
		return e.Reason
	}
	return lease.ReasonNone
}

// CodeFor returns the gRPC code that goes with a reason.
func CodeFor(r lease.Reason) codes.Code {
	switch r {
	case lease.ReasonPoolDry, lease.ReasonQuota:
		return codes.ResourceExhausted
	case lease.ReasonNotAllowed, lease.ReasonBadSource, lease.ReasonPolicy:
		return codes.PermissionDenied
	case lease.ReasonNoTEP, lease.ReasonDegradedStore:
		return codes.Unavailable
	case lease.ReasonNone:
		return codes.Internal
	}
	return codes.FailedPrecondition
}
