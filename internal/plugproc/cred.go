package plugproc

import (
	"context"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/credentials"
)

// sameUser are transport credentials without a handshake of their own: who is at the other end of the unix socket must run
// as our own user, as the kernel says (SO_PEERCRED, unix(7)).
type sameUser struct{}

type authInfo struct{ credentials.CommonAuthInfo }

func (authInfo) AuthType() string { return "peercred" }

func (sameUser) ClientHandshake(_ context.Context, _ string, c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return checkPeer(c, os.Geteuid())
}

func (sameUser) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return checkPeer(c, os.Geteuid())
}

func (sameUser) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "peercred"}
}
func (sameUser) Clone() credentials.TransportCredentials { return sameUser{} }
func (sameUser) OverrideServerName(string) error         { return nil }

func checkPeer(c net.Conn, uid int) (net.Conn, credentials.AuthInfo, error) {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return nil, nil, fmt.Errorf("connection of type %T: want a unix socket", c)
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return nil, nil, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return nil, nil, err
	}
	if credErr != nil {
		return nil, nil, fmt.Errorf("SO_PEERCRED: %w", credErr)
	}
	if int(cred.Uid) != uid {
		return nil, nil, fmt.Errorf("the other end runs as uid %d: want %d", cred.Uid, uid)
	}
	return c, authInfo{credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}}, nil
}
