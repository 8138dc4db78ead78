package daemon

import (
	"fmt"
	"io"
	"log/slog"
)

// LogConfig is the log section of every daemon's configuration.
type LogConfig struct {
	Level  string `yaml:"level"`  // debug, info (default), warn, error
	Format string `yaml:"format"` // text (default), json
}

// Check says what is wrong with the section.
func (c LogConfig) Check() error {
	if _, err := c.level(); err != nil {
		return err
	}
	switch c.Format {
	case "", "text", "json":
		return nil
	}
	return fmt.Errorf("log format %q: want text or json", c.Format)
}

func (c LogConfig) level() (slog.Level, error) {
	switch c.Level {
	case "debug":
		return slog.LevelDebug, nil
	case "", "info":
		return slog.LevelInfo, nil
	case "warn":
		return slog.LevelWarn, nil
	case "error":
		return slog.LevelError, nil
	}
	return 0, fmt.Errorf("log level %q: want debug, info, warn or error", c.Level)
}

// Logger returns a logger that writes to w. A section that Check refuses logs as the default does.
func (c LogConfig) Logger(w io.Writer) *slog.Logger {
	lvl, err := c.level()
	if err != nil {
		lvl = slog.LevelInfo
	}
	opts := &slog.HandlerOptions{Level: lvl}
	if c.Format == "json" {
		return slog.New(slog.NewJSONHandler(w, opts))
	}
	return slog.New(slog.NewTextHandler(w, opts))
}
