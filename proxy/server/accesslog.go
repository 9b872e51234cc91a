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

// logRequest logs who asks for what, and more. slog.Logger would also look for the line of the source that calls it.
func (s *Server) logRequest(sc *scope, r *http.Request, level slog.Level, message string, more ...slog.Attr) {
	if !s.log.Enabled(r.Context(), level) {
		return
	}
	from, user, certificate := "", sc.who.User, ""
	if sc.conn.Proxied() {
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
	record := slog.NewRecord(time.Now(), level, message, 0)
	record.AddAttrs(append(attrs, more...)...)
	_ = s.log.Handler().Handle(r.Context(), record)
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
