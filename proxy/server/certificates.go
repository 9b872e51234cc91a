package server

import (
	"bytes"
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

	pem     []byte // of the client CAs; read by reload alone
	stale   bool   // connections made before the last change may be open
	clients atomic.Pointer[tls.Config]
}

// config returns the configuration for TLS.
func (c *certificates) config() *tls.Config {
	// HTTP/1.1 only: an HTTP/2 connection cannot be upgraded.
	config := &tls.Config{MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"}, GetCertificate: c.get}
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
	pem, _ := os.ReadFile(c.clientCAFile) // CertPool says why not
	if c.clients.Load() != nil && bytes.Equal(pem, c.pem) {
		return nil
	}
	pool, err := tlsutil.CertPool(c.clientCAFile)
	if err != nil {
		pool = x509.NewCertPool()
	}
	c.pem, c.stale = pem, true
	config := c.config()
	config.GetConfigForClient = nil
	config.ClientAuth, config.ClientCAs = tls.RequireAndVerifyClientCert, pool
	config.SessionTicketsDisabled = true // a session would outlive its authority
	c.clients.Store(config)
	return err
}

// follow reloads the authorities, and closes the connections of callers whose certificates they do not vouch for any
// more. It returns how many. It looks at connections once more after a change: some were in their handshake.
func (c *certificates) follow(l *inbound.Listener) (closed int) {
	again := c.stale
	c.stale = false
	if err := c.reload(); err != nil {
		c.log.Error("callers' certificates cannot be verified: refusing all callers", "error", err)
	}
	if c.stale {
		c.log.Info("the authorities for callers' certificates have changed")
	}
	if !again && !c.stale {
		return 0
	}
	roots := c.clients.Load().ClientCAs
	return l.CloseUnless(func(peer []*x509.Certificate) bool {
		options := x509.VerifyOptions{
			Roots: roots, Intermediates: x509.NewCertPool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		}
		for _, certificate := range peer[1:] {
			options.Intermediates.AddCert(certificate)
		}
		_, err := peer[0].Verify(options)
		return err == nil
	})
}
