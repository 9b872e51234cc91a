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
