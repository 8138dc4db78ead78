package gobgp

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/dstm-project/dstm/bgp"
	"github.com/dstm-project/dstm/bgp/bgptest"
)

func TestContract(t *testing.T) {
	bgptest.Run(t, func(t *testing.T) bgp.Speaker {
		return New(slog.New(slog.NewTextHandler(t.Output(), nil)))
	})
}

// TestDeadPeer has a neighbour at whose address nobody listens: nothing waits for it, and Status says what is wrong.
func TestDeadPeer(t *testing.T) {
	s := New(slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	pool := netip.MustParsePrefix("198.51.100.0/24")
	peer := bgp.Peer{Address: netip.IPv6Loopback(), Port: 1, ASN: 64513, HoldTime: 9 * time.Second}
	conf := bgp.Config{ASN: 64512, RouterID: netip.MustParseAddr("192.0.2.1"), Allow: []netip.Prefix{pool}, Peers: []bgp.Peer{peer}}
	if err := s.Configure(ctx, conf); err != nil {
		t.Fatal(err)
	}
	if adv, err := s.Set(ctx, bgp.RouteSet{Routes: []bgp.Route{{Prefix: pool}}}); err != nil || len(adv.Prefixes) != 1 {
		t.Fatal(adv, err)
	}
	bgptest.Eventually(t, "the reason", func() error {
		st, err := s.Status(ctx)
		if err != nil || len(st.Peers) != 1 || st.Peers[0].State == "ESTABLISHED" {
			t.Fatal(st, err)
		}
		if p := st.Peers[0]; !strings.Contains(p.LastError, "connection refused") {
			return fmt.Errorf("%+v", p)
		}
		return nil
	})
	if err := s.Close(ctx, bgp.Withdraw); err != nil {
		t.Error(err)
	}
}
