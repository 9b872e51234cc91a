package server

import (
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pipeops/vm-agent/frpc"
	"github.com/pipeops/vm-agent/frpc/tlsutil"
	"github.com/pipeops/vm-agent/proxy/inbound"
)

// certificates are what the tunnel listener shows and, if clientCAFile is set, asks of callers.
type certificates struct {
	runDir, clientCAFile string
	log                  *slog.Logger

	mu      sync.Mutex
	changed time.Time
	last    *tls.Certificate

	clients atomic.Pointer[tls.Config]
}

// config returns the configuration for TLS.
func (c *certificates) config() *tls.Config {
	// Callers who upgrade offer HTTP/1.1 only: an HTTP/2 connection cannot be upgraded.
	config := &tls.Config{MinVersion: tls.VersionTLS12, NextProtos: []string{"h2", "http/1.1"}, GetCertificate: c.get}
	if c.clientCAFile != "" {
		config.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) { return c.clients.Load(), nil }
	}
	return config
}

// get returns the run directory's certificate, reloaded when its file changes. If loading fails it keeps the previous
// one: bootstrap may have written only one of the two files yet.
func (c *certificates) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	cert, key := filepath.Join(c.runDir, frpc.CertFile), filepath.Join(c.runDir, frpc.KeyFile)
	c.mu.Lock()
	defer c.mu.Unlock()
	info, err := os.Stat(cert)
	if err == nil && (c.last == nil || !info.ModTime().Equal(c.changed)) {
		var pair tls.Certificate
		if pair, err = tls.LoadX509KeyPair(cert, key); err == nil {
			c.last, c.changed = &pair, info.ModTime()
		}
	}
	if c.last == nil {
		c.log.Debug("no certificate: check that the tunnel is of type https, and bootstrap's log", "error", err)
		return nil, err
	}
	return c.last, nil
}

// reload reads the authorities for callers' certificates. While there is no valid file, no caller is accepted.
func (c *certificates) reload() error {
	if c.clientCAFile == "" {
		return nil
	}
	pool, err := tlsutil.CertPool(c.clientCAFile)
	if last := c.clients.Load(); last != nil && pool.Equal(last.ClientCAs) {
		return nil
	}
	config := c.config()
	config.GetConfigForClient = nil
	config.ClientAuth, config.ClientCAs = tls.RequireAndVerifyClientCert, pool
	config.SessionTicketsDisabled = true // a session would outlive its authority
	c.clients.Store(config)
	return err
}

// follow reloads the authorities, and closes the connections of callers whose certificates have expired, or are no
// longer vouched for. It returns how many.
func (c *certificates) follow(l *inbound.Listener) (closed int) {
	if err := c.reload(); err != nil {
		c.log.Error("callers' certificates cannot be verified: refusing all callers", "error", err)
	}
	valid := map[string]bool{} // by certificate: many connections have the same
	return l.CloseUnless(func(peer []*x509.Certificate) bool {
		options := x509.VerifyOptions{
			Roots: c.clients.Load().ClientCAs, Intermediates: x509.NewCertPool(),
			KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		}
		key := string(peer[0].Raw)
		if _, known := valid[key]; !known {
			for _, certificate := range peer[1:] {
				options.Intermediates.AddCert(certificate)
			}
			_, err := peer[0].Verify(options)
			valid[key] = err == nil
		}
		return valid[key]
	})
}
