package main

import (
	"crypto/tls"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pipeops/vm-agent/frpc"
)

// tlsListener speaks TLS with those who begin with a handshake, as a tunnel of type https brings them, and plain
// HTTP with the others: frpc's health check speaks nothing else, and a lease may change the tunnel's type.
type tlsListener struct {
	net.Listener

	config *tls.Config
}

// newTLSListener takes the certificate from the run directory, anew whenever bootstrap has written another.
func newTLSListener(listener net.Listener, runDir string, log *slog.Logger) net.Listener {
	files := &certificateFiles{cert: filepath.Join(runDir, frpc.CertFile), key: filepath.Join(runDir, frpc.KeyFile), log: log}
	// HTTP/1.1 alone: an HTTP/2 connection cannot be upgraded.
	return &tlsListener{listener, &tls.Config{MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"}, GetCertificate: files.get}}
}

func (l *tlsListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &tlsOrPlain{Conn: conn, config: l.config}, nil
}

// tlsOrPlain is a connection whose first byte from the caller decides what it is. Servers read first.
type tlsOrPlain struct {
	net.Conn // what was accepted

	config  *tls.Config
	decided bool
	tls     atomic.Pointer[tls.Conn] // nil while it is plain
}

// handshakeRecord is the first byte of every TLS connection (RFC 8446, 5.1), and of no HTTP request.
const handshakeRecord = 0x16

func (c *tlsOrPlain) Read(p []byte) (int, error) {
	if !c.decided && len(p) > 0 {
		n, err := c.Conn.Read(p[:1])
		if n == 0 || p[0] != handshakeRecord {
			c.decided = n > 0
			return n, err
		}
		c.decided = true
		c.tls.Store(tls.Server(&unread{Conn: c.Conn, first: []byte{handshakeRecord}}, c.config))
	}
	return c.spoken().Read(p)
}

// spoken is the connection as the caller speaks.
func (c *tlsOrPlain) spoken() net.Conn {
	if t := c.tls.Load(); t != nil {
		return t
	}
	return c.Conn
}

func (c *tlsOrPlain) Write(p []byte) (int, error) { return c.spoken().Write(p) }

func (c *tlsOrPlain) Close() error { return c.spoken().Close() }

// CloseWrite is what net/http looks for to say the last word and still listen.
func (c *tlsOrPlain) CloseWrite() error {
	return c.spoken().(interface{ CloseWrite() error }).CloseWrite() // a *net.TCPConn or a *tls.Conn
}

// unread gives back what was read to decide.
type unread struct {
	net.Conn

	first []byte
}

func (c *unread) Read(p []byte) (int, error) {
	if len(c.first) > 0 {
		n := copy(p, c.first)
		c.first = c.first[n:]
		return n, nil
	}
	return c.Conn.Read(p)
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
	if err == nil && f.last != nil && info.ModTime().Equal(f.changed) {
		return f.last, nil
	}
	if err == nil {
		var pair tls.Certificate
		if pair, err = tls.LoadX509KeyPair(f.cert, f.key); err == nil {
			f.last, f.changed = &pair, info.ModTime()
		}
	}
	if f.last != nil { // bootstrap may be between the two files
		return f.last, nil
	}
	f.log.Warn("a caller cannot be shown the tunnel's certificate: check that the tunnel is of type https, and bootstrap's log", "error", err)
	return nil, err
}
