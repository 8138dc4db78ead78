package gobgp

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"

	gobgplog "github.com/osrg/gobgp/v3/pkg/log"
)

// logger gives GoBGP's messages to slog. GoBGP says why a session ended only there, so the last reason of each peer is kept.
type logger struct {
	s    *slog.Logger
	mu   sync.Mutex
	last map[string]string // by peer address
}

func newLogger(s *slog.Logger) *logger { return &logger{s: s, last: map[string]string{}} }

func (l *logger) lastError(peer string) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.last[peer]
}

func (l *logger) write(level slog.Level, msg string, f gobgplog.Fields) {
	peer, isPeer := f["Key"].(string)
	isPeer = isPeer && f["Topic"] == "Peer"
	if isPeer && (msg == "Peer Down" || msg == "failed to connect" || level >= slog.LevelWarn) {
		l.mu.Lock()
		l.last[peer] = reason(msg, f)
		l.mu.Unlock()
	}
	if !l.s.Enabled(context.Background(), level) {
		return
	}
	attrs := make([]slog.Attr, 0, len(f))
	for _, k := range slices.Sorted(maps.Keys(f)) {
		switch k {
		case "Topic", gobgplog.FieldFacility:
		case "Key":
			attrs = append(attrs, slog.Any("peer", f[k]))
		default:
			attrs = append(attrs, slog.Any(strings.ToLower(k), f[k]))
		}
	}
	l.s.LogAttrs(context.Background(), level, msg, attrs...)
}

func reason(msg string, f gobgplog.Fields) string {
	for _, k := range []string{"Reason", "Error", "Data"} {
		if v, ok := f[k]; ok && v != nil {
			return fmt.Sprintf("%s: %v", msg, v)
		}
	}
	return msg
}

func (l *logger) Panic(msg string, f gobgplog.Fields) {
	l.write(slog.LevelError, msg, f)
	panic(msg)
}

func (l *logger) Fatal(msg string, f gobgplog.Fields) {
	l.write(slog.LevelError, msg, f)
	os.Exit(1)
}

func (l *logger) Error(msg string, f gobgplog.Fields) { l.write(slog.LevelError, msg, f) }
func (l *logger) Warn(msg string, f gobgplog.Fields)  { l.write(slog.LevelWarn, msg, f) }
func (l *logger) Info(msg string, f gobgplog.Fields)  { l.write(slog.LevelInfo, msg, f) }
func (l *logger) Debug(msg string, f gobgplog.Fields) { l.write(slog.LevelDebug, msg, f) }
func (l *logger) SetLevel(gobgplog.LogLevel)          {}

// GetLevel lets everything come here: a failed connection is told at this level only.
func (l *logger) GetLevel() gobgplog.LogLevel { return gobgplog.DebugLevel }
