// Package plugproc runs plugins in processes of their own. It is the only importer of hashicorp/go-plugin, which gives the
// handshake and the connection. There are two kinds of process: a Child ends with the one that started it (see StartChild),
// and a Process outlives it, so that who comes next takes it over. What go-plugin leaves open for the latter is here:
//
//   - the record that finds the process again says which process it is (start time, digest of the program), since a number
//     alone may have been given to another one;
//   - the socket lies in a directory of mode 0700 and both sides check who is at the other end (SO_PEERCRED), since taking
//     over excludes go-plugin's own TLS;
//   - the program is hashed and started from the same open file;
//   - the process has a session of its own, ignores SIGPIPE and does not write to the pipes of who started it, since nobody
//     reads them after a kill -9.
package plugproc

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-plugin"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"

	"github.com/dstm-project/dstm/internal/proc"
)

// Errors that a caller tells apart.
var (
	// ErrNone means that no process is there to take over.
	ErrNone = errors.New("no process to take over")
	// ErrOther means that the process that is there is not the configured one.
	ErrOther = errors.New("the running process is another one")
)

const (
	startTimeout  = 10 * time.Second // from exec to the handshake
	endTimeout    = 5 * time.Second  // from SIGKILL to the end
	answerTimeout = 3 * time.Second  // of a local socket
)

// Kind is what both sides must agree on. The cookie only tells people who start a plugin by hand what it is.
type Kind struct {
	Name     string // of the plugin, and of the files in Config.Dir
	Cookie   string // name of the environment variable
	Protocol uint
}

func (k Kind) handshake() plugin.HandshakeConfig {
	return plugin.HandshakeConfig{ProtocolVersion: k.Protocol, MagicCookieKey: k.Cookie, MagicCookieValue: k.Name}
}

// service is a plugin that is nothing but a gRPC service.
type service struct {
	plugin.NetRPCUnsupportedPlugin
	register func(*grpc.Server)
}

func (s *service) GRPCServer(_ *plugin.GRPCBroker, g *grpc.Server) error {
	s.register(g)
	return nil
}

func (*service) GRPCClient(_ context.Context, _ *plugin.GRPCBroker, c *grpc.ClientConn) (any, error) {
	return c, nil
}

// Config says which program runs as the plugin and where its files are.
type Config struct {
	Kind
	Dir     string   // for the record, the socket's directory and the log file
	Program string   // path
	Args    []string // without the program's name
	SHA256  []byte   // of the program; nil = whatever is there
}

func (c *Config) recordPath() string { return filepath.Join(c.Dir, c.Name+".json") }
func (c *Config) socketDir() string  { return filepath.Join(c.Dir, c.Name) }

// LogPath is the file that the process writes to unless our standard error is a socket, as that of a systemd unit is.
func (c *Config) LogPath() string { return filepath.Join(c.Dir, c.Name+".log") }

// Process is a running plugin.
type Process struct {
	conf   *Config
	rec    record
	client *plugin.Client
	conn   *grpc.ClientConn
}

// Conn is the connection to the plugin.
func (p *Process) Conn() *grpc.ClientConn { return p.conn }

// PID is the number of the process.
func (p *Process) PID() int { return p.rec.PID }

// Exited reports whether the process has ended.
func (p *Process) Exited() bool { return !p.rec.alive() }

// Start starts the program and records the process. A process that is recorded already must have ended.
func (c *Config) Start() (*Process, error) {
	if err := c.prepareDir(); err != nil {
		return nil, err
	}
	program, digest, err := openProgram(c.Program, c.SHA256)
	if err != nil {
		return nil, err
	}
	defer program.Close()
	log, err := c.openLog()
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := c.command(program, log) // descriptor 3, see Serve
	cmd.Env = []string{plugin.EnvUnixSocketDir + "=" + c.socketDir()}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	p := &Process{conf: c, client: c.newClient(&plugin.ClientConfig{
		Cmd: cmd, SkipHostEnv: true, StartTimeout: startTimeout,
		GRPCDialOptions: []grpc.DialOption{grpc.WithTransportCredentials(sameUser{})},
	})}
	if err := p.connect(); err != nil {
		p.client.Kill()
		return nil, fmt.Errorf("start %s: %w%s", c.Program, err, c.lastWords())
	}
	start, err := proc.StartTime(cmd.Process.Pid)
	if err == nil {
		p.rec = record{
			PID: cmd.Process.Pid, Start: start, Socket: p.client.ReattachConfig().Addr.String(),
			Digest: digest, Protocol: c.Protocol, Program: c.Program,
		}
		err = p.rec.save(c.recordPath())
	}
	if err != nil {
		p.client.Kill()
		return nil, err
	}
	return p, nil
}

