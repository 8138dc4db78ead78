package external

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-plugin"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	policyv1 "github.com/dstm-project/dstm/api/policy/v1"
	"github.com/dstm-project/dstm/leasesvc/policy/policyplugin"
)

// The test binary is the plugins, too: its first argument says which.

func init() {
	if len(os.Args) > 1 && os.Args[1] == "nodeathsig" {
		// init runs on the first thread, which is the one that has the signal: without it standard input must do.
		if err := unix.Prctl(unix.PR_SET_PDEATHSIG, 0, 0, 0, 0); err != nil {
			panic(err)
		}
	}
}

func TestMain(m *testing.M) {
	if len(os.Args) < 2 || strings.HasPrefix(os.Args[1], "-test.") {
		os.Exit(m.Run())
	}
	if os.Args[1] == "host" {
		host(os.Args[2:])
	} else if err := runPlugin(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func runPlugin(mode string) error {
	switch mode {
	case "helper", "nodeathsig":
		return policyplugin.Serve(context.Background(), &decider{mode: "plain"})
	case "silent":
		select {}
	case "garbage":
		fmt.Printf("%s\x1b[2Jhello\n", strings.Repeat("x", 5000))
		select {}
	case "tcp":
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		fmt.Printf("1|1|tcp|%s|grpc|\n", l.Addr())
		select {}
	case "elsewhere":
		fmt.Println("1|1|unix|/run/other.sock|grpc|")
		select {}
	case "nocert", "ends", "mute":
		return halfPlugin(mode)
	case "deaf":
		signal.Ignore(syscall.SIGTERM)
	case "leaves":
		// Somebody in the same process group and somebody who left it; both hold the pipes open.
		for _, own := range []bool{false, true} {
			c := exec.Command("/bin/sleep", "60")
			c.Stdout, c.Stderr = os.Stdout, os.Stderr
			c.SysProcAttr = &syscall.SysProcAttr{Setsid: own}
			if err := c.Start(); err != nil {
				return err
			}
			fmt.Fprintf(os.Stderr, "left %d\n", c.Process.Pid)
		}
	case "chatty":
		for i := range 10000 {
			fmt.Fprintf(os.Stderr, "line %d \x1b[31m%s\n", i, strings.Repeat("y", 1000))
		}
	}
	servePlain(mode)
	return nil
}

// halfPlugin says a handshake of its own and does not keep it.
func halfPlugin(mode string) error {
	l, err := net.Listen("unix", filepath.Join(os.Getenv("PLUGIN_UNIX_SOCKET_DIR"), "s"))
	if err != nil {
		return err
	}
	cert := ""
	if mode != "nocert" {
		cert = base64.RawStdEncoding.EncodeToString(stranger().Certificate[0])
	}
	fmt.Printf("1|1|unix|%s|grpc|%s\n", l.Addr(), cert)
	switch mode {
	case "ends":
		return nil
	case "mute":
		select {}
	}
	g := grpc.NewServer()
	policyv1.RegisterPolicyServer(g, &decider{mode: "plain"})
	return g.Serve(l)
}

// servePlain is how a third party does it with go-plugin alone.
func servePlain(mode string) {
	version := uint(policyplugin.Protocol)
	if mode == "version" {
		version++
	}
	plugin.Serve(&plugin.ServeConfig{
		HandshakeConfig: plugin.HandshakeConfig{
			ProtocolVersion: version, MagicCookieKey: policyplugin.Cookie, MagicCookieValue: policyplugin.Name,
		},
		Plugins:    plugin.PluginSet{policyplugin.Name: &plain{mode: mode}},
		GRPCServer: plugin.DefaultGRPCServer,
		Logger:     hclog.NewNullLogger(),
	})
}

type plain struct {
	plugin.NetRPCUnsupportedPlugin
	mode string
}

func (p *plain) GRPCServer(_ *plugin.GRPCBroker, s *grpc.Server) error {
	if p.mode != "noservice" {
		policyv1.RegisterPolicyServer(s, &decider{mode: p.mode})
	}
	return nil
}

func (*plain) GRPCClient(context.Context, *plugin.GRPCBroker, *grpc.ClientConn) (any, error) {
	return nil, errors.New("not a client")
}

// decider answers as its mode says. Hosts that begin with "no" are denied.
type decider struct {
	policyv1.UnimplementedPolicyServer
	mode string
}

func (d *decider) Decide(_ context.Context, r *policyv1.DecideRequest) (*policyv1.DecideReply, error) {
	switch d.mode {
	case "hang":
		select {}
	case "crash":
		os.Exit(3)
	case "stop":
		// The whole process, the go-plugin server too.
		if err := unix.Kill(os.Getpid(), unix.SIGSTOP); err != nil {
			return nil, err
		}
		select {} // this thread may go on for a moment
	case "verdict":
		return &policyv1.DecideReply{Verdict: 77, Reason: "?"}, nil
	case "unspecified":
		return &policyv1.DecideReply{}, nil
	case "megabyte":
		return policyplugin.Deny(strings.Repeat("x", 1<<20)), nil
	case "dirty":
		return policyplugin.Deny("\x1b]0;title\a\r\n" + strings.Repeat("y", 10000)), nil
	case "error":
		return nil, status.Error(codes.PermissionDenied, "\x1b[31m"+strings.Repeat("z", 50000))
	}
	if strings.HasPrefix(r.GetHost(), "no") {
		return policyplugin.Deny("host " + r.GetHost() + " from " + r.GetSource() + " by " + r.GetTrigger().String() + " of " + r.GetPool()), nil
	}
	return policyplugin.Allow(), nil
}

// host is a service that starts a plugin, says its number and waits to be killed.
func host(args []string) {
	p, err := start(context.Background(), args[0], args[1], nil)
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println("started", p.PID())
	time.Sleep(time.Minute)
	runtime.KeepAlive(p)
}
