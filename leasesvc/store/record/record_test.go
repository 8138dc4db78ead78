package record

import (
	"net/netip"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/dstm-project/dstm/lease"
)

// TestAuditSize: N9 asks for at most 300 bytes a lease.
func TestAuditSize(t *testing.T) {
	a := lease.Audit{
		Ref: lease.Ref{Resource: lease.Whole(netip.MustParseAddr("198.51.100.7")), Gen: lease.MakeGen(65535, lease.MaxRev)}, Host: strings.Repeat("h", 63),
		Source: netip.MustParseAddr("2001:db8::1"), TEP: netip.MustParseAddr("2001:db8::2"), Trigger: 4, End: 13,
	}
	b, err := proto.Marshal(EncodeAudit(a))
	if err != nil {
		t.Fatal(err)
	}
	if n := len(b) + len(AuditKey(a.Ref)); n > 300 {
		t.Errorf("an audit record takes %d bytes, want at most 300", n)
	}
}

func FuzzDecodeAddress(f *testing.F) {
	b, err := proto.Marshal(EncodeAddress(lease.Address{Host: "h"}))
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte{198, 51, 100, 1, 0, 0, 0}, b)
	f.Fuzz(func(t *testing.T, k, v []byte) {
		a, err := DecodeAddress(k, v)
		if err == nil && a.Resource.Valid() != nil {
			t.Errorf("invalid resource %v without an error", a.Resource)
		}
		if _, err := DecodeAudit(k, v); err == nil && len(k) != 15 {
			t.Errorf("audit key of %d bytes taken", len(k))
		}
	})
}
