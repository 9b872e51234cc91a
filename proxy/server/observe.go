package server

import (
	"bufio"
	"cmp"
	"crypto/rand"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/pipeops/vm-agent/proxy/inbound"
	"github.com/pipeops/vm-agent/proxy/kube"
)

// observe gives every request an id, marks every answer as this agent's, counts it and logs it. The log
// holds no query, header or body, and below the Kubernetes API no path: names may be secrets there.
func (s *Server) observe(l listener, next http.Handler) http.Handler {
	level := slog.LevelInfo
	if l == operations {
		level = slog.LevelDebug // probes and scrapes
	}
	observed := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rec := &recorder{
			ResponseWriter: w, metrics: s.metrics, start: time.Now(), requestID: rand.Text(),
			conn: inbound.From(r.Context()), cut: r.Context().Err, caller: caller(r),
		}
		rec.conn.HeadersRead()
		r.Header.Set("X-Request-Id", rec.requestID)
		if l == tunnel {
			rec.agentID = s.agent.ID
		}
		if r.Body != http.NoBody {
			rec.body = kube.NewBody(w, r.Body, s.metrics.received.Add)
			// In a copy: net/http looks at its own request's body to see whether the caller still sends, and then
			// closes the connection gently, so that the answer is not lost.
			r = r.WithContext(r.Context())
			r.Body = rec.body
		}
		defer s.answered(rec, r, level)
		next.ServeHTTP(rec, r)
	})
	return promhttp.InstrumentHandlerInFlight(s.metrics.inFlight.WithLabelValues(string(l)), observed)
}

// answered counts and logs a request. It is deferred, and goes on with a panic.
func (s *Server) answered(rec *recorder, r *http.Request, level slog.Level) {
	rec.conn.Answered()
	code := rec.status()
	// ReverseProxy drops a connection by a panic of its own; any other is a mistake of ours.
	if p := recover(); p != nil {
		if p != http.ErrAbortHandler { //nolint:errorlint // a panic's value, compared as net/http does
			code = http.StatusInternalServerError
		}
		defer panic(p)
	}
	route, method := routeLabel(r), methodLabel(r.Method)
	s.metrics.requests.WithLabelValues(route, method, codeLabel(code)).Inc()
	d := &rec.description
	if d.Verb != "" {
		s.metrics.kubeInFlight.WithLabelValues(lane(d)).Dec()
		s.metrics.kube.WithLabelValues(d.Verb, codeLabel(code), lane(d)).Inc()
	}
	if !rec.authenticated {
		level = slog.LevelDebug // it is counted; else anybody could fill the log
	}
	if !s.log.Enabled(r.Context(), level) {
		return
	}
	attrs := []slog.Attr{
		slog.String("request_id", rec.requestID), slog.String("method", method), slog.String("route", route),
		slog.Int("status", code), slog.Int64("bytes", rec.bytes),
		slog.Int64("duration_us", time.Since(rec.start).Microseconds()), slog.String("caller", rec.caller),
	}
	from := ""
	if rec.conn.Proxied() {
		from = forwardedFor(r)
	}
	for _, attr := range []slog.Attr{
		slog.String("forwarded_for", from), slog.String("verb", d.Verb), slog.String("group", d.Group),
		slog.String("resource", d.Resource), slog.String("subresource", d.Subresource),
	} {
		if attr.Value.String() != "" {
			attrs = append(attrs, attr)
		}
	}
	s.log.LogAttrs(r.Context(), level, "request", attrs...)
}

// lane tells apart what takes a moment, what stays, and what is a connection of its own.
func lane(d *kube.Description) string {
	return cmp.Or(map[string]string{"watch": "watch", "connect": "upgrade"}[d.Verb], "call")
}

// caller returns the address of who asked: for tunnels of type https and tcp frpc says it in a PROXY header. For
// type http frps appends the address that it has seen to the caller's own X-Forwarded-For, so the last is true.
func caller(r *http.Request) string {
	if !inbound.From(r.Context()).Proxied() {
		if from := forwardedFor(r); from != "" {
			return from
		}
	}
	host, _, _ := net.SplitHostPort(r.RemoteAddr)
	return host
}

