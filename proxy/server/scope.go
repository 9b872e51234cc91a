package server

import (
	"bufio"
	"cmp"
	"crypto/rand"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/pipeops/vm-agent/proxy/inbound"
	"github.com/pipeops/vm-agent/proxy/kube"
)

// scope is one request: what the server knows of it, and the ResponseWriter of its handler, which marks the answer as
// the agent's and records its status and size.
type scope struct {
	http.ResponseWriter

	metrics   *metrics
	ended     func() error // an error once the request's context has ended
	requestID string
	agentID   string // empty on the operations listener
	caller    string // address
	start     time.Time
	conn      *inbound.Conn // nil in tests without a listener
	body      *kube.Body    // nil: the request has none

	authenticated bool
	streams       bool             // the answer may begin before the request has ended
	description   kube.Description // of a request for the Kubernetes API, else empty
	memory        int64            // bytes that the gate has reserved; guarded by the gate's mu
	aborted       bool             // for being stalled; guarded by the gate's mu

	code    int          // of the answer; 0: none yet
	bytes   int64        // of the answer's body
	blocked atomic.Int64 // since when a write has been waiting, in Unix nanoseconds; 0: none is
}

// scopeOf returns the scope of the request that w answers. It panics for one that observe has not seen.
func scopeOf(w http.ResponseWriter) *scope { return w.(*scope) }

// observe gives every request a scope with an id, and counts and logs its answer.
func (s *Server) observe(l listener, next http.Handler) http.Handler {
	inFlight := s.metrics.inFlight.WithLabelValues(string(l))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		inFlight.Inc()
		defer inFlight.Dec()
		sc := &scope{
			ResponseWriter: w, metrics: s.metrics, ended: r.Context().Err,
			requestID: rand.Text(), caller: caller(r), start: time.Now(), conn: inbound.From(r.Context()),
		}
		sc.conn.HeadersRead()
		if l == tunnel {
			sc.agentID = s.agent.ID
			s.tunnelRequests.Add(1)
			defer s.tunnelRequests.Add(-1)
		}
		// A copy: net/http looks at its own request's body to see whether the caller still sends, and then closes the
		// connection gently, so that the answer is not lost.
		r = r.WithContext(r.Context())
		r.Header.Set("X-Request-Id", sc.requestID)
		if r.Body != http.NoBody {
			sc.body = kube.NewBody(w, r.Body, s.metrics.received.Add)
			r.Body = sc.body
		}
		defer s.answered(sc, r, l)
		next.ServeHTTP(sc, r)
	})
}

// answered counts and logs a request, without its query, headers and body, and without its path below the Kubernetes
// API: objects' names may be secret. It must be deferred: it records a panic of the handler, and panics again.
func (s *Server) answered(sc *scope, r *http.Request, l listener) {
	sc.conn.Answered()
	code := sc.status()
	if p := recover(); p != nil {
		if p != http.ErrAbortHandler { //nolint:errorlint // a panic's value, compared as net/http does
			code = http.StatusInternalServerError // a bug; ReverseProxy drops connections by ErrAbortHandler
		}
		defer panic(p)
	}
	route, method := routeLabel(r), orOther(r.Method, slices.Contains(kube.Methods, r.Method))
	codeLabel := orOther(strconv.Itoa(code), http.StatusText(code) != "" || code == callerLeft)
	s.metrics.requests.WithLabelValues(route, method, codeLabel).Inc()
	if verb := sc.description.Verb; verb != "" {
		s.metrics.kubeInFlight.WithLabelValues(sc.lane()).Dec()
		s.metrics.kube.WithLabelValues(verb, codeLabel, sc.lane()).Inc()
	}

	level := slog.LevelInfo
	if l == operations || !sc.authenticated { // probes and scrapes; and callers who could fill the log
		level = slog.LevelDebug
	}
	if !s.log.Enabled(r.Context(), level) {
		return
	}
	from := ""
	if sc.conn.Proxied() {
		from = forwardedFor(r)
	}
	d := &sc.description
	attrs := []slog.Attr{
		slog.String("request_id", sc.requestID), slog.String("method", method),
		slog.String("route", route), slog.Int("status", code), slog.Int64("bytes", sc.bytes),
		slog.Int64("duration_us", time.Since(sc.start).Microseconds()), slog.String("caller", sc.caller),
		slog.String("forwarded_for", from), slog.String("verb", d.Verb), slog.String("group", d.Group),
		slog.String("resource", d.Resource), slog.String("subresource", d.Subresource),
	}
	attrs = slices.DeleteFunc(attrs, func(attr slog.Attr) bool { return attr.Value.String() == "" })
	s.log.LogAttrs(r.Context(), level, "request", attrs...)
}

