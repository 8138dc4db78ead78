package speaker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	speakerv1 "github.com/dstm-project/dstm/api/speaker/v1"
	"github.com/dstm-project/dstm/bgp"
	"github.com/dstm-project/dstm/internal/plugproc"
)

// kind is what tepd and speakers agree on. The protocol number changes when an old speaker could not serve a new tepd.
var kind = plugproc.Kind{Name: "speaker", Cookie: "DSTM_SPEAKER", Protocol: 1}

// ErrByHand means that Serve was called in a process that no tepd started.
var ErrByHand = plugproc.ErrByHand

// Serve runs the speaker that newSpeaker makes until tepd closes it or it is an orphan. It is a whole process: it takes over
// standard error and calls for the end of the process by returning.
func Serve(newSpeaker func(*slog.Logger) bgp.Speaker) error {
	file, err := kind.Log()
	if err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(file, nil))
	impl := newSpeaker(log)
	s := NewServer(impl, log)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		log.Info("ending", "reason", <-s.Done())
		cancel()
	}()
	log.Info("speaker started")
	return kind.Serve(ctx, func(g *grpc.Server) { speakerv1.RegisterSpeakerServer(g, s) })
}

// answerTimeout is how long a speaker that is taken over may take for its first answer.
const answerTimeout = 5 * time.Second

// Process starts and finds speaker processes. Use it from one goroutine.
type Process struct {
	Dir     string   // for its files
	Program string   // path
	Args    []string // without the program's name
	SHA256  []byte   // of the program; nil = not checked
	Log     *slog.Logger

	cur *remote
}

func (p *Process) config() *plugproc.Config {
	return &plugproc.Config{Kind: kind, Dir: p.Dir, Program: p.Program, Args: p.Args, SHA256: p.SHA256}
}

// Attach returns the running speaker if it is the configured one and answers. Otherwise it ends what runs and starts
// another. reattached: it ran before and may announce routes.
func (p *Process) Attach(ctx context.Context) (s bgp.Remote, reattached bool, err error) {
	r, err := p.find(ctx)
	switch {
	case err == nil:
		return r, true, nil
	case !errors.Is(err, plugproc.ErrNone):
		p.Log.Warn("bgp speaker not taken over: starting another", "err", err)
		if err := p.config().Kill(); err != nil {
			return nil, false, err
		}
	}
	proc, err := p.config().Start()
	if err != nil {
		return nil, false, err
	}
	p.cur = newRemote(proc, p)
	return p.cur, false, nil
}

// End makes the speaker that runs withdraw everything and end, and kills it when it does not answer. None is no error.
func (p *Process) End(ctx context.Context) error {
	r, err := p.find(ctx)
	switch {
	case err == nil:
		return r.Close(ctx, bgp.Withdraw)
	case errors.Is(err, plugproc.ErrNone):
		return nil
	}
	p.Log.Warn("bgp speaker is killed", "reason", err)
	return p.config().Kill()
}

// find returns a speaker that has just answered.
func (p *Process) find(ctx context.Context) (*remote, error) {
	if p.cur != nil && p.cur.proc.Exited() {
		p.cur.conn.Close()
		p.cur = nil
	}
	if p.cur == nil {
		proc, err := p.config().Reattach()
		if err != nil {
			return nil, err
		}
		p.cur = newRemote(proc, p)
	}
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	if _, err := p.cur.Status(ctx); err != nil {
		r := p.cur
		p.cur = nil
		r.conn.Close()
		return nil, fmt.Errorf("process %d does not answer: %w", r.proc.PID(), err)
	}
	return p.cur, nil
}

// remote is a speaker at the other end of a socket.
type remote struct {
	proc   *plugproc.Process
	conn   *grpc.ClientConn
	client speakerv1.SpeakerClient
	owner  *Process
}

func newRemote(proc *plugproc.Process, owner *Process) *remote {
	return &remote{proc: proc, conn: proc.Conn(), client: speakerv1.NewSpeakerClient(proc.Conn()), owner: owner}
}

func (r *remote) Configure(ctx context.Context, c bgp.Config) error {
	_, err := r.client.Configure(ctx, configToWire(c))
	return fromStatus(err)
}

func (r *remote) Set(ctx context.Context, s bgp.RouteSet) (bgp.Advertised, error) {
	m, err := r.client.Set(ctx, setToWire(s))
	if err != nil {
		return bgp.Advertised{}, fromStatus(err)
	}
	return advertisedFromWire(m)
}

func (r *remote) Status(ctx context.Context) (bgp.Status, error) {
	m, err := r.client.Status(ctx, &speakerv1.StatusRequest{})
	if err != nil {
		return bgp.Status{}, fromStatus(err)
	}
	return statusFromWire(m)
}

func (r *remote) Beat(ctx context.Context) error {
	_, err := r.client.Beat(ctx, &speakerv1.BeatRequest{})
	return fromStatus(err)
}

// Close returns when the process has ended, or kills it when ctx ends first.
func (r *remote) Close(ctx context.Context, mode bgp.CloseMode) error {
	_, err := r.client.Close(ctx, &speakerv1.CloseRequest{Mode: modes[mode]})
	err = fromStatus(err)
	t := time.NewTicker(10 * time.Millisecond)
	defer t.Stop()
	for !r.proc.Exited() && ctx.Err() == nil {
		select {
		case <-t.C:
		case <-ctx.Done():
		}
	}
	r.conn.Close()
	if r.owner.cur == r {
		r.owner.cur = nil
	}
	return errors.Join(err, r.owner.config().Kill())
}

func fromStatus(err error) error {
	if err == nil {
		return nil
	}
	st, _ := status.FromError(err)
	if st.Code() == codes.FailedPrecondition {
		return fmt.Errorf("%s: %w", st.Message(), bgp.ErrRestart)
	}
	return fmt.Errorf("%s: %s", st.Code(), st.Message())
}
