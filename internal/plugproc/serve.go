package plugproc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-plugin"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
)

// ErrByHand means that nobody is there to speak to.
var ErrByHand = errors.New("this is a plugin process: its daemon starts it")

const (
	logDescriptor = 3 // see Start
	// maxLog bounds the log file in bytes; it starts again from nothing.
	maxLog = 8 << 20
	// flushTime is for the reply to the call that ended us.
	flushTime = 500 * time.Millisecond
)

// Log takes over the descriptor that Start left as standard error, so that a panic is found there too, and gives the process
// its name. Call it first. The file does not grow beyond 9 MiB.
func (k Kind) Log() (*LogFile, error) {
	if os.Getenv(k.Cookie) != k.Name {
		return nil, ErrByHand
	}
	signal.Ignore(unix.SIGPIPE)
	// The kernel's name of a process that was started from a descriptor is that number.
	if err := os.WriteFile("/proc/self/comm", []byte("dstm-"+k.Name), 0); err != nil {
		return nil, err
	}
	if err := unix.Dup3(logDescriptor, 2, 0); err != nil {
		return nil, fmt.Errorf("log descriptor %d: %w", logDescriptor, err)
	}
	return &LogFile{f: os.NewFile(logDescriptor, "log")}, nil
}

// LogFile is a log of bounded size. Write is called by one goroutine at a time, as slog's handlers do.
type LogFile struct {
	f    *os.File
	left int
}

func (l *LogFile) Write(b []byte) (int, error) {
	if l.left -= len(b); l.left < 0 {
		if st, err := l.f.Stat(); err == nil && st.Mode().IsRegular() && st.Size() > maxLog {
			_ = l.f.Truncate(0) // opened for appending: the next line is the first
		}
		l.left = maxLog / 8
	}
	return l.f.Write(b)
}

// errEnded means that nobody called for the end.
var errEnded = errors.New("the plugin server ended by itself")

// Serve offers the service of a Process until ctx ends. It calls the program's own Log first.
func (k Kind) Serve(ctx context.Context, register func(*grpc.Server), opts ...grpc.ServerOption) error {
	return k.serve(ctx, register, append(opts, grpc.Creds(sameUser{}))...)
}

// ServeChild offers the service of a Child until ctx ends or who started it has gone or calls for the end.
func (k Kind) ServeChild(ctx context.Context, register func(*grpc.Server)) error {
	if os.Getenv(k.Cookie) != k.Name {
		return ErrByHand
	}
	if os.Getenv("PLUGIN_CLIENT_CERT") == "" {
		return errors.New("the daemon gave no certificate: want AutoMTLS")
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var st unix.Stat_t
	if err := unix.Fstat(0, &st); err == nil && st.Mode&unix.S_IFMT == unix.S_IFIFO {
		// Nothing is ever written to it; it ends with the other process, however that ends.
		go func() {
			_, _ = io.Copy(io.Discard, os.Stdin)
			cancel()
		}()
	}
	if err := k.serve(ctx, register); !errors.Is(err, errEnded) {
		return err
	}
	return nil
}

func (k Kind) serve(ctx context.Context, register func(*grpc.Server), opts ...grpc.ServerOption) error {
	if os.Getenv(k.Cookie) != k.Name {
		return ErrByHand
	}
	var server atomic.Pointer[grpc.Server]
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		plugin.Serve(&plugin.ServeConfig{
			HandshakeConfig: k.handshake(),
			Plugins:         plugin.PluginSet{k.Name: &service{register: register}},
			Logger:          hclog.New(&hclog.LoggerOptions{Level: hclog.Warn, Output: os.NewFile(2, "stderr")}),
			GRPCServer: func(o []grpc.ServerOption) *grpc.Server {
				s := grpc.NewServer(append(o, opts...)...)
				server.Store(s)
				return s
			},
		})
	}()
	select {
	case <-ended:
		return errEnded
	case <-ctx.Done():
	}
	if s := server.Load(); s != nil {
		force := time.AfterFunc(flushTime, s.Stop) // go-plugin's own streams never end
		defer force.Stop()
		s.GracefulStop()
	}
	<-ended
	return nil
}
