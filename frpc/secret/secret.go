// Package secret holds the type of credentials, and keeps them off disks and out of logs.
package secret

import (
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"syscall"
)

// Secret is a string that prints as [redacted] with fmt and log/slog. JSON and TOML hold it in the clear, in files with
// mode 0600 on a memory volume.
type Secret string

// Reveal returns the secret itself, for code that sends it, writes it to frpc's files, or compares its hash.
func (s Secret) Reveal() string { return string(s) }

// String returns "[redacted]", or an empty string if there is no secret.
func (s Secret) String() string {
	if s == "" {
		return ""
	}
	return "[redacted]"
}

// Format prints String for every verb, so that %x and %#v reveal nothing either.
func (s Secret) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(s.String())) }

// RedactIn returns err, or an error with the same text but for the secret, if that is in it.
func (s Secret) RedactIn(err error) error {
	if s == "" || !strings.Contains(err.Error(), s.Reveal()) {
		return err
	}
	return errors.New(strings.ReplaceAll(err.Error(), s.Reveal(), s.String()))
}

// LogValue implements [slog.LogValuer].
func (s Secret) LogValue() slog.Value { return slog.StringValue(s.String()) }

// ForbidCoreDumps keeps this process's memory, and the secrets in it, from being written to a disk.
func ForbidCoreDumps() {
	_ = syscall.Setrlimit(syscall.RLIMIT_CORE, &syscall.Rlimit{})
}
