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

// newTLSConfig returns a configuration with the run directory's certificate, reloaded when bootstrap replaces it.
func newTLSConfig(runDir string, log *slog.Logger) *tls.Config {
	r := &certReloader{
		cert: filepath.Join(runDir, frpc.CertFile), key: filepath.Join(runDir, frpc.KeyFile), log: log,
	}
	// HTTP/1.1 only: an HTTP/2 connection cannot be upgraded.
	return &tls.Config{MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"}, GetCertificate: r.get}
}

// certReloader is a certificate that is reloaded when its file changes.
type certReloader struct {
	cert, key string
	log       *slog.Logger

	mu      sync.Mutex
	changed time.Time
	last    *tls.Certificate
}

// get returns the certificate. It keeps the previous one while loading fails: bootstrap may be between the two files.
func (r *certReloader) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	info, err := os.Stat(r.cert)
	if err == nil && (r.last == nil || !info.ModTime().Equal(r.changed)) {
		var pair tls.Certificate
		if pair, err = tls.LoadX509KeyPair(r.cert, r.key); err == nil {
			r.last, r.changed = &pair, info.ModTime()
		}
	}
	if r.last == nil {
		r.log.Debug("no certificate: check that the tunnel is of type https, and bootstrap's log", "error", err)
		return nil, err
	}
	return r.last, nil
}
