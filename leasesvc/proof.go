package leasesvc

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"net/netip"

	leasev1 "github.com/dstm-project/dstm/api/lease/v1"
	"github.com/dstm-project/dstm/internal/wire"
	"github.com/dstm-project/dstm/lease"
)

// Where hosts are known by their address (hosts.identity: address), the address of a call is all that tells who calls. It is
// proven no further than the network enforces it (SAVI, BCP 38) and TCP needs it, so what changes a lease must show a secret
// that only its holder was told.

// addressIdentity is the identity of a host that is known by its address. It cannot be one of a certificate.
func addressIdentity(a netip.Addr) string { return "addr:" + a.String() }

// proofLen is the length of a secret in bytes.
const proofLen = 16

// proof is the secret of a lease. It is derived, so that it needs no place in the store and outlives a restart.
func (s *Server) proof(host string, ref lease.Ref) []byte {
	m := hmac.New(sha256.New, s.secret[:])
	m.Write(ref.Addr.AsSlice())
	var b [11]byte
	b[0] = ref.PSIDLen
	binary.BigEndian.PutUint16(b[1:], ref.PSID)
	binary.BigEndian.PutUint64(b[3:], uint64(ref.Gen))
	m.Write(b[:])
	m.Write([]byte(host))
	return m.Sum(nil)[:proofLen]
}

// holder returns the identity under which a caller acts on a lease: its own, or that of the holder when it is known by its
// address and shows the secret.
func (s *Server) holder(c caller, ref lease.Ref, secret []byte) (string, error) {
	if !c.byAddress {
		return c.id.Name, nil
	}
	s.mu.Lock()
	core, host := s.core(ref.Resource), ""
	if core != nil {
		in, _ := core.Lookup(s.now().Mono, ref.Resource)
		host = in.Host
	}
	s.mu.Unlock()
	if !hmac.Equal(secret, s.proof(host, ref)) {
		s.m.refused.WithLabelValues("secret").Inc()
		return "", deny(lease.ReasonNotAllowed, "lease %s: its secret is missing or wrong", ref)
	}
	return host, nil
}

// held decodes the lease that a Bind wants to take along. One that proves nothing is left out: the host gets another.
func (s *Server) held(c caller, m *leasev1.Held) (lease.Ref, error) {
	if m == nil || !c.byAddress {
		return lease.Ref{}, nil
	}
	ref, err := wire.Ref("held.lease", m.GetLease())
	if err != nil {
		return lease.Ref{}, invalid(err)
	}
	if _, err := s.holder(c, ref, m.GetSecret()); err != nil {
		return lease.Ref{}, nil //nolint:nilerr // counted there
	}
	return ref, nil
}
