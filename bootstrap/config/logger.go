package config

import (
	"io"
	"log/slog"
)

// Logger returns the configured logger, and the variable that changes its level.
func (c *Config) Logger(w io.Writer) (*slog.Logger, *slog.LevelVar) {
	level := &slog.LevelVar{}
	_ = level.UnmarshalText([]byte(c.Logging.Level)) // one of the four names: checked by Load
	options := &slog.HandlerOptions{Level: level}
	if c.Logging.Format == "text" {
		return slog.New(slog.NewTextHandler(w, options)), level
	}
	return slog.New(slog.NewJSONHandler(w, options)), level
}
