package server

import (
	"log/slog"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pipeops/vm-agent/proxy/kube"
)

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
		s.metrics.kube.WithLabelValues(sc.verb(), codeLabel, sc.lane()).Inc()
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
	if !s.log.Enabled(r.Context(), level) {
		return
	}
	attrs := append(sc.attrs(r), slog.Int("status", code), slog.Int64("bytes", sc.bytes.Load()),
		slog.Int64("duration_us", time.Since(sc.start).Microseconds()))
	if sc.outcome != "" {
		attrs = append(attrs, slog.String("outcome", sc.outcome))
	}
	if sc.Upgrade {
		attrs = append(attrs, slog.Int64("received_bytes", sc.sent.Load()))
	}
	s.log.LogAttrs(r.Context(), level, "request", attrs...)
}

// attrs say who asks for what, in the lines of the log.
func (s *scope) attrs(r *http.Request) []slog.Attr {
	from, user, certificate := "", s.who.User, ""
	if s.conn.Proxied() {
		from = forwardedFor(r)
	}
	if s.Identity.Get("Authorization") != "" && !s.Accepted() {
		user = "" // it is the token's own account, which nobody has verified
	}
	if r.TLS != nil && len(r.TLS.PeerCertificates) > 0 {
		certificate = r.TLS.PeerCertificates[0].Subject.CommonName
	}
	attrs := make([]slog.Attr, 0, 12) // of most requests
	for _, attr := range [...]struct{ key, value string }{
		{"request_id", s.requestID}, {"method", orOther(r.Method, slices.Contains(kube.Methods, r.Method))},
		{"route", routeLabel(r)}, {"caller", s.caller}, {"forwarded_for", from}, {"client_certificate", certificate},
		{"user", user}, {"groups", strings.Join(s.who.Groups, ",")}, {"as", s.who.As}, {"verb", s.verb()},
		{"group", s.Group}, {"resource", s.Resource}, {"subresource", s.Subresource}, {"namespace", s.Namespace},
		{"name", s.Name},
	} {
		if attr.value != "" {
			attrs = append(attrs, slog.String(attr.key, attr.value))
		}
	}
	return attrs
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
