package main

import (
	"bufio"
	"crypto/rand"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/pipeops/vm-agent/proxy/kube"
)

// observe gives every request an id, marks every answer as this agent's, counts it and logs it. The log
// holds no query, header or body, and below the Kubernetes API no path: names may be secrets there.
func (s *server) observe(l listener, next http.Handler) http.Handler {
	level := slog.LevelInfo
	if l == operations {
		level = slog.LevelDebug // probes and scrapes
	}
	inFlight := s.metrics.inFlight.WithLabelValues(l.String())
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rec, r := s.record(w, r, l)
		inFlight.Inc()
		defer s.answered(rec, r, level, inFlight)
		next.ServeHTTP(rec, r)
	})
}

// record gives the request its id and returns what remembers how it is answered.
func (s *server) record(w http.ResponseWriter, r *http.Request, l listener) (*recorder, *http.Request) {
	rec := &recorder{ResponseWriter: w, metrics: s.metrics, start: time.Now(), requestID: rand.Text()}
	r.Header.Set("X-Request-Id", rec.requestID)
	if l == tunnel {
		rec.agentID = s.agent.ID
	}
	if r.Body != http.NoBody {
		rec.body = &counted{ReadCloser: r.Body, bytes: s.metrics.received, control: http.NewResponseController(w)}
		// In a copy: net/http looks at its own request's body to see whether the caller still sends, and then
		// closes the connection gently, so that the answer is not lost.
		r = r.WithContext(r.Context())
		r.Body = rec.body
	}
	return rec, r
}

// answered counts and logs a request. It is deferred, and goes on with a panic.
func (s *server) answered(rec *recorder, r *http.Request, level slog.Level, inFlight prometheus.Gauge) {
	inFlight.Dec()
	code := rec.status()
	// ReverseProxy drops a connection by a panic of its own; any other is a mistake of ours.
	if p := recover(); p != nil {
		if p != http.ErrAbortHandler { //nolint:errorlint // a panic's value, compared as net/http does
			code = http.StatusInternalServerError
		}
		defer panic(p)
	}
	route, method := routeLabel(r), methodLabel(r.Method)
	s.metrics.requests.WithLabelValues(route, method, strconv.Itoa(code)).Inc()
	if d := &rec.description; d.Verb != "" {
		rec.inLane.Dec()
		s.metrics.kube.WithLabelValues(d.Verb, strconv.Itoa(code), lane(d)).Inc()
	}
	if rec.refused || route == "/ready" {
		level = slog.LevelDebug // the authenticator has said it once; frpc asks every second
	}
	if !s.log.Enabled(r.Context(), level) {
		return
	}
	attrs := make([]slog.Attr, 0, 12)
	attrs = append(attrs, slog.String("request_id", rec.requestID), slog.String("method", method),
		slog.String("route", route), slog.Int("status", code), slog.Int64("bytes", rec.bytes),
		slog.Int64("duration_us", time.Since(rec.start).Microseconds()), slog.String("caller", caller(r)))
	if d := &rec.description; d.Verb != "" {
		attrs = append(attrs, slog.String("verb", d.Verb))
		for _, attr := range []slog.Attr{slog.String("group", d.Group), slog.String("resource", d.Resource), slog.String("subresource", d.Subresource)} {
			if attr.Value.String() != "" {
				attrs = append(attrs, attr)
			}
		}
	}
	s.log.LogAttrs(r.Context(), level, "request", attrs...)
}

// describe adds what a request for the Kubernetes API asks for.
func (r *recorder) describe(request *http.Request) {
	r.description, r.streams = kube.Describe(request), true
	r.inLane = r.metrics.kubeInFlight.WithLabelValues(lane(&r.description))
	r.inLane.Inc()
}

// lane tells apart what takes a moment, what stays, and what is a connection of its own.
func lane(d *kube.Description) string {
	switch d.Verb {
	case "watch":
		return "watch"
	case "connect":
		return "upgrade"
	}
	return "call"
}

// caller is the address of who asked, as far as it is known: in a tunnel of type http, frps appends the
// address that it has seen to the caller's own X-Forwarded-For, so the last is true. In a tunnel of type tcp
// nobody does, and it is what the caller says.
func caller(r *http.Request) string {
	if forwarded := r.Header.Values("X-Forwarded-For"); len(forwarded) > 0 {
		list := forwarded[len(forwarded)-1]
		if addr, err := netip.ParseAddr(strings.TrimSpace(list[strings.LastIndexByte(list, ',')+1:])); err == nil {
			return addr.WithZone("").String()
		}
	}
	host, _, _ := net.SplitHostPort(r.RemoteAddr)
	return host
}

