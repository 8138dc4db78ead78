package plugproc

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-plugin"
	"github.com/hashicorp/go-plugin/runner"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

const (
	termTime = time.Second // from SIGTERM to SIGKILL
	// drainTime is how long output is read after the end: somebody whom the process left behind may hold the pipes open.
	drainTime = 200 * time.Millisecond
	// maxMessage bounds in bytes what a message of the process makes us hold.
	maxMessage = 64 << 10
)

// Child is a plugin process that ends with us, even if we end by SIGKILL:
//
//   - the kernel kills it when the thread that started it ends (PR_SET_PDEATHSIG, prctl(2)). That holds for any program but
//     one with set-user-ID or file capabilities. Threads of a Go program come and go, so one is locked for it;
//   - its standard input ends when we do. ServeChild watches that.
//
// It is a process group of its own, which is killed when it ends, so that it leaves nobody behind. The connection uses
// go-plugin's AutoMTLS: both sides have certificates of this one start.
type Child struct {
	client *plugin.Client
	conn   *grpc.ClientConn
	run    *childRunner

	mu    sync.Mutex
	conns []*grpc.ClientConn // that go-plugin made; it forgets those that fail
}

// Conn is the connection to the plugin. Messages from it have at most 64 KiB.
func (c *Child) Conn() *grpc.ClientConn { return c.conn }

// PID is the number of the process.
func (c *Child) PID() int { return c.run.cmd.Process.Pid }

// Done is closed when the process has ended.
func (c *Child) Done() <-chan struct{} { return c.run.ended }

// End says how the process ended, such as "signal: killed". It is of use after Done.
func (c *Child) End() string { return c.run.state.String() }

// Close ends the process and waits for its end: SIGTERM first, and SIGKILL a second later.
func (c *Child) Close() { c.close(termTime) }

func (c *Child) close(grace time.Duration) {
	c.closeConns() // or ServeChild would wait for go-plugin's own streams
	if c.run != nil {
		c.run.end(grace)
	}
	c.client.Kill() // frees what go-plugin holds; it would wait for a process that hangs
	c.closeConns()
}

func (c *Child) closeConns() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, conn := range c.conns {
		conn.Close()
	}
	c.conns = nil
}

// stream is a grpc.StreamClientInterceptor: policies are unary calls, so the streams are go-plugin's own. Its broker is not
// wanted: it would keep whatever the process announces.
func (c *Child) stream(
	ctx context.Context, desc *grpc.StreamDesc, conn *grpc.ClientConn, method string, next grpc.Streamer, opts ...grpc.CallOption,
) (grpc.ClientStream, error) {
	c.mu.Lock()
	if !slices.Contains(c.conns, conn) {
		c.conns = append(c.conns, conn)
	}
	c.mu.Unlock()
	if strings.HasPrefix(method, "/plugin.GRPCBroker/") {
		return nil, status.Error(codes.Unimplemented, "no broker")
	}
	return next(ctx, desc, conn, method, opts...)
}

// StartChild starts the program as a process that ends with us. out gets what the process writes to its standard output and
// error, in pieces and from several goroutines. ctx bounds the start, not the process. Dir is for this process alone and is
// emptied.
func (c *Config) StartChild(ctx context.Context, out io.Writer) (*Child, error) {
	program, _, err := openProgram(c.Program, c.SHA256)
	if err != nil {
		return nil, err
	}
	defer program.Close()
	if err := emptyDir(c.Dir); err != nil {
		return nil, err
	}
	child := &Child{}
	stop := func() bool { return true }
	cc := &plugin.ClientConfig{
		AutoMTLS: true, SkipHostEnv: true, StartTimeout: startTimeout,
		Stderr: out, SyncStdout: out, SyncStderr: out,
		UnixSocketConfig: &plugin.UnixSocketConfig{TempDir: c.Dir},
		GRPCDialOptions: []grpc.DialOption{
			grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)), grpc.WithMaxHeaderListSize(maxMessage),
			grpc.WithStreamInterceptor(child.stream),
		},
		RunnerFunc: func(_ hclog.Logger, spec *exec.Cmd, _ string) (runner.Runner, error) {
			cmd := c.command(program)
			cmd.Env = spec.Env
			run, err := newChildRunner(cmd, c.Dir)
			if err != nil {
				return nil, err
			}
			child.run = run
			stop = context.AfterFunc(ctx, run.kill)
			return run, nil
		},
	}
	child.client = c.newClient(cc)
	err = child.connect(ctx, c, cc)
	if !stop() { // a kill is under way, or done
		err = context.Cause(ctx)
	}
	if err != nil {
		child.close(0)
		return nil, fmt.Errorf("start %s: %w", c.Program, err)
	}
	return child, nil
}

// connect starts the process and waits until it answers.
func (c *Child) connect(ctx context.Context, conf *Config, cc *plugin.ClientConfig) (err error) {
	if _, err := c.client.Start(); err != nil {
		return err
	}
	if cc.TLSConfig.RootCAs == nil {
		return errors.New("the plugin showed no certificate: want go-plugin with AutoMTLS")
	}
	cc.TLSConfig.MinVersion = tls.VersionTLS13
	if c.conn, err = conf.dispense(c.client); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	health := grpc_health_v1.NewHealthClient(c.conn)
	if _, err := health.Check(ctx, &grpc_health_v1.HealthCheckRequest{Service: plugin.GRPCServiceName}); err != nil {
		return fmt.Errorf("the plugin does not answer: %w", err)
	}
	return nil
}