// forwardedFor returns the last address of X-Forwarded-For, empty if there is none.
func forwardedFor(r *http.Request) string {
	elements := kube.ListOf(r, "X-Forwarded-For")
	addr, err := netip.ParseAddr(elements[len(elements)-1])
	if err != nil {
		return ""
	}
	return addr.WithZone("").String()
}

// callerLeft is the code for a caller who left before there was an answer, as nginx has it.
const callerLeft = 499

// codeLabel keeps codes that a backend makes up out of labels.
func codeLabel(code int) string {
	if http.StatusText(code) == "" && code != callerLeft {
		return "other"
	}
	return strconv.Itoa(code)
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
	if slices.Contains(kube.Methods, method) {
		return method
	}
	return "other"
}

// unreadBody is how long the rest of a body that nobody wants may take: callers who still send then see the
// answer, and not a connection that is reset.
const unreadBody = 2 * time.Second

// recorder remembers the status and counts the bytes of an answer.
type recorder struct {
	http.ResponseWriter

	metrics       *metrics
	conn          *inbound.Conn // nil in tests without a listener
	start         time.Time
	cut           func() error // an error once the request's context has ended
	requestID     string
	caller        string
	agentID       string     // empty on the operations listener
	body          *kube.Body // nil: the request has none
	streams       bool       // an answer may begin before the request has ended
	authenticated bool
	code          int
	bytes         int64
	memory        int64            // bytes, reserved at the gate
	description   kube.Description // empty but for requests for the Kubernetes API

	blocked atomic.Int64 // since when a write has not returned, in Unix nanoseconds; 0: none is under way
	ended   bool         // for not reading; guarded by the gate's mu
}

// status returns the code of the answer, or callerLeft.
func (r *recorder) status() int { return cmp.Or(r.code, callerLeft) }

// isStream reports whether the answer is one that a caller may read at leisure.
func (r *recorder) isStream() bool {
	return lane(&r.description) != "call" || r.description.Subresource == "log"
}

// stalled returns since when the caller reads nothing of the answer, or sends nothing of the body, in Unix
// nanoseconds; 0 if neither is so.
func (r *recorder) stalled() int64 {
	return cmp.Or(r.blocked.Load(), r.body.Blocked())
}

// abort ends a stalled request: with an answer, if there is none yet and the caller may read it. It returns false if
// that was tried before, and was in vain.
func (r *recorder) abort() (first bool) {
	if first = !r.ended; first && r.blocked.Load() == 0 {
		r.body.Within(0)
	} else {
		r.conn.Abort()
	}
	r.ended = true
	return first
}

func (r *recorder) WriteHeader(code int) {
	if code >= 200 {
		r.code = code
		r.mark()
		if !r.authenticated && r.agentID != "" { // else one could pipeline requests, and read no answer
			r.Header().Set("Connection", "close")
		}
		if !r.body.Ended() && (code >= 400 || !r.streams) {
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
	r.blocked.Store(time.Now().UnixNano())
	n, err := r.ResponseWriter.Write(data)
	r.blocked.Store(0)
	r.bytes += int64(n)
	r.metrics.sent.Add(float64(n))
	return n, err
}

// FlushError is what http.ResponseController calls.
func (r *recorder) FlushError() error {
	r.blocked.Store(time.Now().UnixNano())
	defer r.blocked.Store(0)
	return http.NewResponseController(r.ResponseWriter).Flush()
}

// Hijack is how an upgrade is answered.
func (r *recorder) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, buffer, err := http.NewResponseController(r.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	r.code = http.StatusSwitchingProtocols
	r.mark()
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

func (c *countedConn) Write(p []byte) (int, error) {
	// The API server says goodbye to a connection that is cut, which kubectl exec would take for success.
	if err := c.recorder.cut(); err != nil {
		return 0, err
	}
	c.recorder.blocked.Store(time.Now().UnixNano())
	n, err := c.Conn.Write(p)
	c.recorder.blocked.Store(0)
	c.recorder.metrics.sent.Add(float64(n))
	return n, err
}

// CloseWrite lets ReverseProxy end one direction of the connection and leave the other.
func (c *countedConn) CloseWrite() error {
	return c.Conn.(interface{ CloseWrite() error }).CloseWrite() // of TCP or TLS
}
