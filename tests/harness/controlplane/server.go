package controlplane

import (
	"context"
	"net"
	"net/http"
	"sync"
)

// Server is one of a control plane's servers. Tests stop it, start it again at the same address, and freeze it.
type Server struct {
	address string
	make    func() *http.Server
	running *http.Server
	frozen  sync.RWMutex
}

// Start makes the server listen and serve.
func (s *Server) Start(ctx context.Context) error {
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", s.address)
	if err != nil {
		return err
	}
	s.address, s.running = listener.Addr().String(), s.make()
	go func(server *http.Server, listener net.Listener) {
		if server.TLSConfig != nil {
			_ = server.ServeTLS(listener, "", "")
		} else {
			_ = server.Serve(listener)
		}
	}(s.running, freezable{listener, s})
	return nil
}

// Stop closes the listener and all connections.
func (s *Server) Stop() { _ = s.running.Close() }

// Freeze stops the server as SIGSTOP stops a process: the kernel goes on accepting connections and bytes.
func (s *Server) Freeze() { s.frozen.Lock() }

// Thaw ends Freeze.
func (s *Server) Thaw() { s.frozen.Unlock() }

func (s *Server) wait() {
	s.frozen.RLock()
	s.frozen.RUnlock() //nolint:staticcheck // it only waits
}

type freezable struct {
	net.Listener
	server *Server
}

func (l freezable) Accept() (net.Conn, error) {
	l.server.wait()
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return freezableConn{conn, l.server}, nil
}

type freezableConn struct {
	net.Conn
	server *Server
}

func (c freezableConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.server.wait()
	return n, err
}

func (c freezableConn) Write(p []byte) (int, error) {
	c.server.wait()
	return c.Conn.Write(p)
}
