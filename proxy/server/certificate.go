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

// newTLSConfig returns a configuration with the run directory's certificate, reloaded when its file changes. If loading
// fails it keeps the previous one: bootstrap may have written only one of the two files yet.
func newTLSConfig(runDir string, log *slog.Logger) *tls.Config {
	cert, key := filepath.Join(runDir, frpc.CertFile), filepath.Join(runDir, frpc.KeyFile)
	var mu sync.Mutex
	var changed time.Time
	var last *tls.Certificate
	get := func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
		mu.Lock()
		defer mu.Unlock()
		info, err := os.Stat(cert)
		if err == nil && (last == nil || !info.ModTime().Equal(changed)) {
			var pair tls.Certificate
			if pair, err = tls.LoadX509KeyPair(cert, key); err == nil {
				last, changed = &pair, info.ModTime()
			}
		}
		if last == nil {
			log.Debug("no certificate: check that the tunnel is of type https, and bootstrap's log", "error", err)
			return nil, err
		}
		return last, nil
	}
	// HTTP/1.1 only: an HTTP/2 connection cannot be upgraded.
	return &tls.Config{MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"}, GetCertificate: get}
}
