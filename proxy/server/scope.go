package server

import (
	"cmp"
	"context"
	"crypto/rand"
	"net/http"
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
	conn      *inbound.Conn // nil in tests without a listener
	http2     bool          // the connection serves other requests too
	renew     bool          // the connection must not be used for further requests
	headers   int64         // bytes of memory that the request's headers use

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
			r.TLS = sc.conn.TLS()
		}
		sc.renew = sc.http2 && (sc.conn.Age() > s.limits.connectionAge || s.gate.closed.Load())
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
