package server

import (
	"bufio"
	"net"
	"net/http"
	"time"
)

// unreadBodyTimeout is how long the rest of an unread body may take: a caller who still sends it then sees the answer,
// and not a connection that is reset.
const unreadBodyTimeout = 2 * time.Second

// recorder is a ResponseWriter that marks the answer as the agent's and records its status and size in the scope.
type recorder struct {
	http.ResponseWriter

	scope   *scope
	metrics *metrics
	ended   func() error // an error once the request's context has ended
}

func (r *recorder) WriteHeader(code int) {
	if code >= 200 {
		r.begin(code)
		if !r.scope.authenticated && r.scope.agentID != "" { // else one could pipeline requests, and read no answer
			r.Header().Set("Connection", "close")
		}
		if !r.scope.body.Ended() && (code >= 400 || !r.scope.streams) {
			r.abandonBody()
		}
	}
	r.ResponseWriter.WriteHeader(code)
}

// begin records the status and sets our headers, in place of any that the API server may have sent. It does so last,
// because ReverseProxy clears all headers when a 1xx passes.
func (r *recorder) begin(code int) {
	r.scope.code = code
	r.Header().Set("X-Request-Id", r.scope.requestID)
	if r.scope.agentID != "" {
		// It tells a gateway that the agent has answered, and not frps for an agent that is not connected.
		r.Header().Set("Pipeops-Agent", r.scope.agentID)
	}
}

// abandonBody limits the time for the rest of a body that nobody will read. Else net/http, or ReverseProxy, would wait
// for it before the answer is sent, and a caller could hold the connection for ever.
func (r *recorder) abandonBody() {
	r.Header().Set("Connection", "close")
	_ = http.NewResponseController(r.ResponseWriter).SetReadDeadline(time.Now().Add(unreadBodyTimeout))
}

func (r *recorder) Write(data []byte) (int, error) {
	if r.scope.code == 0 {
		r.WriteHeader(http.StatusOK)
	}
	r.scope.blocked.Store(time.Now().UnixNano())
	n, err := r.ResponseWriter.Write(data)
	r.scope.blocked.Store(0)
	r.scope.bytes += int64(n)
	r.metrics.sent.Add(float64(n))
	return n, err
}

// FlushError is what http.ResponseController calls.
func (r *recorder) FlushError() error {
	r.scope.blocked.Store(time.Now().UnixNano())
	defer r.scope.blocked.Store(0)
	return http.NewResponseController(r.ResponseWriter).Flush()
}

// Hijack takes over the connection for an upgrade.
func (r *recorder) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, buffer, err := http.NewResponseController(r.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	r.begin(http.StatusSwitchingProtocols)
	return &countedConn{Conn: conn, recorder: r}, buffer, nil
}

// Unwrap lets http.ResponseController reach what this type does not wrap.
func (r *recorder) Unwrap() http.ResponseWriter { return r.ResponseWriter }

// countedConn counts the bytes of an upgraded connection.
type countedConn struct {
	net.Conn

	recorder *recorder
}

func (c *countedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.recorder.metrics.received.Add(float64(n))
	return n, err
}

// Write fails once the request's context has ended: when a connection is cut, the API server sends a regular end, which
// kubectl exec would take for success.
func (c *countedConn) Write(p []byte) (int, error) {
	if err := c.recorder.ended(); err != nil {
		return 0, err
	}
	c.recorder.scope.blocked.Store(time.Now().UnixNano())
	n, err := c.Conn.Write(p)
	c.recorder.scope.blocked.Store(0)
	c.recorder.metrics.sent.Add(float64(n))
	return n, err
}

// CloseWrite lets ReverseProxy end one direction of the connection.
func (c *countedConn) CloseWrite() error {
	return c.Conn.(interface{ CloseWrite() error }).CloseWrite() // of TCP or TLS
}
