package server

import (
	"bufio"
	"cmp"
	"context"
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

	"github.com/prometheus/client_golang/prometheus"

	"github.com/pipeops/vm-agent/proxy/access"
	"github.com/pipeops/vm-agent/proxy/inbound"
	"github.com/pipeops/vm-agent/proxy/kube"
)

// scope is one request: what the server knows of it, and the ResponseWriter of its handler, which marks the answer as
// the agent's and records its status and size.
type scope struct {
	http.ResponseWriter

	metrics   *metrics
	ended     func() error // an error once the request's context has ended
	cancel    context.CancelCauseFunc
	requestID string
	agentID   string // empty on the operations listener
	caller    string // address
	start     time.Time
	conn      *inbound.Conn
	http2     bool  // the connection serves other requests too
	renew     bool  // the connection must not be used for further requests
	headers   int64 // bytes of memory that the request's headers use

	authenticated bool
	admitted      bool             // by the gate
	answersEarly  bool             // the answer may begin before the request has ended
	kube.Request                   // for the Kubernetes API, else empty
	inFlight      prometheus.Gauge // counts it; nil for other requests
	who           access.Caller
	right         *right       // of a stream, else nil
	needs         access.Level // what the cluster's owner must allow
	share         string       // with which callers it shares the limits
	started       func()       // logs that an upgraded connection begins; nil for other requests
	outcome       string       // of a request for the Kubernetes API: forwarded, or why not
	memory        int64        // bytes that the gate has reserved; guarded by the gate's mu
	revoked       bool         // its right has ended; guarded by the gate's mu
	aborted       bool         // for being stalled; guarded by the gate's mu
	reset         time.Time    // when its stream of HTTP/2 was; guarded by the gate's mu

	code    int          // of the answer; 0: none yet
	bytes   atomic.Int64 // of the answer's body, or of an upgraded connection to the caller
	sent    atomic.Int64 // by the caller over an upgraded connection
	blocked atomic.Int64 // since when a write has been waiting, in Unix nanoseconds; 0: none is
}

type scopeKey struct{}

// scopeOf returns the scope that observe has put into the request's context. It panics if there is none.
func scopeOf(r *http.Request) *scope { return r.Context().Value(scopeKey{}).(*scope) }

// observe gives every request a scope with an id, and counts and logs its answer.
func (s *Server) observe(l listener, next http.Handler) http.Handler {
	inFlight := s.metrics.inFlight[l]
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		inFlight.Add(1)
		defer inFlight.Add(-1)
		ctx, cancel := context.WithCancelCause(r.Context())
		defer cancel(nil)
		sc := &scope{
			ResponseWriter: w, metrics: s.metrics, ended: ctx.Err, cancel: cancel, outcome: "forwarded",
			requestID: rand.Text(), caller: caller(r), start: time.Now(), conn: inbound.From(r.Context()),
		}
		sc.share, sc.headers = sc.caller, kube.HeaderMemory(r.Header)+8*int64(len(r.RequestURI))
		if sc.http2 = r.ProtoMajor == 2; sc.http2 {
			r.TLS = sc.conn.State
		}
		sc.renew = s.gate.draining.Load() || sc.http2 && time.Since(sc.conn.Begun) > s.limits.connectionAge
		if !sc.conn.HeadersRead(sc.headers) {
			panic(http.ErrAbortHandler)
		}
		if l == tunnel {
			sc.agentID = s.agent.ID
		}
		// A copy: net/http looks at its own request's body to see whether the caller still sends, and then closes the
		// connection gently, so that the answer is not lost.
		r = r.WithContext(context.WithValue(ctx, scopeKey{}, sc))
		r.Header.Set("X-Request-Id", sc.requestID)
		// Over HTTP/2 net/http has a body for every request, and would wait for ever to send trailers without one.
		if r.Trailer = nil; r.ContentLength == 0 {
			r.Body = http.NoBody
		}
		if r.Body != http.NoBody {
			sc.Body = kube.NewBody(w, r.Body, s.metrics.received.Add)
			r.Body = sc.Body
		}
		defer s.answered(sc, r, l)
		next.ServeHTTP(sc, r)
	})
}

// callerLeft is the status of a caller who left before there was an answer, as nginx has it.
const callerLeft = 499

// status returns the status of the answer, or callerLeft.
func (s *scope) status() int { return cmp.Or(s.code, callerLeft) }

// lane returns call, watch or upgrade for a request for the Kubernetes API.
func (s *scope) lane() string {
	switch {
	case s.Upgrade:
		return "upgrade"
	case s.Verb == "watch":
		return "watch"
	}
	return "call"
}

// isStream reports whether the caller may take any time to read the answer.
func (s *scope) isStream() bool { return s.lane() != "call" || s.Subresource == "log" }

// stalledSince returns since when the caller has read nothing of the answer, or sent nothing of the body, in Unix
// nanoseconds; 0 if neither is so.
func (s *scope) stalledSince() int64 { return cmp.Or(s.blocked.Load(), s.Body.Blocked()) }

