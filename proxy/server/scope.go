package server

import (
	"cmp"
	"context"
	"crypto/rand"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/pipeops/vm-agent/proxy/inbound"
	"github.com/pipeops/vm-agent/proxy/kube"
)

// scope is what the server knows of one request. observe puts it into the request's context.
type scope struct {
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

type scopeKey struct{}

// scopeOf returns a request's scope. It panics for a request that observe has not seen.
func scopeOf(r *http.Request) *scope { return r.Context().Value(scopeKey{}).(*scope) }

// observe gives every request a scope with an id, marks every answer as this agent's, counts it and logs it.
func (s *Server) observe(l listener, next http.Handler) http.Handler {
	observed := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		sc := &scope{requestID: rand.Text(), caller: caller(r), start: time.Now(), conn: inbound.From(r.Context())}
		sc.conn.HeadersRead()
		if l == tunnel {
			sc.agentID = s.agent.ID
			s.tunnelRequests.Add(1)
			defer s.tunnelRequests.Add(-1)
		}
		body := r.Body
		// A copy: net/http looks at its own request's body to see whether the caller still sends, and then closes the
		// connection gently, so that the answer is not lost.
		r = r.WithContext(context.WithValue(r.Context(), scopeKey{}, sc))
		r.Header.Set("X-Request-Id", sc.requestID)
		if body != http.NoBody {
			sc.body = kube.NewBody(w, body, s.metrics.received.Add)
			r.Body = sc.body
		}
		defer s.answered(sc, r, l)
		next.ServeHTTP(&recorder{ResponseWriter: w, scope: sc, metrics: s.metrics, ended: r.Context().Err}, r)
	})
	return promhttp.InstrumentHandlerInFlight(s.metrics.inFlight.WithLabelValues(string(l)), observed)
}

// callerLeft is the status of a caller who left before there was an answer, as nginx has it.
const callerLeft = 499

// status returns the status of the answer, or callerLeft.
func (s *scope) status() int { return cmp.Or(s.code, callerLeft) }

// lane is the label for how a request uses its connection: call, watch, or upgrade, which has a connection of its own.
func (s *scope) lane() string {
	return cmp.Or(map[string]string{"watch": "watch", "connect": "upgrade"}[s.description.Verb], "call")
}

// isStream reports whether the caller may take any time to read the answer.
func (s *scope) isStream() bool { return s.lane() != "call" || s.description.Subresource == "log" }

// stalledSince returns since when the caller neither reads nor sends, in Unix nanoseconds; 0 if it does.
func (s *scope) stalledSince() int64 { return cmp.Or(s.blocked.Load(), s.body.Blocked()) }

// abort ends a stalled request: with an answer if it may still be read, or else, and the second time, by closing the
// connection. It reports whether this was the first time.
func (s *scope) abort() (first bool) {
	if first = !s.aborted; first && s.blocked.Load() == 0 {
		s.body.Within(0)
	} else {
		s.conn.Abort()
	}
	s.aborted = true
	return first
}
