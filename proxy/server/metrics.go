package server

import (
	"crypto/x509"
	"encoding/pem"
	"net/http"
	"os"
	"slices"
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
	received, sent, frpcRestarts                      prometheus.Counter
	kubeInFlight, checks, limits                      *prometheus.GaugeVec
	tunnelUp, leaseEnd, renewalFailing, lastHeartbeat prometheus.Gauge
	reviewAge, leaseStart                             prometheus.Gauge
	latency                                           *prometheus.HistogramVec
	statusDuration                                    prometheus.Histogram

	inFlight map[listener]*atomic.Int64 // requests, streams included; also for /activity
	factory  promauto.Factory
	handler  http.Handler // of /metrics
}

// limit adds a limit and how much of it is in use.
func (m *metrics) limit(name string, size int64, inUse func() int64) {
	m.limits.WithLabelValues(name).Set(float64(size))
	m.follow("limit_in_use", "How much of the limit is in use now.", "limit", name, func() float64 { return float64(inUse()) })
}

// follow adds a gauge with one label, whose value is asked for at each scrape.
func (m *metrics) follow(name, help, label, labelValue string, value func() float64) {
	labels := prometheus.Labels{label: labelValue}
	m.factory.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help, ConstLabels: labels}, value)
}

// answered observes the latency of a request to the API server.
func (m *metrics) answered(r *http.Request, seconds float64) {
	lane := "own"
	if sc, _ := r.Context().Value(scopeKey{}).(*scope); sc != nil && sc.inFlight != nil {
		lane = sc.lane()
	}
	m.latency.WithLabelValues(lane).Observe(seconds)
}

// certificate adds when the first certificate of a PEM file expires, or the last to expire of authorities.
func (m *metrics) certificate(name, path string, authorities bool) {
	const help = "When the certificate of the file expires; 0 if there is none."
	m.follow("certificate_expiry_timestamp_seconds", help, "certificate", name, func() (end float64) {
		data, _ := os.ReadFile(path)
		for block, rest := pem.Decode(data); block != nil && (authorities || end == 0); block, rest = pem.Decode(rest) {
			if certificate, err := x509.ParseCertificate(block.Bytes); err == nil {
				end = max(end, float64(certificate.NotAfter.Unix()))
			}
		}
		return end
	})
}

// owner adds what the cluster's owner allows.
func (m *metrics) owner(o *access.Owner) {
	for level, name := range access.Levels {
		m.follow("access_allow", "1 for the level that the cluster's owner allows, else 0.", "level", name,
			func() float64 { return boolValue[o.State().Allow == access.Level(level)] })
	}
	m.factory.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "access_config_failing", Help: "1 if the owner's ConfigMap has ended, is invalid or cannot be read.",
	}, func() float64 { return boolValue[o.State().Detail != "" || o.State().Held != ""] })
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
	histograms := func(name, help string, labels ...string) *prometheus.HistogramVec {
		return factory.NewHistogramVec(prometheus.HistogramOpts{
			Name: name, Help: help, Buckets: append(slices.Clone(prometheus.DefBuckets), 30, 60),
			NativeHistogramBucketFactor: 1.1,
		}, labels)
	}
	m := &metrics{
		factory: factory, handler: promhttp.HandlerFor(registry, promhttp.HandlerOpts{}),
		requests:       counters("http_requests_total", "HTTP requests answered.", "route", "method", "code"),
		inFlight:       map[listener]*atomic.Int64{tunnel: {}, operations: {}},
		received:       counter("http_received_bytes_total", "Bytes of request bodies and of upgraded connections, from callers."),
		sent:           counter("http_sent_bytes_total", "Bytes of response bodies and of upgraded connections, to callers."),
		kube:           counters("kubernetes_requests_total", "Requests for the Kubernetes API answered.", "verb", "code", "lane", "origin"),
		kubeInFlight:   gauges("kubernetes_requests_in_flight", "Requests for the Kubernetes API being answered now.", "lane"),
		latency:        histograms("kubernetes_upstream_duration_seconds", "Time from a request to the API server until the headers of its answer.", "lane"),
		checks:         gauges("ready_check", "1 if the named check of /ready passed when it last ran, else 0.", "check"),
		commands:       counters("runner_commands_total", "Commands for runners answered.", "code"),
		statusDuration: histograms("cluster_read_duration_seconds", "Time to read the cluster for a status; answers that share a reading are not counted.").WithLabelValues().(prometheus.Histogram),
		refused:        counters("limit_refusals_total", "Connections and requests refused or ended for a limit.", "limit"),
		limits:         gauges("limit", "The limit, in bytes if its name says so, else a number.", "limit"),
		authFailures:   counters("authentication_failures_total", "Requests refused for their credential.", "reason"),
		access:         counters("access_requests_total", "Requests for the Kubernetes API, forwarded or refused by the agent.", "identity", "outcome"),
		streamsEnded:   counters("streams_ended_total", "Streams ended because their caller lost its right.", "reason"),
		reviewAge:      gauge("access_review_age_seconds", "The longest time since a running stream was last authorised."),
		tunnelUp:       gauge("tunnel_up", "1 if frpc says that its tunnel is running, else 0."),
		leaseStart:     gauge("tunnel_lease_issue_timestamp_seconds", "When the tunnel's lease was issued; 0 if it is not known."),
		leaseEnd:       gauge("tunnel_lease_expiry_timestamp_seconds", "When the tunnel's lease ends; 0 if it has no end or is not known."),
		renewalFailing: gauge("tunnel_lease_renewal_failing", "1 if the renewal of the lease has failed or is overdue, else 0."),
		lastHeartbeat:  gauge("last_heartbeat_timestamp_seconds", "When the control plane's last heartbeat came; 0 if none has since the start."),
		frpcRestarts:   counter("frpc_restarts_total", "How often frpc was seen to be away and back."),
	}
	for l, requests := range m.inFlight {
		m.follow("http_requests_in_flight", "HTTP requests being answered now, streams included.", "listener", string(l),
			func() float64 { return float64(requests.Load()) })
	}
	for counted, values := range map[*prometheus.CounterVec]string{
		m.refused: "connections idle header_memory certificate handshake requests caller request_memory " +
			"stalled_calls stalled_reads stalled_streams commands",
		m.authFailures: "none several scheme token unconfigured",
		m.streamsEnded: "switch rights credential certificate",
	} {
		for value := range strings.FieldsSeq(values) {
			counted.WithLabelValues(value) // 0 until there is one
		}
	}
	info := version.Get()
	gauges("build_info", "Always 1; the labels say what was built.", "version", "commit", "go_version").
		WithLabelValues(info.Version, info.Commit, info.GoVersion).Set(1)
	return m
}
