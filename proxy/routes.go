package main

import (
	"context"
	_ "embed"
	"log/slog"
	"net/http"
	"path"
	"strings"
	"sync/atomic"
	"time"

	"github.com/pipeops/vm-agent/bootstrap/agentapi"
	"github.com/pipeops/vm-agent/bootstrap/config"
	"github.com/pipeops/vm-agent/bootstrap/version"
	"github.com/pipeops/vm-agent/proxy/kube"
)

// openAPI describes the routes. Tests hold it to them.
//
//go:embed openapi.yaml
var openAPI []byte

func getOpenAPI(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/yaml")
	_, _ = w.Write(openAPI)
}

// listener says where a request came in.
type listener string

const (
	tunnel     listener = "tunnel"     // from frpc
	operations listener = "operations" // from the kubelet or Prometheus
)

// route is one row of the API.
type route struct {
	method  string // GET answers HEAD too
	path    string
	bearer  bool // on the tunnel listener, the caller must show the agent's token
	ops     bool // served on the operations listener too, to everyone who reaches it
	handler http.HandlerFunc
}

// routes is the whole API but for the Kubernetes API, which handler dispatches before any of these: a
// ServeMux would redirect some of its paths.
func (s *server) routes(l listener) []route {
	rows := []route{
		// It depends on nothing but that the process works: a restart would mend nothing else.
		{method: "GET", path: agentapi.HealthPath, ops: true, handler: always(map[string]string{"status": "ok"})},
		{method: "GET", path: agentapi.ReadyPath, ops: true, handler: s.getReady(l)},
		{method: "GET", path: agentapi.VersionPath, ops: true, handler: always(version.Get())},
		{method: "GET", path: "/api/agent/status", bearer: true, handler: s.getStatus},
		{method: "POST", path: "/api/agent/heartbeat", bearer: true, handler: s.heartbeat},
		{method: "POST", path: "/api/control-plane/message", bearer: true, handler: s.message},
		{method: "POST", path: commandPattern, bearer: true, handler: s.command},
		{method: "GET", path: "/openapi.yaml", handler: getOpenAPI},
		{method: "GET", path: "/metrics", ops: true, bearer: true, handler: s.metrics.handler.ServeHTTP},
	}
	if l == operations {
		rows = append(rows, route{method: "GET", path: agentapi.ActivityPath, ops: true, handler: s.getActivity})
	}
	return rows
}

// getActivity answers GET /activity, by which bootstrap decides whether a restart of frpc cuts off anybody.
func (s *server) getActivity(w http.ResponseWriter, _ *http.Request) {
	writeJSON(w, http.StatusOK, agentapi.Activity{RequestsInFlight: s.tunnelRequests.Load()})
}

const commandPattern = "/api/runners/{runner_id}/command"

// server holds what the handlers share.
type server struct {
	agent   agentStatus
	auth    *authenticator
	kube    *kube.Proxy
	cluster *clusterSummary
	runners *runners
	metrics *metrics
	ready   *readiness
	gate    *gate
	limits  limits
	log     *slog.Logger

	tunnelRequests atomic.Int64 // in flight on the tunnel listener

	heartbeats    atomic.Uint64             // of the control plane
	lastHeartbeat atomic.Pointer[time.Time] // in UTC; nil: none since the start
}

