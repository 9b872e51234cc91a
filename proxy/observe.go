package main

import (
	"bufio"
	"crypto/rand"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/pipeops/vm-agent/bootstrap/version"
)

// metrics are all that /metrics shows.
type metrics struct {
	requests *prometheus.CounterVec
	inFlight *prometheus.GaugeVec
	checks   *prometheus.GaugeVec
	handler  http.Handler
}

func newMetrics() *metrics {
	m := &metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "pipeops_agent_http_requests_total", Help: "HTTP requests answered.",
		}, []string{"route", "method", "code"}),
		inFlight: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "pipeops_agent_http_requests_in_flight", Help: "HTTP requests being answered now, streams included.",
		}, []string{"listener"}),
		checks: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "pipeops_agent_ready_check", Help: "1 if the named check of /ready passed when it last ran, else 0.",
		}, []string{"check"}),
	}
	info := version.Get()
	build := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "pipeops_agent_build_info", Help: "Always 1; the labels say what was built.",
		ConstLabels: prometheus.Labels{"version": info.Version, "commit": info.Commit, "go_version": info.GoVersion},
	})
	build.Set(1)
	registry := prometheus.NewRegistry()
	registry.MustRegister(m.requests, m.inFlight, m.checks, build,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	m.handler = promhttp.HandlerFor(registry, promhttp.HandlerOpts{})
	return m
}

// observe gives every request an id, marks every answer as this agent's, counts it and logs it. The log
// holds no query, header or body, and no path below the Kubernetes API: names may be secrets there.
func (s *server) observe(l listener, next http.Handler) http.Handler {
	inFlight := s.metrics.inFlight.WithLabelValues(l.String())
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		start := time.Now()
		id := rand.Text()
		r.Header.Set("X-Request-Id", id)
		w.Header().Set("X-Request-Id", id)
		if l == tunnel {
			// A gateway knows by it that the agent has answered, and not frps for an agent that is away.
			w.Header().Set("Pipeops-Agent", s.agentID)
		}
		rec := &recorder{ResponseWriter: w}
		inFlight.Inc()
		defer func() {
			inFlight.Dec()
			code := rec.status()
			s.metrics.requests.WithLabelValues(routeLabel(r), methodLabel(r.Method), strconv.Itoa(code)).Inc()
			level := slog.LevelInfo
			if l == operations {
				level = slog.LevelDebug // probes and scrapes
			}
			s.log.Log(r.Context(), level, "request", "request_id", id, "method", methodLabel(r.Method),
				"route", routeLabel(r), "status", code, "bytes", rec.bytes, "duration", time.Since(start).String())
		}()
		next.ServeHTTP(rec, r)
	})
}

// routeLabel is the route's path, never the caller's.
func routeLabel(r *http.Request) string {
	if r.Pattern == "" || r.Pattern == "/" {
		return "none"
	}
	for i := range r.Pattern {
		if r.Pattern[i] == '/' {
			return r.Pattern[i:]
		}
	}
	return r.Pattern
}

// methodLabel keeps a caller's inventions out of labels.
func methodLabel(method string) string {
	switch method {
	case http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete, http.MethodOptions:
		return method
	}
	return "other"
}

func (l listener) String() string {
	if l == operations {
		return "operations"
	}
	return "tunnel"
}

// recorder remembers the status and counts the bytes of an answer.
type recorder struct {
	http.ResponseWriter

	code  int
	bytes int64
}

// status is 499 for a caller who left before there was an answer, as nginx has it.
func (r *recorder) status() int {
	if r.code == 0 {
		return 499
	}
	return r.code
}

func (r *recorder) WriteHeader(code int) {
	if code >= 200 || code == http.StatusSwitchingProtocols {
		r.code = code
	}
	r.ResponseWriter.WriteHeader(code)
}

func (r *recorder) Write(data []byte) (int, error) {
	if r.code == 0 {
		r.code = http.StatusOK
	}
	n, err := r.ResponseWriter.Write(data)
	r.bytes += int64(n)
	return n, err
}

// Hijack is how an upgrade is answered; its bytes are not counted.
func (r *recorder) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	r.code = http.StatusSwitchingProtocols
	return http.NewResponseController(r.ResponseWriter).Hijack()
}

// Unwrap lets http.ResponseController reach what this type does not wrap.
func (r *recorder) Unwrap() http.ResponseWriter { return r.ResponseWriter }