// Reattach takes over the recorded process: ErrNone when there is none, ErrOther when it is not what is configured now.
func (c *Config) Reattach() (*Process, error) {
	rec, err := loadRecord(c.recordPath())
	if err != nil {
		return nil, err
	}
	if err := rec.check(c); err != nil {
		return nil, err
	}
	p := &Process{conf: c, rec: rec}
	p.client = c.newClient(&plugin.ClientConfig{
		Reattach: &plugin.ReattachConfig{
			Protocol: plugin.ProtocolGRPC, ProtocolVersion: int(rec.Protocol), Addr: rec.addr(), Pid: rec.PID,
		},
		GRPCDialOptions: []grpc.DialOption{grpc.WithTransportCredentials(sameUser{})},
	})
	if err := p.connect(); err != nil {
		return nil, fmt.Errorf("take over process %d: %w", rec.PID, err)
	}
	return p, nil
}

// Kill ends the recorded process, if it is the one that was recorded, and waits for its end. No process is no error.
func (c *Config) Kill() error {
	rec, err := loadRecord(c.recordPath())
	if errors.Is(err, ErrNone) {
		return nil
	}
	if err == nil {
		err = rec.kill()
	}
	if err != nil {
		return err
	}
	return c.Forget()
}

// Forget removes the record and the sockets of a process that has ended.
func (c *Config) Forget() error {
	return errors.Join(os.RemoveAll(c.recordPath()), os.RemoveAll(c.socketDir()))
}

func (c *Config) newClient(cc *plugin.ClientConfig) *plugin.Client {
	cc.HandshakeConfig = c.handshake()
	cc.Plugins = plugin.PluginSet{c.Name: &service{}}
	cc.AllowedProtocols = []plugin.Protocol{plugin.ProtocolGRPC}
	cc.Logger = hclog.NewNullLogger() // what matters comes back as an error
	// go-plugin's first call has no deadline of its own: this bounds it when the process hangs.
	cc.GRPCDialOptions = append(cc.GRPCDialOptions,
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.DefaultConfig, MinConnectTimeout: answerTimeout}))
	return plugin.NewClient(cc)
}

// command makes a command of an open program: the file that was hashed, whatever lies at its path by now. The process finds
// extra at its descriptors 3 and up, and the program behind them. By its number here it could not be found: that number may
// be one that extra gets in the process.
func (c *Config) command(program *os.File, extra ...*os.File) *exec.Cmd {
	return &exec.Cmd{
		Path:       fmt.Sprintf("/proc/self/fd/%d", 3+len(extra)),
		Args:       append([]string{c.Program}, c.Args...),
		Dir:        "/",
		ExtraFiles: append(extra, program),
	}
}

// dispense returns the connection to the plugin of a client, which starts if it has not.
func (c *Config) dispense(client *plugin.Client) (*grpc.ClientConn, error) {
	proto, err := client.Client()
	if err != nil {
		return nil, err
	}
	conn, err := proto.Dispense(c.Name)
	if err != nil {
		return nil, err
	}
	return conn.(*grpc.ClientConn), nil
}

func (p *Process) connect() (err error) {
	p.conn, err = p.conf.dispense(p.client)
	return err
}

// prepareDir makes the socket's directory and empties it: what lies there belongs to a process that has ended.
func (c *Config) prepareDir() error {
	if rec, err := loadRecord(c.recordPath()); err == nil && rec.alive() {
		return fmt.Errorf("process %d (%s) still runs", rec.PID, rec.Program)
	}
	if err := c.Forget(); err != nil {
		return err
	}
	if err := os.MkdirAll(c.Dir, 0o755); err != nil {
		return err
	}
	return os.Mkdir(c.socketDir(), 0o700)
}

// openLog returns what the process gets as its standard error: ours if that is a socket (the journal reads it, with us or
// without), else a file, since pipes and terminals end with who reads them.
func (c *Config) openLog() (*os.File, error) {
	var st unix.Stat_t
	if err := unix.Fstat(2, &st); err == nil && st.Mode&unix.S_IFMT == unix.S_IFSOCK {
		fd, err := unix.FcntlInt(2, unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			return nil, fmt.Errorf("standard error: %w", err)
		}
		return os.NewFile(uintptr(fd), "stderr"), nil
	}
	return os.OpenFile(c.LogPath(), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
}

// lastWords is where to look for the reason of a failed start.
func (c *Config) lastWords() string {
	if _, err := os.Stat(c.LogPath()); err != nil {
		return ""
	}
	return " (its log: " + c.LogPath() + ")"
}
