// Package speaker runs a bgp.Speaker in a process of its own: Serve is that process, Process starts it or takes over the one
// that a former tepd started.
//
// The process guards the announcements once more, withdraws what went past its time, and counts itself as an orphan when
// tepd is silent: then it drains, withdraws and ends.
package speaker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	speakerv1 "github.com/dstm-project/dstm/api/speaker/v1"
	"github.com/dstm-project/dstm/bgp"
)

const (
	// firstOrphan is the orphan time before Configure says another: whoever started us died before that.
	firstOrphan = time.Minute
	// callTimeout is for what the process does to the speaker of its own accord.
	callTimeout = 5 * time.Second
	// drainTimeout is for a drain with the waiting that belongs to it.
	drainTimeout = 30 * time.Second
)

// Server offers a bgp.Speaker and keeps the rules that hold for every one of them.
type Server struct {
	speakerv1.UnimplementedSpeakerServer
	impl bgp.Speaker
	log  *slog.Logger
	end  chan string // why to end, one message

	mu     sync.Mutex // guards what follows and orders calls of impl
	conf   bgp.Config
	set    bgp.RouteSet // as asked for
	beat   time.Time
	orphan *time.Timer
	expire *time.Timer
	ended  bool
}

// NewServer returns a server for impl. Its orphan time runs from here.
func NewServer(impl bgp.Speaker, log *slog.Logger) *Server {
	s := &Server{impl: impl, log: log, end: make(chan string, 1), beat: time.Now()}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.conf.Orphan = firstOrphan
	s.orphan = time.AfterFunc(firstOrphan, s.orphaned)
	return s
}

// Done delivers once why the process is to end: the speaker is closed then.
func (s *Server) Done() <-chan string { return s.end }

// enter begins a call of tepd, which is a sign of life.
func (s *Server) enter() (leave func(), err error) {
	s.mu.Lock()
	if s.ended {
		s.mu.Unlock()
		return nil, status.Error(codes.Unavailable, "the speaker is closed")
	}
	s.beat = time.Now()
	s.orphan.Reset(s.conf.Orphan)
	return s.mu.Unlock, nil
}

// Configure implements the service.
func (s *Server) Configure(ctx context.Context, m *speakerv1.ConfigureRequest) (*speakerv1.ConfigureReply, error) {
	c, err := configFromWire(m)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	leave, err := s.enter()
	if err != nil {
		return nil, err
	}
	defer leave()
	if err := s.impl.Configure(ctx, c); err != nil {
		return nil, toStatus(err)
	}
	s.conf = c
	s.orphan.Reset(c.Orphan)
	if len(s.set.Routes) > 0 { // what is not allowed any more goes at once
		if _, err := s.apply(ctx); err != nil {
			return nil, toStatus(err)
		}
	}
	return &speakerv1.ConfigureReply{}, nil
}

// Set implements the service.
func (s *Server) Set(ctx context.Context, m *speakerv1.SetRequest) (*speakerv1.SetReply, error) {
	set, err := setFromWire(m)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	leave, err := s.enter()
	if err != nil {
		return nil, err
	}
	defer leave()
	s.set = set
	adv, err := s.apply(ctx)
	if err != nil {
		return nil, toStatus(err)
	}
	return advertisedToWire(adv), nil
}

// apply announces what of the set is allowed, and arranges for the end of its time.
func (s *Server) apply(ctx context.Context) (bgp.Advertised, error) {
	if s.expire != nil {
		s.expire.Stop()
	}
	pass := s.set
	var refused []bgp.Refused
	pass.Routes, refused = bgp.Guard(s.conf.Allow, s.set.Routes)
	if !s.set.NotAfter.IsZero() {
		left := time.Until(s.set.NotAfter)
		if left <= 0 {
			pass.Routes = nil
		} else {
			version := s.set.Version
			s.expire = time.AfterFunc(left, func() { s.expired(version) })
		}
	}
	adv, err := s.impl.Set(ctx, pass)
	adv.Refused = append(refused, adv.Refused...)
	return adv, err
}

// expired withdraws a set whose time has passed.
func (s *Server) expired(version uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended || s.set.Version != version || time.Until(s.set.NotAfter) > 0 {
		return // replaced meanwhile
	}
	s.log.Warn("withdrawing: not renewed in time", "routes", len(s.set.Routes), "not_after", s.set.NotAfter)
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	if _, err := s.impl.Set(ctx, bgp.RouteSet{Version: version}); err != nil {
		s.log.Error("not withdrawn", "err", err)
	}
}

// Status implements the service.
func (s *Server) Status(ctx context.Context, _ *speakerv1.StatusRequest) (*speakerv1.StatusReply, error) {
	s.mu.Lock()
	age := time.Since(s.beat)
	s.mu.Unlock()
	leave, err := s.enter()
	if err != nil {
		return nil, err
	}
	defer leave()
	st, err := s.impl.Status(ctx)
	if err != nil {
		return nil, toStatus(err)
	}
	st.BeatAge = age
	return statusToWire(st), nil
}

// Beat implements the service.
func (s *Server) Beat(context.Context, *speakerv1.BeatRequest) (*speakerv1.BeatReply, error) {
	leave, err := s.enter()
	if err != nil {
		return nil, err
	}
	leave()
	return &speakerv1.BeatReply{}, nil
}

// Close implements the service. The process ends after it.
func (s *Server) Close(ctx context.Context, m *speakerv1.CloseRequest) (*speakerv1.CloseReply, error) {
	mode, err := modeFromWire(m.GetMode())
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	leave, err := s.enter()
	if err != nil {
		return nil, err
	}
	defer leave()
	err = s.finish(ctx, mode, "closed by tepd")
	if err != nil {
		return nil, toStatus(err)
	}
	return &speakerv1.CloseReply{}, nil
}

func (s *Server) orphaned() {
	s.mu.Lock()
	defer s.mu.Unlock()
	// A sign of life may have been waiting for the lock.
	if silent := time.Since(s.beat); s.ended || silent < s.conf.Orphan {
		return
	}
	s.log.Warn("orphaned: draining", "silent", s.conf.Orphan)
	ctx, cancel := context.WithTimeout(context.Background(), drainTimeout)
	defer cancel()
	if err := s.finish(ctx, bgp.Drain, fmt.Sprintf("orphaned: nothing from tepd for %s", s.conf.Orphan)); err != nil {
		s.log.Error("not drained", "err", err)
	}
}

// finish closes the speaker. The process ends even if that fails: the end of its sessions withdraws too.
func (s *Server) finish(ctx context.Context, mode bgp.CloseMode, why string) error {
	s.ended = true
	s.orphan.Stop()
	if s.expire != nil {
		s.expire.Stop()
	}
	err := s.impl.Close(ctx, mode)
	s.end <- why
	return err
}

// toStatus keeps what the other side has to tell apart.
func toStatus(err error) error {
	switch {
	case errors.Is(err, bgp.ErrRestart):
		return status.Error(codes.FailedPrecondition, err.Error())
	case errors.Is(err, context.DeadlineExceeded):
		return status.Error(codes.DeadlineExceeded, err.Error())
	}
	return status.Error(codes.Unknown, err.Error())
}