// orOther returns a known value of a label, else "other": callers and backends may send any.
func orOther(value string, known bool) string {
	if known {
		return value
	}
	return "other"
}

// routeLabel returns the path of the request's route, "none" if it has none; never the caller's path.
func routeLabel(r *http.Request) string {
	if _, path, _ := strings.Cut(r.Pattern, "/"); path != "" {
		return "/" + path
	}
	return "none"
}

// caller returns the address of the request's sender: that of frpc's PROXY header, which tunnels of type https and tcp
// have, or the last of X-Forwarded-For, which can be trusted because frps appends it.
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

// callerLeft is the status of a caller who left before there was an answer, as nginx has it.
const callerLeft = 499

// status returns the status of the answer, or callerLeft.
func (s *scope) status() int { return cmp.Or(s.code, callerLeft) }

// lane returns call, watch or upgrade for a request for the Kubernetes API.
func (s *scope) lane() string {
	return cmp.Or(map[string]string{"watch": "watch", "connect": "upgrade"}[s.description.Verb], "call")
}

// isStream reports whether the caller may take any time to read the answer.
func (s *scope) isStream() bool { return s.lane() != "call" || s.description.Subresource == "log" }

// stalledSince returns since when the caller has read nothing of the answer, or sent nothing of the body, in Unix
// nanoseconds; 0 if neither is so.
func (s *scope) stalledSince() int64 { return cmp.Or(s.blocked.Load(), s.body.Blocked()) }

// abort ends a stalled request: with an answer if there is none yet and the caller may read it, and by closing the
// connection if that was tried before. It returns false then.
func (s *scope) abort() (first bool) {
	if first = !s.aborted; first && s.blocked.Load() == 0 {
		s.body.Within(0)
	} else {
		s.conn.Abort()
	}
	s.aborted = true
	return first
}

// WriteHeader also limits the time for the rest of a body that nobody will read: net/http, or ReverseProxy, would wait
// for it before the answer is sent, for ever. A caller who still sends it then sees the answer, not a reset connection.
func (s *scope) WriteHeader(code int) {
	if code >= 200 {
		s.begin(code)
		if !s.authenticated && s.agentID != "" { // else one could pipeline requests, and read no answer
			s.Header().Set("Connection", "close")
		}
		if !s.body.Ended() && (code >= 400 || !s.streams) {
			s.Header().Set("Connection", "close")
			s.body.Within(2 * time.Second)
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
	n, err := s.send(s.ResponseWriter, data)
	s.bytes += int64(n)
	return n, err
}

// send writes data to the caller, counts it, and records that it waits.
func (s *scope) send(to io.Writer, data []byte) (int, error) {
	s.blocked.Store(time.Now().UnixNano())
	n, err := to.Write(data)
	s.blocked.Store(0)
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
	return &upgraded{conn, s}, buffer, nil
}

// upgraded is the connection of an upgraded request. It counts the bytes.
type upgraded struct {
	net.Conn

	scope *scope
}

func (u *upgraded) Read(p []byte) (int, error) {
	n, err := u.Conn.Read(p)
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
