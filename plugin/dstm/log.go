package dstm

import (
	"context"
	"log/slog"
	"strings"
)

// logHandler writes structured records of libraries to CoreDNS's log.
type logHandler struct{ attrs string }

// Enabled implements slog.Handler.
func (logHandler) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelInfo }

// Handle implements slog.Handler.
func (h logHandler) Handle(_ context.Context, r slog.Record) error {
	var b strings.Builder
	b.WriteString(r.Message)
	b.WriteString(h.attrs)
	r.Attrs(func(a slog.Attr) bool {
		b.WriteString(" " + a.String())
		return true
	})
	switch {
	case r.Level >= slog.LevelError:
		log.Error(b.String())
	case r.Level >= slog.LevelWarn:
		log.Warning(b.String())
	default:
		log.Info(b.String())
	}
	return nil
}

// WithAttrs implements slog.Handler.
func (h logHandler) WithAttrs(as []slog.Attr) slog.Handler {
	for _, a := range as {
		h.attrs += " " + a.String()
	}
	return h
}

// WithGroup implements slog.Handler. Groups are not shown: the libraries used here have none.
func (h logHandler) WithGroup(string) slog.Handler { return h }
