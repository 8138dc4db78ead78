package leasesvc

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	leasev1 "github.com/dstm-project/dstm/api/lease/v1"
)

// backupChunk is the data of one message of a backup.
const backupChunk = 256 << 10

// Backup implements the Operators service. The copy is made in a file first: while it is read the store keeps everything
// that changes, so it is not read at the pace of whom it is sent to.
func (a operatorsAPI) Backup(_ *leasev1.BackupRequest, st leasev1.Operators_BackupServer) error {
	s := a.s
	if !s.backup.TryLock() {
		return status.Error(codes.ResourceExhausted, "a backup is under way: want one at a time")
	}
	defer s.backup.Unlock()
	f, err := scratch(s.cfg.CopiesDir())
	if err != nil {
		return status.Errorf(codes.Internal, "backup: %v", err)
	}
	defer f.Close()
	if err := s.d.Store.Snapshot(st.Context(), f); err != nil {
		return unread(st.Context(), err)
	}
	n, err := send(st, f)
	if err != nil {
		return err
	}
	s.d.Log.Info("backup sent", "operator", callerOf(st.Context()).id.Name, "bytes", n)
	return nil
}

// send streams a file from its beginning, and its digest.
func send(st leasev1.Operators_BackupServer, f *os.File) (n int64, err error) {
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return 0, status.Errorf(codes.Internal, "backup: %v", err)
	}
	sum := sha256.New()
	for {
		b := make([]byte, backupChunk) // a message that was sent is not changed any more
		k, err := io.ReadFull(f, b)
		switch {
		case errors.Is(err, io.EOF):
			return n, st.Send(&leasev1.BackupChunk{Sha256: sum.Sum(nil)})
		case err != nil && !errors.Is(err, io.ErrUnexpectedEOF):
			return n, status.Errorf(codes.Internal, "backup: %v", err)
		}
		_, _ = sum.Write(b[:k]) // never fails, see hash.Hash
		if err := st.Send(&leasev1.BackupChunk{Data: b[:k]}); err != nil {
			return n, err
		}
		n += int64(k)
	}
}

// scratch makes a file without a name, which is gone when it is closed.
func scratch(dir string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	f, err := os.CreateTemp(dir, "backup-*.tmp")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		return nil, fmt.Errorf("%w (and %w)", err, f.Close())
	}
	return f, nil
}
