package server

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"time"
)

// WriteHeader also limits the time for the rest of a body that nobody will read: net/http, or ReverseProxy, would wait
// for it before the answer is sent, for ever. A caller who still sends it then sees the answer, not a reset connection.
func (s *scope) WriteHeader(code int) {
	if code >= 200 {
		s.begin(code)
		if !s.authenticated && s.agentID != "" { // else one could pipeline requests, and read no answer
			s.Header().Set("Connection", "close")
		}
		if !s.Body.Ended() && (code >= 400 || !s.answersEarly) {
			s.Header().Set("Connection", "close")
			s.Body.Within(2 * time.Second)
		}
		if s.http2 { // one request must not close the connection for the others
			s.Header().Del("Connection")
			if !s.admitted {
				_ = http.NewResponseController(s.ResponseWriter).SetWriteDeadline(time.Now().Add(2 * time.Second))
			}
		}
		if s.renew {
			s.Header().Set("Connection", "close") // net/http sends GOAWAY: what runs goes on
		}
	}
	s.ResponseWriter.WriteHeader(code)
}

// begin records the status and sets our headers, in place of any that the API server may have sent. It does so last,
// because ReverseProxy clears all headers when a 1xx passes.
func (s *scope) begin(code int) {
	s.code = code
	s.Header().Set("X-Request-Id", s.requestID)
	if s.agentID != "" {
		// It tells a gateway that the agent has answered, and not frps for an agent that is not connected.
		s.Header().Set("Pipeops-Agent", s.agentID)
	}
}

func (s *scope) Write(data []byte) (int, error) {
	if s.code == 0 {
		s.WriteHeader(http.StatusOK)
	}
	return s.send(s.ResponseWriter, data)
}

// send writes data to the caller, counts it, and records that it waits.
func (s *scope) send(to io.Writer, data []byte) (int, error) {
	s.blocked.Store(time.Now().UnixNano())
	n, err := to.Write(data)
	s.blocked.Store(0)
	s.bytes.Add(int64(n))
	s.metrics.sent.Add(float64(n))
	return n, err
}

// FlushError is what http.ResponseController calls.
func (s *scope) FlushError() error {
	s.blocked.Store(time.Now().UnixNano())
	defer s.blocked.Store(0)
	return http.NewResponseController(s.ResponseWriter).Flush()
}

func (s *scope) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, buffer, err := http.NewResponseController(s.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	s.begin(http.StatusSwitchingProtocols)
	if s.started != nil {
		s.started()
	}
	return &upgraded{conn, s}, buffer, nil
}

// upgraded is the connection of an upgraded request. It counts the bytes.
type upgraded struct {
	net.Conn

	scope *scope
}

func (u *upgraded) Read(p []byte) (int, error) {
	n, err := u.Conn.Read(p)
	u.scope.sent.Add(int64(n))
	u.scope.metrics.received.Add(float64(n))
	return n, err
}

// Write fails once the request's context has ended: when a connection is cut, the API server sends a regular end, which
// kubectl exec would take for success.
func (u *upgraded) Write(p []byte) (int, error) {
	if err := u.scope.ended(); err != nil {
		return 0, err
	}
	return u.scope.send(u.Conn, p)
}

// CloseWrite lets ReverseProxy end one direction of the connection.
func (u *upgraded) CloseWrite() error {
	return u.Conn.(interface{ CloseWrite() error }).CloseWrite() // of TCP or TLS
}
