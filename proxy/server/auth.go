package server

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/util/wait"

	"github.com/pipeops/vm-agent/bootstrap/config"
	"github.com/pipeops/vm-agent/frpc/secret"
	"github.com/pipeops/vm-agent/proxy/access"
	"github.com/pipeops/vm-agent/proxy/answer"
	"github.com/pipeops/vm-agent/proxy/kube"
)

const (
	tokenInterval = 2 * time.Second // between two readings of the token's file
	// Within failureWindow a caller may fail maxFailures times before it gets 429. At most maxCallers are told apart.
	failureWindow           = time.Minute
	maxFailures, maxCallers = 20, 1000
)

// authenticator checks callers' tokens, and counts their failures. Safe for concurrent use.
type authenticator struct {
	metrics *metrics
	log     *slog.Logger
	overlap time.Duration // how long the previous token stays valid, so that callers can change theirs later

	mu                sync.Mutex
	current, previous [sha256.Size]byte
	until             time.Time // previous is valid until then

	window  time.Time      // when the counting of callers' failures began
	callers map[string]int // failures by address
}

// noToken is current while there is no token: all callers are refused.
var noToken = sha256.Sum256(nil)

func newAuthenticator(token secret.Secret, overlap time.Duration, m *metrics, log *slog.Logger) *authenticator {
	return &authenticator{metrics: m, log: log, overlap: overlap, current: sha256.Sum256([]byte(token.Reveal()))}
}

// follow reads the token every tokenInterval until ctx ends, and not when a request comes: the overlap counts from the
// change. If reading fails the token stays as it was; if there is none any more, all callers are refused.
func (a *authenticator) follow(ctx context.Context, read func() (secret.Secret, error)) {
	failing := false
	wait.UntilWithContext(ctx, func(context.Context) {
		token, err := read()
		switch {
		case err == nil || errors.Is(err, config.ErrNoSecret): // then token is empty
			a.setToken(token)
			failing = false
		case !failing:
			a.log.Warn("reading the agent token failed: keeping the previous one", "error", err)
			failing = true
		}
	}, tokenInterval)
}

// setToken replaces the token. The previous one stays valid for the overlap, unless there is no new one.
func (a *authenticator) setToken(token secret.Secret) {
	a.mu.Lock()
	defer a.mu.Unlock()
	hash := sha256.Sum256([]byte(token.Reveal()))
	if hash == a.current {
		return
	}
	a.previous, a.current, a.until = a.current, hash, time.Time{}
	if hash == noToken {
		a.log.Warn("agent token missing: refusing all callers")
		return
	}
	if a.previous != noToken {
		a.until = time.Now().Add(a.overlap)
	}
	a.log.Info("agent token changed", "previous_valid_until", a.until.UTC())
}

// refusal is why a request's credential is refused.
type refusal struct {
	reason string // metric label
	why    string // for the caller
}

// check returns nil for headers with the agent's token in the named one. It compares hashes in constant time, so
// that neither the token nor its length can be measured.
func (a *authenticator) check(headers http.Header, header string) *refusal {
	values, send := headers[header], ": send \""+header+": Bearer <agent token>\""
	if len(values) == 0 {
		return &refusal{"none", "no credential" + send}
	}
	if len(values) > 1 {
		return &refusal{"several", "more than one " + header + " header: send one"}
	}
	scheme, token, _ := strings.Cut(values[0], " ")
	if !strings.EqualFold(scheme, "Bearer") {
		return &refusal{"scheme", "the credential is not a bearer token" + send}
	}
	hash := sha256.Sum256([]byte(strings.TrimLeft(token, " ")))
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.current == noToken {
		return &refusal{"unconfigured", "the agent has no token configured and refuses all callers: set agent.token"}
	}
	current := subtle.ConstantTimeCompare(hash[:], a.current[:])
	previous := subtle.ConstantTimeCompare(hash[:], a.previous[:])
	if current == 1 || previous == 1 && time.Now().Before(a.until) {
		return nil
	}
	return &refusal{"token", "the bearer token is not this agent's token: check the token in the kubeconfig or client"}
}

// recordFailure counts a refusal, and logs the first of each caller in a window. It returns for how long the
// caller's wrong tokens get 429, else 0. Right ones are always accepted: many callers share their gateway's address.
func (a *authenticator) recordFailure(caller string, refused *refusal) time.Duration {
	a.metrics.authFailures.WithLabelValues(refused.reason).Inc()
	a.mu.Lock()
	defer a.mu.Unlock()
	if time.Since(a.window) > failureWindow {
		a.window, a.callers = time.Now(), map[string]int{}
	}
	if _, known := a.callers[caller]; !known && len(a.callers) >= maxCallers {
		caller = "others"
	}
	a.callers[caller]++
	switch n := a.callers[caller]; {
	case n == 1:
		a.log.Warn("authentication failed", "caller", caller, "reason", refused.why, "next_log_in", failureWindow.String())
	case n > maxFailures:
		return time.Until(a.window.Add(failureWindow))
	}
	return 0
}

