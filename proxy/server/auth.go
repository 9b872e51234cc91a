package server

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"k8s.io/apimachinery/pkg/util/wait"

	"github.com/pipeops/vm-agent/bootstrap/config"
	"github.com/pipeops/vm-agent/frpc"
	"github.com/pipeops/vm-agent/proxy/kube"
)

const (
	// tokenAge is how often the token's file is read.
	tokenAge = 2 * time.Second
	// Within failureWindow a source may fail maxFailures times before it is told to wait. At most maxSources are
	// told apart.
	failureWindow = time.Minute
	maxFailures   = 20
	maxSources    = 1000
)

// authenticator knows the token that callers must show.
type authenticator struct {
	failures *prometheus.CounterVec
	log      *slog.Logger
	overlap  time.Duration // how long the token before is good for, so that callers can change theirs after the agent

	mu       sync.Mutex
	current  [sha256.Size]byte
	empty    bool // there is no token: nobody is let in
	previous [sha256.Size]byte
	until    time.Time // previous is good until then

	window  time.Time      // when the counting of failures began
	sources map[string]int // failures of each
}

// newAuthenticator takes the token that callers must show.
func newAuthenticator(token frpc.Secret, overlap time.Duration, m *metrics, log *slog.Logger) *authenticator {
	return &authenticator{
		failures: m.authFailures, log: log, overlap: overlap,
		current: sha256.Sum256([]byte(token.Reveal())), empty: token == "",
	}
}

// follow reads the token anew from time to time, until ctx ends: not when somebody asks, or a token that was
// replaced while nobody did would be good until its own next use, and for a while from there. While it cannot be
// read, the token stays as it was; where it is gone, nobody is let in any more.
func (a *authenticator) follow(ctx context.Context, read func() (frpc.Secret, error)) {
	unread := false
	wait.UntilWithContext(ctx, func(context.Context) {
		token, err := read()
		if errors.Is(err, config.ErrNoSecret) {
			token, err = "", nil
		}
		if err != nil && !unread {
			a.log.Warn("the agent's token cannot be read anew: the one before stays", "error", err)
		}
		if unread = err != nil; !unread {
			a.change(token)
		}
	}, tokenAge)
}

func (a *authenticator) change(token frpc.Secret) {
	a.mu.Lock()
	defer a.mu.Unlock()
	hash := sha256.Sum256([]byte(token.Reveal()))
	switch {
	case hash == a.current:
	case token == "":
		a.current, a.empty, a.until = hash, true, time.Time{}
		a.log.Warn("the agent's token is gone from its file: nobody is let in")
	default:
		a.previous, a.until = a.current, time.Now().Add(a.overlap)
		if a.empty { // there was none before
			a.until = time.Time{}
		}
		a.current, a.empty = hash, false
		a.log.Info("the agent's token has changed", "previous_valid_until", a.until.UTC())
	}
}

// refusal is why a request's credential is not accepted.
type refusal struct {
	reason string // a label
	why    string // for the caller
}

// check returns nil for a request with the agent's token. The hashes are compared, in constant time, so that
// neither the token nor its length can be measured.
func (a *authenticator) check(r *http.Request) *refusal {
	values := r.Header["Authorization"]
	if len(values) == 0 {
		return &refusal{"none", "no credential: send \"Authorization: Bearer <agent token>\""}
	}
	if len(values) > 1 {
		return &refusal{"several", "more than one Authorization header: send one"}
	}
	scheme, token, _ := strings.Cut(values[0], " ")
	if !strings.EqualFold(scheme, "Bearer") {
		return &refusal{"scheme", "the credential is not a bearer token: send \"Authorization: Bearer <agent token>\""}
	}
	hash := sha256.Sum256([]byte(strings.TrimLeft(token, " ")))
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.empty {
		return &refusal{"unconfigured", "the agent has no token configured, so it lets nobody in: set agent.token"}
	}
	current := subtle.ConstantTimeCompare(hash[:], a.current[:])
	previous := subtle.ConstantTimeCompare(hash[:], a.previous[:])
	if current == 1 || previous == 1 && time.Now().Before(a.until) {
		return nil
	}
	return &refusal{"token", "the bearer token is not this agent's token: check the token in the kubeconfig or client"}
}

// failed counts a refusal, and logs the first of a source in each window. It returns how long the source should
// wait, 0 if it may try again at once. A right token is never told to wait: many callers share the address of
// their gateway, and one of them must not lock out the others.
func (a *authenticator) failed(r *http.Request, refused *refusal) time.Duration {
	a.failures.WithLabelValues(refused.reason).Inc()
	source := caller(r)
	a.mu.Lock()
	defer a.mu.Unlock()
	if time.Since(a.window) > failureWindow {
		a.window, a.sources = time.Now(), map[string]int{}
	}
	if _, known := a.sources[source]; !known && len(a.sources) >= maxSources {
		source = "others"
	}
	a.sources[source]++
	switch n := a.sources[source]; {
	case n == 1:
		a.log.Warn("a caller is refused; more of the same from there are counted, not logged, for a minute", "caller", source, "reason", refused.why)
	case n > maxFailures:
		return time.Until(a.window.Add(failureWindow))
	}
	return 0
}

// throttled counts a refusal, and answers 429 if there are too many from the same source.
func (s *Server) throttled(w http.ResponseWriter, r *http.Request, refused *refusal) bool {
	wait := s.auth.failed(r, refused)
	if wait > 0 {
		why := fmt.Sprintf("too many wrong credentials from %s: %s", caller(r), refused.why)
		fail(w, r, http.StatusTooManyRequests, why, int32(wait.Seconds())+1)
	}
	return wait > 0
}

// protect lets next answer only those who show the agent's token, and only as many as the gate lets in; while the
// agent drains, if it may.
func (s *Server) protect(next http.HandlerFunc, whileDraining bool) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if refused := s.auth.check(r); refused != nil {
			if !s.throttled(w, r, refused) {
				w.Header().Set("WWW-Authenticate", `Bearer realm="pipeops-agent"`) // RFC 6750
				fail(w, r, http.StatusUnauthorized, refused.why, 0)
			}
			return
		}
		rec := w.(*recorder) // observe has put it there
		rec.authenticated = true
		if isKubernetes(r) {
			rec.description, rec.streams = kube.Describe(r), true
			s.metrics.kubeInFlight.WithLabelValues(lane(&rec.description)).Inc()
		}
		switch why := s.gate.enter(rec, kube.HeaderMemory(r.Header)+8*int64(len(r.RequestURI)), whileDraining); why {
		case "":
			defer s.gate.leave(rec)
			rec.conn.Authenticated()
			next(w, r)
		case shuttingDown:
			w.Header().Set("Connection", "close") // a write must not meet its end
			fail(w, r, http.StatusServiceUnavailable, why, 1)
		default:
			fail(w, r, http.StatusTooManyRequests, why, 1)
		}
	}
}
