// Package tlsid gives every part of DSTM its identity: URI SANs in certificates, TLS 1.3 on both sides, and files that
// are reloaded while streams stay up.
package tlsid

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"google.golang.org/grpc/peer"
)

// Role is what the holder of a certificate may do. It is checked on every call.
type Role string

// The roles.
const (
	RoleSvc      Role = "svc"      // lease service
	RoleTEP      Role = "tep"      // gateway
	RoleResolver Role = "resolver" // CoreDNS with the plugin
	RoleHost     Role = "host"     // host agent
	RoleOperator Role = "operator" // people and their tools
)

// Roles lists all roles, for messages and completions.
func Roles() []Role { return []Role{RoleSvc, RoleTEP, RoleResolver, RoleHost, RoleOperator} }

// ID is one identity: spiffe://<trust domain>/dstm/<cell>/<role>/<name>.
type ID struct {
	TrustDomain string
	Cell        string
	Role        Role
	Name        string
}

// String returns the URI that stands in the certificate.
func (id ID) String() string {
	return fmt.Sprintf("spiffe://%s/dstm/%s/%s/%s", id.TrustDomain, id.Cell, id.Role, id.Name)
}

var (
	domainRE = regexp.MustCompile(`^[a-z0-9._-]{1,255}$`)
	labelRE  = regexp.MustCompile(`^[A-Za-z0-9._-]{1,63}$`)
)

// ErrNoID means that a certificate carries no identity of DSTM.
var ErrNoID = errors.New("certificate has no URI SAN of the form spiffe://<trust domain>/dstm/<cell>/<role>/<name>")

// Check says what is wrong with the identity. Trust domain: lower case letters, digits and "._-"; cell and name also
// upper case, at most 63 bytes each.
func (id ID) Check() error {
	switch {
	case !domainRE.MatchString(id.TrustDomain):
		return fmt.Errorf("trust domain %q: want 1 to 255 of a-z 0-9 . _ -", id.TrustDomain)
	case !labelRE.MatchString(id.Cell):
		return fmt.Errorf("cell %q: want 1 to 63 of A-Z a-z 0-9 . _ -", id.Cell)
	case !slices.Contains(Roles(), id.Role):
		return fmt.Errorf("role %q: want one of %v", id.Role, Roles())
	case !labelRE.MatchString(id.Name):
		return fmt.Errorf("name %q: want 1 to 63 of A-Z a-z 0-9 . _ -", id.Name)
	}
	return nil
}

// ParseID reads an identity from its URI.
func ParseID(uri string) (ID, error) {
	rest, ok := strings.CutPrefix(uri, "spiffe://")
	parts := strings.Split(rest, "/")
	if !ok || len(parts) != 5 || parts[1] != "dstm" {
		return ID{}, fmt.Errorf("identity %q: want spiffe://<trust domain>/dstm/<cell>/<role>/<name>", uri)
	}
	id := ID{TrustDomain: parts[0], Cell: parts[2], Role: Role(parts[3]), Name: parts[4]}
	if err := id.Check(); err != nil {
		return ID{}, fmt.Errorf("identity %q: %w", uri, err)
	}
	return id, nil
}

// FromCert reads the identity of a certificate. It returns ErrNoID when there is none; two are an error, because the
// reader of a log must be able to tell which one acted.
func FromCert(c *x509.Certificate) (ID, error) {
	var found []ID
	for _, u := range c.URIs {
		if u.Scheme != "spiffe" {
			continue
		}
		id, err := ParseID(u.String())
		if err != nil {
			return ID{}, err
		}
		found = append(found, id)
	}
	switch len(found) {
	case 0:
		return ID{}, ErrNoID
	case 1:
		return found[0], nil
	}
	return ID{}, fmt.Errorf("certificate has %d identities (%s, %s, ...): want one", len(found), found[0], found[1])
}

// ErrNoCert means that the caller showed no certificate.
var ErrNoCert = errors.New("call has no verified client certificate")

// PeerOf returns the other side of a connection of Conns on which a gRPC method is called.
func PeerOf(ctx context.Context) (*Peer, bool) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil, false
	}
	own, ok := p.AuthInfo.(*Peer)
	return own, ok
}

// PeerID returns the verified identity of the caller of a gRPC method on a connection of Conns.
func PeerID(ctx context.Context) (ID, error) {
	p, ok := PeerOf(ctx)
	if !ok {
		return ID{}, errors.New("call has no peer")
	}
	return p.ID, p.Err
}
