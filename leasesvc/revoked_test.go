package leasesvc_test

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"log/slog"
	"math/big"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/dstm-project/dstm/internal/pki"
	"github.com/dstm-project/dstm/internal/tlsid"
	"github.com/dstm-project/dstm/leasesvc/leaseclient"
)

// TestRevoked: a certificate that is taken back loses its streams and is refused, without a restart; others notice nothing.
func TestRevoked(t *testing.T) {
	w := newWorld(t, onePool)
	crl, err := pki.Revoke(w.ca, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	w.stop()
	w.crl = crl
	w.up()
	files, err := pki.Issue(w.ca, t.TempDir(), tlsid.ID{TrustDomain: "example.net", Cell: "lab", Role: tlsid.RoleHost, Name: "stolen"}, pki.Options{})
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(files.Cert)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(b)
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	id, err := tlsid.Open(files, tlsid.RoleHost, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	stolen, honest := w.clientOf(id), w.client(tlsid.RoleHost, "honest")
	a, _, err := stolen.Attend(t.Context(), leaseclient.Hello{Instance: "1"})
	if err != nil {
		t.Fatal(err)
	}
	keeps, _, err := honest.Attend(t.Context(), leaseclient.Hello{Instance: "1"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pki.Revoke(w.ca, time.Hour, cert.SerialNumber, big.NewInt(7)); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { _, err := a.Recv(); ended <- err }()
	select {
	case err := <-ended:
		if err == nil || !strings.Contains(err.Error(), "of stolen is revoked") {
			t.Errorf("the stream ended with %v", err)
		}
	case <-time.After(2 * patience):
		t.Fatal("the stream of a revoked certificate goes on")
	}
	ctx, end := context.WithTimeout(t.Context(), 3*time.Second)
	defer end()
	if err := stolen.Release(ctx, leaseclient.Lease{}.Ref, 0); err == nil {
		t.Error("a call over the old connection is served")
	}
	stolen.Reset()
	if _, _, err := stolen.Attend(ctx, leaseclient.Hello{Instance: "2"}); err == nil {
		t.Error("a new connection is taken")
	}
	still := make(chan error, 1)
	go func() { _, err := keeps.Recv(); still <- err }()
	select {
	case err := <-still:
		t.Errorf("the stream of another host ended: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
}