// emptyDir makes an empty directory for ourselves alone.
func emptyDir(dir string) error {
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	return os.Mkdir(dir, 0o700)
}

// childRunner is a runner.Runner. go-plugin's own one starts the process from any thread, and its Wait never returns while
// somebody holds the pipes open.
type childRunner struct {
	cmd            *exec.Cmd
	dir            string   // where its socket must be
	stdout, stderr *os.File // ends for reading
	alive          *os.File // its standard input ends when this does

	ended chan struct{}
	state *os.ProcessState // after ended

	mu     sync.Mutex
	doomed bool // killed before it was started
	reaped bool // the number may be another process's
}

var errDoomed = errors.New("called off")

func newChildRunner(cmd *exec.Cmd, dir string) (*childRunner, error) {
	r := &childRunner{cmd: cmd, dir: dir, ended: make(chan struct{})}
	inR, inW, err1 := os.Pipe()
	outR, outW, err2 := os.Pipe()
	errR, errW, err3 := os.Pipe()
	if err := errors.Join(err1, err2, err3); err != nil {
		for _, f := range []*os.File{inR, inW, outR, outW, errR, errW} {
			f.Close() // of a nil one it is an error, and nothing else
		}
		return nil, err
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = inR, outW, errW
	r.alive, r.stdout, r.stderr = inW, outR, errR
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	return r, nil
}

// Start implements runner.Runner.
func (r *childRunner) Start(context.Context) error {
	started := make(chan error)
	go r.live(started)
	return <-started
}

// live is there as long as the process, on a thread of its own.
func (r *childRunner) live(started chan<- error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	err := r.exec()
	for _, f := range []any{r.cmd.Stdin, r.cmd.Stdout, r.cmd.Stderr} {
		f.(*os.File).Close()
	}
	if err != nil {
		r.closePipes()
		close(r.ended)
		started <- err
		return
	}
	started <- nil
	pid := r.cmd.Process.Pid
	awaitEnd(pid)
	r.mu.Lock()
	// It can be waited for, so its number is still its own, and that of its group.
	_ = unix.Kill(-pid, unix.SIGKILL)
	r.state, _ = r.cmd.Process.Wait()
	r.reaped = true
	r.mu.Unlock()
	end := time.Now().Add(drainTime)
	_, _ = r.stdout.SetReadDeadline(end), r.stderr.SetReadDeadline(end)
	close(r.ended)
}

func (r *childRunner) exec() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.doomed {
		return errDoomed
	}
	return r.cmd.Start()
}

// awaitEnd waits for the end of a process and leaves it to be waited for.
func awaitEnd(pid int) {
	for {
		var info unix.Siginfo
		if err := unix.Waitid(unix.P_PID, pid, &info, unix.WEXITED|unix.WNOWAIT, nil); err != unix.EINTR {
			return
		}
	}
}

func (r *childRunner) signal(sig syscall.Signal) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.cmd.Process == nil:
		r.doomed = sig == unix.SIGKILL
		return
	case r.reaped:
		return
	}
	target := r.cmd.Process.Pid
	if sig == unix.SIGKILL {
		target = -target // with everyone whom it started
	}
	_ = unix.Kill(target, sig)
}

func (r *childRunner) kill() { r.signal(unix.SIGKILL) }

// end ends the process, which has the given time to do so by itself, and waits for its end.
func (r *childRunner) end(grace time.Duration) {
	if grace > 0 {
		r.signal(unix.SIGTERM)
		t := time.NewTimer(grace)
		defer t.Stop()
		select {
		case <-r.ended:
			return
		case <-t.C:
		}
	}
	r.kill()
	<-r.ended
}

func (r *childRunner) closePipes() {
	_ = errors.Join(r.alive.Close(), r.stdout.Close(), r.stderr.Close())
}

// Wait implements runner.Runner; go-plugin calls it once, when it has read the output to its end.
func (r *childRunner) Wait(context.Context) error {
	<-r.ended
	r.closePipes()
	if !r.state.Success() {
		return &exec.ExitError{ProcessState: r.state}
	}
	return nil
}

// Kill implements runner.Runner.
func (r *childRunner) Kill(context.Context) error {
	r.end(0)
	return nil
}

// PluginToHost implements runner.Runner: it is asked about the address that the process says it listens on.
func (r *childRunner) PluginToHost(network, addr string) (string, string, error) {
	if network != "unix" || !strings.HasPrefix(filepath.Clean(addr), r.dir+"/") {
		return "", "", fmt.Errorf("the plugin listens on %s %s: want a unix socket in $%s", network, addr, plugin.EnvUnixSocketDir)
	}
	return network, addr, nil
}

// HostToPlugin implements runner.Runner.
func (r *childRunner) HostToPlugin(network, addr string) (string, string, error) {
	return network, addr, nil
}

// Diagnose implements runner.Runner.
func (r *childRunner) Diagnose(context.Context) string { return "" }

// Stdout implements runner.Runner.
func (r *childRunner) Stdout() io.ReadCloser { return r.stdout }

// Stderr implements runner.Runner.
func (r *childRunner) Stderr() io.ReadCloser { return r.stderr }

// Name implements runner.Runner.
func (r *childRunner) Name() string { return r.cmd.Args[0] }

// ID implements runner.Runner.
func (r *childRunner) ID() string {
	if r.cmd.Process == nil {
		return "" // nothing to kill
	}
	return strconv.Itoa(r.cmd.Process.Pid)
}
