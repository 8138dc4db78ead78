package tlsid

import (
	"strings"
	"testing"
)

func TestParseID(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"spiffe://example.net/dstm/lab/host/host1", ""},
		{"spiffe://example.net/dstm/lab/host/", "name \"\""},
		{"spiffe://example.net/dstm/lab/host/a b", `name "a b"`},
		{"spiffe://example.net/other/lab/host/a", "want spiffe://"},
		{"https://example.net/dstm/lab/host/a", "want spiffe://"},
		{"spiffe://EXAMPLE/dstm/lab/host/a", `trust domain "EXAMPLE"`},
		{"spiffe://example.net/dstm/lab/root/a", `role "root": want one of`},
		{"spiffe://example.net/dstm/lab/host/a/b", "want spiffe://"},
	} {
		id, err := ParseID(c.in)
		switch {
		case c.want == "" && (err != nil || id.String() != c.in):
			t.Errorf("%s: %v, %v, want the same back", c.in, id, err)
		case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
			t.Errorf("%s: error %v, want %q in it", c.in, err, c.want)
		}
	}
}

func FuzzParseID(f *testing.F) {
	f.Add("spiffe://example.net/dstm/lab/host/host1")
	f.Add("spiffe:////")
	f.Fuzz(func(t *testing.T, in string) {
		id, err := ParseID(in)
		if err == nil && id.String() != in {
			t.Errorf("%q parsed to %q", in, id)
		}
	})
}