// fail answers an error in the form that the caller of r expects: kubectl prints a metav1.Status. retryAfter is in
// seconds; 0 sends none.
func fail(w http.ResponseWriter, r *http.Request, code int, why string, retryAfter int32) {
	if isKubernetes(r) {
		if why != shuttingDown {
			why = "the agent refuses the request: " + why
		}
		kube.WriteStatus(w, r, code, why, retryAfter)
		return
	}
	if retryAfter > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(int(retryAfter)))
	}
	answer.WriteProblem(w, code, why)
}

// throttle counts a refusal. It answers 429 and returns true if the caller has failed too often.
func (s *Server) throttle(w http.ResponseWriter, r *http.Request, refused *refusal) bool {
	caller := scopeOf(r).caller
	wait := s.auth.recordFailure(caller, refused)
	if wait > 0 {
		why := fmt.Sprintf("too many wrong credentials from %s: %s", caller, refused.why)
		fail(w, r, http.StatusTooManyRequests, why, int32(wait.Seconds())+1)
	}
	return wait > 0
}

// authenticate returns why a request is refused; nil if it has the agent's token. In identity own, a request for the
// Kubernetes API may have a client certificate instead.
func (s *Server) authenticate(r *http.Request) *refusal {
	if s.config.Access.Identity != access.Own || !isKubernetes(r) {
		return s.auth.check(r.Header, "Authorization")
	}
	if s.config.Proxy.ClientCAFile != "" && r.TLS != nil && len(r.TLS.VerifiedChains) > 0 {
		return nil
	}
	return s.auth.check(r.Header, kube.GateHeader)
}

// identify records as whom a request for the Kubernetes API acts, or returns why not, and the status for that.
func (s *Server) identify(sc *scope, r *http.Request) (code int, why string) {
	sc.Description, sc.answersEarly = kube.Describe(r), true
	sc.needs = access.Needs(&sc.Description)
	sc.inFlight = s.metrics.kubeInFlight.WithLabelValues(sc.lane())
	sc.inFlight.Inc()
	var err error
	identity := s.config.Access.Identity
	sc.who, code, err = access.Identify(r, identity, s.config.Access.Prefix)
	sc.Identity = sc.who.Headers
	switch {
	case err != nil:
		return code, err.Error()
	case identity == access.Own && s.auth.check(sc.Identity, "Authorization") == nil:
		return http.StatusUnauthorized, "its credential is the agent's token: send your own token for the cluster"
	case sc.who.Share != "":
		sc.share = sc.who.Share
	}
	if r.TLS != nil && len(r.TLS.PeerCertificates) > 0 && identity != access.Named {
		sc.share = string(r.TLS.PeerCertificates[0].RawSubject)
	}
	if sc.isStream() {
		sc.right = &right{sc.who.ID(), sc.Description}
		sc.right.Upgrade = false
	}
	return 0, ""
}

// protect returns a handler that calls next for authenticated requests that the cluster's owner and the gate admit.
// Those for the Kubernetes API need what they ask for, and others needs.
func (s *Server) protect(next http.HandlerFunc, needs access.Level) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		sc := scopeOf(r)
		sc.needs = needs
		if refused := s.authenticate(r); refused != nil {
			sc.outcome = "credential"
			if refused.reason == "none" && r.TLS == nil && isKubernetes(r) {
				refused.why += "; kubectl sends no token over http://, so its server's URL must be that of a TLS gateway"
			}
			if !s.throttle(w, r, refused) {
				w.Header().Set("WWW-Authenticate", `Bearer realm="pipeops-agent"`) // RFC 6750
				fail(w, r, http.StatusUnauthorized, refused.why, 0)
			}
			return
		}
		if isKubernetes(r) {
			if code, why := s.identify(sc, r); why != "" {
				sc.outcome = "identity"
				fail(w, r, code, why, 0)
				return
			}
		}
		sc.authenticated = true
		switch why := s.gate.enter(sc, sc.headers); why {
		case "":
			defer s.gate.leave(sc)
			sc.admitted = true
			sc.conn.Authenticated(sc.headers)
			if why := s.refuse(sc); why != "" {
				fail(w, r, http.StatusForbidden, why, 0)
				return
			}
			next(w, r)
		case shuttingDown:
			sc.outcome = "limit"
			fail(w, r, http.StatusServiceUnavailable, why, 1)
		default:
			sc.outcome = "limit"
			fail(w, r, http.StatusTooManyRequests, why, 1)
		}
	}
}

// refuse returns why a request must not be served, although its caller is known, or "".
func (s *Server) refuse(sc *scope) (why string) {
	if why = s.owner.Refuse(sc.needs); why != "" {
		sc.outcome = "switch"
	} else if outcome, closed := s.owner.Guard(&sc.Description); closed != "" {
		sc.outcome, why = outcome, closed
	}
	return why
}
