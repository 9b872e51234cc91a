package server

import (
	"crypto/tls"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/pipeops/vm-agent/frpc"
)

// newTLSConfig takes the certificate from the run directory, anew whenever bootstrap has written another.
func newTLSConfig(runDir string, log *slog.Logger) *tls.Config {
	files := &certificateFiles{cert: filepath.Join(runDir, frpc.CertFile), key: filepath.Join(runDir, frpc.KeyFile), log: log}
	// HTTP/1.1 alone: an HTTP/2 connection cannot be upgraded.
	return &tls.Config{MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"}, GetCertificate: files.get}
}

// certificateFiles is a certificate that is read anew when its file changes.
type certificateFiles struct {
	cert, key string
	log       *slog.Logger

	mu      sync.Mutex
	changed time.Time
	last    *tls.Certificate
}

func (f *certificateFiles) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	info, err := os.Stat(f.cert)
	if err == nil && (f.last == nil || !info.ModTime().Equal(f.changed)) {
		var pair tls.Certificate
		if pair, err = tls.LoadX509KeyPair(f.cert, f.key); err == nil {
			f.last, f.changed = &pair, info.ModTime()
		}
	}
	if f.last == nil {
		f.log.Debug("a caller cannot be shown the tunnel's certificate: check that the tunnel is of type https, and bootstrap's log", "error", err)
		return nil, err
	}
	return f.last, nil // bootstrap may be between the two files
}