// abort ends a stalled request, whose handler still runs. A caller who sends nothing gets an answer first. One who does
// not read, or was aborted before, loses the connection; over HTTP/2 the stream, and the connection only if that takes
// not even a reset. It reports whether this is the first abort.
func (s *scope) abort() (first bool) {
	switch first = !s.aborted; {
	case first && s.blocked.Load() == 0:
		s.Body.Within(0)
	case s.http2 && s.reset.IsZero():
		s.reset = time.Now()
		_ = http.NewResponseController(s.ResponseWriter).SetWriteDeadline(time.Unix(1, 0))
	case time.Since(s.reset) > stallGrace: // over HTTP/1.1 always
		s.conn.Abort()
	}
	s.aborted = true
	return first
}

// caller returns the address of the request's sender: that of frpc's PROXY header, which tunnels of type https and tcp
// have, or the last of X-Forwarded-For, which can be trusted because frps appends it.
func caller(r *http.Request) string {
	if from := forwardedFor(r); from != "" && !inbound.From(r.Context()).Proxied {
		return from
	}
	host, _, _ := net.SplitHostPort(r.RemoteAddr)
	return host
}

// forwardedFor returns the last address of X-Forwarded-For, empty if there is none.
func forwardedFor(r *http.Request) string {
	list := strings.Join(r.Header.Values("X-Forwarded-For"), ",")
	addr, err := netip.ParseAddr(strings.TrimSpace(list[strings.LastIndexByte(list, ',')+1:]))
	if err != nil {
		return ""
	}
	return addr.WithZone("").String()
}

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
			s.Header().Set("Connection", "close") // over HTTP/2, net/http sends GOAWAY: what runs goes on
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

// answered counts and logs a request, without its query, headers and body. It must be deferred: it records a panic of
// the handler, and panics again.
func (s *Server) answered(sc *scope, r *http.Request, l listener) {
	sc.Body.Release()
	sc.conn.Answered(sc.headers, sc.admitted)
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
	if sc.inFlight != nil {
		sc.inFlight.Dec()
		origin := "agent"
		if sc.Answered {
			origin = "api_server"
		}
		s.metrics.kube.WithLabelValues(sc.verb(), codeLabel, sc.lane(), origin).Inc()
	}
	if isKubernetes(r) {
		s.metrics.access.WithLabelValues(s.config.Access.Identity, sc.outcome).Inc()
	} else {
		sc.outcome = ""
	}

	level := slog.LevelInfo
	// Probes and scrapes, and callers who could fill the log.
	if l == operations || !sc.authenticated && sc.outcome != "identity" {
		level = slog.LevelDebug
	}
	more := append(make([]slog.Attr, 0, 5), slog.Int("status", code), slog.Int64("bytes", sc.bytes.Load()),
		slog.Int64("duration_us", time.Since(sc.start).Microseconds()))
	if sc.outcome != "" {
		more = append(more, slog.String("outcome", sc.outcome))
	}
	if sc.Upgrade {
		more = append(more, slog.Int64("received_bytes", sc.sent.Load()))
	}
	s.logRequest(sc, r, level, "request", more...)
}

// logRequest logs who asks for what, and more.
func (s *Server) logRequest(sc *scope, r *http.Request, level slog.Level, message string, more ...slog.Attr) {
	if !s.log.Enabled(r.Context(), level) {
		return
	}
	from, user, certificate := "", sc.who.User, ""
	if sc.conn.Proxied {
		from = forwardedFor(r)
	}
	if sc.Identity.Get("Authorization") != "" && !sc.Accepted() {
		user = "" // it is the token's own account, which nobody has verified
	}
	if r.TLS != nil && len(r.TLS.PeerCertificates) > 0 {
		certificate = r.TLS.PeerCertificates[0].Subject.CommonName
	}
	attrs := make([]slog.Attr, 0, 20)
	for _, attr := range [...]struct{ key, value string }{
		{"request_id", sc.requestID}, {"method", orOther(r.Method, slices.Contains(kube.Methods, r.Method))},
		{"route", routeLabel(r)}, {"caller", sc.caller}, {"forwarded_for", from}, {"client_certificate", certificate},
		{"user", user}, {"groups", strings.Join(sc.who.Groups, ",")}, {"as", sc.who.As}, {"verb", sc.verb()},
		{"group", sc.Group}, {"resource", sc.Resource}, {"subresource", sc.Subresource}, {"namespace", sc.Namespace},
		{"name", sc.Name},
	} {
		if attr.value != "" {
			attrs = append(attrs, slog.String(attr.key, attr.value))
		}
	}
	s.log.LogAttrs(r.Context(), level, message, append(attrs, more...)...) //nolint:sloglint // a constant of the caller
}

// verb returns the verb as metrics and the log have it.
func (s *scope) verb() string {
	if s.Upgrade {
		return "connect"
	}
	return s.Verb
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