// routeLabel is the route's path, never the caller's.
func routeLabel(r *http.Request) string {
	slash := strings.IndexByte(r.Pattern, '/')
	if slash < 0 || r.Pattern == "/" {
		return "none"
	}
	return r.Pattern[slash:]
}

// methodLabel keeps a caller's inventions out of labels.
func methodLabel(method string) string {
	switch method {
	case http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete, http.MethodOptions:
		return method
	}
	return "other"
}

func (l listener) String() string {
	if l == operations {
		return "operations"
	}
	return "tunnel"
}

// unreadBody is how long the rest of a body that nobody wants may take: callers who still send then see the
// answer, and not a connection that is reset.
const unreadBody = 2 * time.Second

// recorder remembers the status and counts the bytes of an answer.
type recorder struct {
	http.ResponseWriter

	metrics     *metrics
	start       time.Time
	requestID   string
	agentID     string   // empty on the operations listener
	body        *counted // nil: the request has none
	streams     bool     // an answer may begin before the request has ended
	refused     bool     // for its credential
	code        int
	bytes       int64
	description kube.Description // empty but for requests for the Kubernetes API
	inLane      prometheus.Gauge // where that one counts as being answered
}

// status is 499 for a caller who left before there was an answer, as nginx has it.
func (r *recorder) status() int {
	if r.code == 0 {
		return 499
	}
	return r.code
}

func (r *recorder) WriteHeader(code int) {
	if code >= 200 {
		r.code = code
		r.mark()
		if r.body != nil && r.body.end.Load() == nil && (code >= 400 || !r.streams) {
			// Nobody will read the rest of the body. Else net/http, or ReverseProxy, would wait for it before the
			// answer is sent, and a caller could hold the connection for ever.
			r.Header().Set("Connection", "close")
			_ = http.NewResponseController(r.ResponseWriter).SetReadDeadline(time.Now().Add(unreadBody))
		}
	}
	r.ResponseWriter.WriteHeader(code)
}

// mark sets our headers, in place of any that the API server may have sent. It does so last, because
// ReverseProxy clears all headers when a 1xx passes.
func (r *recorder) mark() {
	r.Header().Set("X-Request-Id", r.requestID)
	if r.agentID != "" {
		// A gateway knows by it that the agent has answered, and not frps for an agent that is away.
		r.Header().Set("Pipeops-Agent", r.agentID)
	}
}

func (r *recorder) Write(data []byte) (int, error) {
	if r.code == 0 {
		r.WriteHeader(http.StatusOK)
	}
	n, err := r.ResponseWriter.Write(data)
	r.bytes += int64(n)
	r.metrics.sent.Add(float64(n))
	return n, err
}

// Hijack is how an upgrade is answered.
func (r *recorder) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, buffer, err := http.NewResponseController(r.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	r.code = http.StatusSwitchingProtocols
	r.mark()
	return &countedConn{Conn: conn, metrics: r.metrics}, buffer, nil
}

// Unwrap lets http.ResponseController reach what this type does not wrap.
func (r *recorder) Unwrap() http.ResponseWriter { return r.ResponseWriter }

// counted counts the bytes of a request's body.
type counted struct {
	io.ReadCloser

	bytes   prometheus.Counter
	control *http.ResponseController
	end     atomic.Pointer[error] // what reading it has ended with: io.EOF if all has come
}

// within gives the caller so long to send all of it. Else there is no limit: it may be a stream.
func (c *counted) within(limit time.Duration) {
	if c != nil {
		_ = c.control.SetReadDeadline(time.Now().Add(limit))
	}
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.ReadCloser.Read(p)
	c.bytes.Add(float64(n))
	if err != nil {
		c.end.Store(&err)
	}
	if errors.Is(err, io.EOF) {
		// From here net/http reads, and would take the end of the limit for the caller's leaving.
		_ = c.control.SetReadDeadline(time.Time{})
	}
	return n, err
}

// failure is why the body could not be read to its end.
func (c *counted) failure() error {
	if c == nil || c.end.Load() == nil || errors.Is(*c.end.Load(), io.EOF) {
		return nil
	}
	return *c.end.Load()
}

// countedConn counts the bytes of an upgraded connection.
type countedConn struct {
	net.Conn

	metrics *metrics
}

func (c *countedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.metrics.received.Add(float64(n))
	return n, err
}

func (c *countedConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.metrics.sent.Add(float64(n))
	return n, err
}

// CloseWrite lets ReverseProxy end one direction of the connection and leave the other.
func (c *countedConn) CloseWrite() error {
	if conn, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return conn.CloseWrite()
	}
	return c.Close()
}
