package leasesvc

import (
	"context"
	"crypto/sha256"
	"maps"
	"slices"
	"time"

	leasev1 "github.com/dstm-project/dstm/api/lease/v1"
	"github.com/dstm-project/dstm/internal/tlsid"
)

// Revocation lists of this service go to everybody with a stream: daemons have no way of their own to get one, and each
// checks that an authority it trusts has signed it.

// capLists is what a gateway says that takes revocation lists on its stream.
const capLists = "revocation_lists"

const (
	pushHosts = 1000                   // hosts that are told at a time
	pushPause = 100 * time.Millisecond // and the time to the next ones, so that a long list does not fill the links
)

// missing returns the lists that a caller does not have, by the digests that it gave.
func (s *Server) missing(have [][]byte) []*leasev1.RevocationList {
	lists := s.d.TLS.Lists()
	for _, h := range have {
		if len(h) == sha256.Size {
			delete(lists, [sha256.Size]byte(h))
		}
	}
	var out []*leasev1.RevocationList
	for _, der := range lists {
		if len(der) <= tlsid.MaxList {
			out = append(out, &leasev1.RevocationList{Der: der})
		}
	}
	return out
}

// pushLists ends streams and tells callers when certificates are taken back.
func (s *Server) pushLists(ctx context.Context, ready func()) error {
	told := s.d.TLS.Lists() // to the streams that begin
	changed := make(chan struct{}, 1)
	defer s.d.TLS.OnChange(func() {
		s.endRevoked()
		select {
		case changed <- struct{}{}:
		default:
		}
	})()
	changed <- struct{}{} // before anybody looked
	ready()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
		var known [][]byte
		for sum := range told {
			known = append(known, sum[:])
		}
		told = s.d.TLS.Lists()
		for _, der := range told {
			if len(der) > tlsid.MaxList {
				s.d.Log.Warn("revocation list is too large to be sent to anybody", "bytes", len(der), "most", tlsid.MaxList)
			}
		}
		if lists := s.missing(known); len(lists) > 0 {
			s.push(ctx, lists)
		}
	}
}

// push tells everybody who has a stream: gateways and resolvers first, then hosts, not all at once.
func (s *Server) push(ctx context.Context, lists []*leasev1.RevocationList) {
	s.mu.Lock()
	for ss := range s.sessions {
		go ss.sendLists(lists) // a gateway that reads slowly holds up nobody
	}
	for w := range s.hosts.watchers {
		w.lists = append(w.lists, lists...)
		w.kick()
	}
	all := slices.Collect(maps.Values(s.hosts.byName))
	s.mu.Unlock()
	for some := range slices.Chunk(all, pushHosts) {
		for _, at := range some {
			for _, l := range lists {
				at.tell(&leasev1.AttendDown{M: &leasev1.AttendDown_List{List: l}})
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pushPause):
		}
	}
}

// lists sends a gateway the lists that it lacks, and from now on those that are new.
func (ss *session) lists(have [][]byte) error {
	ss.s.mu.Lock()
	ss.s.sessions[ss] = struct{}{}
	ss.s.mu.Unlock()
	return ss.sendLists(ss.s.missing(have))
}

func (ss *session) sendLists(lists []*leasev1.RevocationList) error {
	for _, l := range lists {
		if err := ss.write(&leasev1.SyncDown{M: &leasev1.SyncDown_List{List: l}}); err != nil {
			return err
		}
	}
	return nil
}
