package external

import (
	"bytes"
	"log/slog"
	"sync"

	"golang.org/x/time/rate"

	"github.com/dstm-project/dstm/leasesvc/policy"
)

const (
	maxLine   = 500 // bytes of a line that are kept
	lineRate  = 20  // lines per second
	lineBurst = 100
)

// output writes the lines of a plugin to a log: no more than the log can bear, and nothing that a terminal would obey.
type output struct {
	log   *slog.Logger
	limit *rate.Limiter

	mu      sync.Mutex
	line    []byte
	dropped int
}

func newOutput(log *slog.Logger) *output {
	return &output{log: log, limit: rate.NewLimiter(lineRate, lineBurst)}
}

// Write implements io.Writer. Lines that two goroutines write at a time may be mixed.
func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	n := len(b)
	for {
		part, rest, ended := bytes.Cut(b, []byte{'\n'})
		o.line = append(o.line, part[:min(len(part), maxLine-len(o.line))]...)
		if !ended {
			return n, nil
		}
		o.flush()
		b = rest
	}
}

func (o *output) flush() {
	text := policy.Clean(string(o.line), maxLine)
	o.line = o.line[:0]
	switch {
	case text == "":
	case !o.limit.Allow():
		o.dropped++
	default:
		if o.dropped > 0 {
			o.log.Warn("policy plugin says too much", "dropped", o.dropped)
			o.dropped = 0
		}
		o.log.Info("policy plugin says", "text", text)
	}
}