func newServer(cfg *config.Config, api *kube.Proxy, m *metrics, limits limits, log *slog.Logger) *server {
	refused := func(limit string) { m.refused.WithLabelValues(limit).Inc() }
	s := &server{
		agent: agentStatus{
			ID: cfg.Agent.ID, Name: cfg.Agent.Name, Cluster: cfg.Agent.ClusterName, Instance: cfg.Agent.Instance,
			Version: version.Version, StartedAt: time.Now().UTC(),
		},
		auth: newAuthenticator(cfg.Agent.Token, cfg.Agent.TokenOverlap, m, log), kube: api, cluster: &clusterSummary{api: api, metrics: m},
		runners: newRunners(api, cfg.Kubernetes.Namespace, cfg.Runners.AllowedHosts), metrics: m, gate: newGate(limits, refused, log),
		limits: limits, log: log,
	}
	m.limit("requests", int64(limits.requests), func() int64 { n, _, _ := s.gate.state(); return int64(n) })
	m.limit("request_memory_bytes", limits.requestMemory, func() int64 { _, n, _ := s.gate.state(); return n })
	m.limit("commands", maxCommands, func() int64 { return int64(len(s.runners.running)) })
	if cfg.Agent.TokenFile != "" { // as long as the process, and so while it drains
		go s.auth.follow(context.Background(), cfg.Agent.CurrentToken)
	}
	s.ready = newReadiness(api, cfg, s.gate, s.metrics)
	return s
}

// handler serves one listener.
func (s *server) handler(l listener) http.Handler {
	mux := http.NewServeMux()
	for _, r := range s.routes(l) {
		if l == operations && !r.ops {
			continue
		}
		handler := r.handler
		if r.bearer && l == tunnel {
			handler = s.protect(handler, r.path != commandPattern)
		}
		mux.HandleFunc(r.method+" "+r.path, handler)
		allow := strings.Replace(r.method, "GET", "GET, HEAD", 1)
		mux.HandleFunc(r.path, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Allow", allow)
			writeProblem(w, http.StatusMethodNotAllowed, "use "+allow)
		})
	}
	kubernetes, notFound := s.protect(s.kubernetes, false), notFound(l)
	mux.HandleFunc("/", notFound)
	return s.observe(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch p := r.URL.EscapedPath(); {
		case l == tunnel && r.TLS == nil && s.ready.tunnel.https.Load() && r.RequestURI != agentapi.TunnelHealthPath:
			writeProblem(w, http.StatusMisdirectedRequest, "the tunnel is of type https: speak TLS, with the certificate that the tunnel shows")
		case l == tunnel && belowKubernetes(r):
			r.Pattern = kube.Prefix + "/"
			kubernetes(w, r)
		case r.Method == http.MethodConnect || path.Clean(p) != p:
			// A ServeMux answers CONNECT on its own, and paths that are not clean with a redirect that knows nothing of
			// the gateway's prefix.
			notFound(w, r)
		default:
			mux.ServeHTTP(w, r)
		}
	}))
}

// notFound answers for all other paths. kubectl asks for some of them where its server's URL lacks the prefix.
func notFound(l listener) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		const prefix = "the Kubernetes API is under " + kube.Prefix + "/"
		switch p := r.URL.Path; {
		case l == operations:
			writeProblem(w, http.StatusNotFound, "there is no such path: /health, /ready, /version, /activity and /metrics are served here")
		case p == "/api" || p == "/apis" || strings.HasPrefix(p, "/api/v1/") || strings.HasPrefix(p, "/apis/"):
			kube.WriteStatus(w, r, http.StatusNotFound,
				"there is no such path: "+prefix+": add that to the server's URL in the kubeconfig", 0)
		default:
			writeProblem(w, http.StatusNotFound, "there is no such path: /openapi.yaml lists all; "+prefix)
		}
	}
}

// kubernetes answers what is below kube.Prefix.
func (s *server) kubernetes(w http.ResponseWriter, r *http.Request) {
	rec := w.(*recorder) // observe has put it there
	s.kube.Serve(w, r, &rec.description, rec.body, func(bytes int64, optional bool) bool { return s.gate.reserve(rec, bytes, optional) })
}

// isKubernetes reports whether a request is one for the Kubernetes API; handler has found that out.
func isKubernetes(r *http.Request) bool { return r.Pattern == kube.Prefix+"/" }

// belowKubernetes looks at the path as it came, before anything is decoded.
func belowKubernetes(r *http.Request) bool {
	path, _, _ := strings.Cut(r.RequestURI, "?")
	return path == kube.Prefix || strings.HasPrefix(path, kube.Prefix+"/")
}

// always answers with the same JSON.
func always(body any) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, http.StatusOK, body) }
}
