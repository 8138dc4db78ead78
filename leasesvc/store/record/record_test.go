package record

import (
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/dstm-project/dstm/lease"
)

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
	})
}
