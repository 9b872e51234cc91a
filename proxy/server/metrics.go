package server

import (
	"net/http"
	"strings"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/pipeops/vm-agent/bootstrap/version"
	"github.com/pipeops/vm-agent/proxy/access"
)

// metrics are all metrics of the proxy. No label holds a value that a caller chooses.
type metrics struct {
	requests, kube, authFailures, commands, refused   *prometheus.CounterVec
	access, streamsEnded                              *prometheus.CounterVec
	received, sent, frpcRestarts, statusRequests      prometheus.Counter
	kubeInFlight, checks, limits                      *prometheus.GaugeVec
	tunnelUp, leaseEnd, renewalFailing, lastHeartbeat prometheus.Gauge
	reviewAge                                         prometheus.Gauge
	latency, statusDuration                           prometheus.Histogram

	inFlight map[listener]*atomic.Int64 // requests, streams included; also for /activity
	factory  promauto.Factory
	handler  http.Handler // of /metrics
}

// limit adds a limit and how much of it is in use.
func (m *metrics) limit(name string, size int64, inUse func() int64) {
	m.limits.WithLabelValues(name).Set(float64(size))
	m.factory.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "limit_in_use", Help: "How much of the limit is in use now.", ConstLabels: prometheus.Labels{"limit": name},
	}, func() float64 { return float64(inUse()) })
}

// owner adds what the cluster's owner allows.
func (m *metrics) owner(o *access.Owner) {
	for level, name := range access.Levels {
		m.factory.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "access_allow", Help: "1 for the level that the cluster's owner allows, else 0.",
			ConstLabels: prometheus.Labels{"level": name},
		}, func() float64 { return boolValue[o.State().Allow == access.Level(level)] })
	}
	m.factory.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "access_config_failing", Help: "1 if nothing is allowed because the owner's ConfigMap has ended, is invalid or cannot be read.",
	}, func() float64 { return boolValue[o.State().Detail != ""] })
}

func newMetrics() *metrics {
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	factory := promauto.With(prometheus.WrapRegistererWithPrefix("pipeops_agent_", registry))
	counters := func(name, help string, labels ...string) *prometheus.CounterVec {
		return factory.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
	}
	gauges := func(name, help string, labels ...string) *prometheus.GaugeVec {
		return factory.NewGaugeVec(prometheus.GaugeOpts{Name: name, Help: help}, labels)
	}
	counter := func(name, help string) prometheus.Counter { return counters(name, help).WithLabelValues() }
	gauge := func(name, help string) prometheus.Gauge { return gauges(name, help).WithLabelValues() }
	histogram := func(name, help string) prometheus.Histogram {
		return factory.NewHistogram(prometheus.HistogramOpts{
			Name: name, Help: help, Buckets: prometheus.DefBuckets, NativeHistogramBucketFactor: 1.1,
		})
	}
	m := &metrics{
		factory: factory, handler: promhttp.HandlerFor(registry, promhttp.HandlerOpts{}),
		requests:       counters("http_requests_total", "HTTP requests answered.", "route", "method", "code"),
		inFlight:       map[listener]*atomic.Int64{tunnel: {}, operations: {}},
		received:       counter("http_received_bytes_total", "Bytes of request bodies and of upgraded connections, from callers."),
		sent:           counter("http_sent_bytes_total", "Bytes of response bodies and of upgraded connections, to callers."),
		kube:           counters("kubernetes_requests_total", "Requests for the Kubernetes API answered.", "verb", "code", "lane"),
		kubeInFlight:   gauges("kubernetes_requests_in_flight", "Requests for the Kubernetes API being answered now.", "lane"),
		latency:        histogram("kubernetes_upstream_duration_seconds", "Time from a request to the API server until the headers of its answer."),
		checks:         gauges("ready_check", "1 if the named check of /ready passed when it last ran, else 0.", "check"),
		commands:       counters("runner_commands_total", "Commands for runners answered.", "code"),
		statusDuration: histogram("cluster_read_duration_seconds", "Time to read the cluster for a status; answers that share a reading are not counted."),
		statusRequests: counter("cluster_read_requests_total", "Requests to the API server that reading the cluster for a status took."),
		refused:        counters("limit_refusals_total", "Connections and requests refused or ended for a limit.", "limit"),
		limits:         gauges("limit", "The limit, in bytes if its name says so, else a number.", "limit"),
		authFailures:   counters("authentication_failures_total", "Requests refused for their credential.", "reason"),
		access:         counters("access_requests_total", "Requests for the Kubernetes API, forwarded or refused by the agent.", "identity", "outcome"),
		streamsEnded:   counters("streams_ended_total", "Streams ended because their caller lost its right.", "reason"),
		reviewAge:      gauge("access_review_age_seconds", "The longest time since a running stream was last authorised."),
		tunnelUp:       gauge("tunnel_up", "1 if frpc says that its tunnel is running, else 0."),
		leaseEnd:       gauge("tunnel_lease_expiry_timestamp_seconds", "When the tunnel's lease ends; 0 if it has no end or is not known."),
		renewalFailing: gauge("tunnel_lease_renewal_failing", "1 if the renewal of the lease has failed or is overdue, else 0."),
		lastHeartbeat:  gauge("last_heartbeat_timestamp_seconds", "When the control plane's last heartbeat came; 0 if none has since the start."),
		frpcRestarts:   counter("frpc_restarts_total", "How often frpc was seen to be away and back."),
	}
	for l, requests := range m.inFlight {
		factory.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "http_requests_in_flight", Help: "HTTP requests being answered now, streams included.",
			ConstLabels: prometheus.Labels{"listener": string(l)},
		}, func() float64 { return float64(requests.Load()) })
	}
	for limit := range strings.FieldsSeq("connections idle header_memory certificate handshake requests caller request_memory " +
		"stalled_calls stalled_reads stalled_streams commands") {
		m.refused.WithLabelValues(limit) // 0 until there is one
	}
	for reason := range strings.FieldsSeq("none several scheme token unconfigured") {
		m.authFailures.WithLabelValues(reason)
	}
	for reason := range strings.FieldsSeq("switch rights credential certificate") {
		m.streamsEnded.WithLabelValues(reason)
	}
	info := version.Get()
	gauges("build_info", "Always 1; the labels say what was built.", "version", "commit", "go_version").
		WithLabelValues(info.Version, info.Commit, info.GoVersion).Set(1)
	return m
}
