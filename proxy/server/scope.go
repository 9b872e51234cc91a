package server

import (
	"cmp"
	"context"
	"crypto/rand"
	"net/http"
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
	answersEarly  bool             // the answer may begin before the request has ended
	description   kube.Description // of a request for the Kubernetes API, else empty
	memory        int64            // bytes that the gate has reserved; guarded by the gate's mu
	aborted       bool             // for being stalled; guarded by the gate's mu

	code    int          // of the answer; 0: none yet
	bytes   int64        // of the answer's body
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
		sc := &scope{
			ResponseWriter: w, metrics: s.metrics, ended: r.Context().Err,
			requestID: rand.Text(), caller: caller(r), start: time.Now(), conn: inbound.From(r.Context()),
		}
		sc.conn.HeadersRead()
		if l == tunnel {
			sc.agentID = s.agent.ID
		}
		// A copy: net/http looks at its own request's body to see whether the caller still sends, and then closes the
		// connection gently, so that the answer is not lost.
		r = r.WithContext(context.WithValue(r.Context(), scopeKey{}, sc))
		r.Header.Set("X-Request-Id", sc.requestID)
		if r.Body != http.NoBody {
			sc.body = kube.NewBody(w, r.Body, s.metrics.received.Add)
			r.Body = sc.body
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
	return cmp.Or(map[string]string{"watch": "watch", "connect": "upgrade"}[s.description.Verb], "call")
}

// isStream reports whether the caller may take any time to read the answer.
func (s *scope) isStream() bool { return s.lane() != "call" || s.description.Subresource == "log" }

// stalledSince returns since when the caller has read nothing of the answer, or sent nothing of the body, in Unix
// nanoseconds; 0 if neither is so.
func (s *scope) stalledSince() int64 { return cmp.Or(s.blocked.Load(), s.body.Blocked()) }

// abort ends a stalled request. A caller who sends nothing gets an answer first; one who does not read, or was aborted
// before, loses the connection. It reports whether this is the first abort.
func (s *scope) abort() (first bool) {
	if first = !s.aborted; first && s.blocked.Load() == 0 {
		s.body.Within(0)
	} else {
		s.conn.Abort()
	}
	s.aborted = true
	return first
}
