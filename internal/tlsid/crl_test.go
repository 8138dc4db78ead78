package tlsid_test

import (
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dstm-project/dstm/internal/pki"
	"github.com/dstm-project/dstm/internal/tlsid"
)

// TestCRLFile: a list that cannot be trusted stops the start, and says why.
func TestCRLFile(t *testing.T) {
	dir, foreign := t.TempDir(), t.TempDir()
	for _, d := range []string{dir, foreign} {
		if err := pki.Init(d, "example.net", time.Hour); err != nil {
			t.Fatal(err)
		}
	}
	files, err := pki.Issue(dir, dir, tlsid.ID{TrustDomain: "example.net", Cell: "lab", Role: tlsid.RoleHost, Name: "h"}, pki.Options{})
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := pki.Revoke(foreign, time.Hour, big.NewInt(1))
	if err != nil {
		t.Fatal(err)
	}
	ours, err := pki.Revoke(dir, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	again, err := pki.Revoke(dir, time.Hour, big.NewInt(5))
	if err != nil || again != ours {
		t.Fatalf("%s, %v: want the same file again", again, err)
	}
	garbage := filepath.Join(dir, "garbage.pem")
	if err := os.WriteFile(garbage, []byte("no list"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ name, crl, want string }{
		{"good", ours, ""},
		{"another authority's", theirs, "not signed by an authority in ca"},
		{"garbage", garbage, "want lists as dstm pki revoke writes them"},
		{"missing", filepath.Join(dir, "none.pem"), "no such file"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := files
			f.CRL = c.crl
			_, err := tlsid.Open(f, tlsid.RoleHost, slog.New(slog.DiscardHandler))
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
	if _, err := pki.Revoke(dir, -time.Hour); err == nil || !strings.Contains(err.Error(), "want more than 0") {
		t.Errorf("negative validity: %v", err)
	}
}
