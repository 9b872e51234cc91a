package server

import (
	_ "embed"
	"log/slog"
	"net/http"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/pipeops/vm-agent/bootstrap/agentapi"
	"github.com/pipeops/vm-agent/bootstrap/version"
	"github.com/pipeops/vm-agent/proxy/access"
	"github.com/pipeops/vm-agent/proxy/answer"
	"github.com/pipeops/vm-agent/proxy/kube"
)

// openAPI describes the routes. Tests compare it with them.
//
//go:embed openapi.yaml
var openAPI []byte

func getOpenAPI(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/yaml")
	_, _ = w.Write(openAPI)
}

// listener is one of the server's two listeners.
type listener string

const (
	tunnel     listener = "tunnel"     // for frpc
	operations listener = "operations" // for the kubelet and Prometheus
	both       listener = "both"       // in the table of routes
)

// route is one row of the API.
type route struct {
	method  string // GET answers HEAD too
	path    string
	on      listener // without it, a route is not served
	bearer  bool     // on the tunnel listener, the caller needs the agent's token
	needs   access.Level
	handler http.HandlerFunc
}

// routes returns the routes of a listener, except the Kubernetes API, which handler serves before it looks at these: a
// ServeMux would redirect some of its paths.
func (s *Server) routes(l listener) []route {
	return slices.DeleteFunc([]route{
		// Depends on nothing but the process: a restart would fix nothing else.
		{method: "GET", path: agentapi.HealthPath, on: both, handler: always(map[string]string{"status": "ok"})},
		{method: "GET", path: agentapi.ReadyPath, on: both, handler: s.getReady(l)},
		{method: "GET", path: agentapi.VersionPath, on: both, handler: always(version.Get())},
		{method: "GET", path: "/api/agent/status", on: tunnel, bearer: true, handler: s.getStatus},
		{method: "POST", path: "/api/agent/heartbeat", on: tunnel, bearer: true, handler: s.postHeartbeat},
		{method: "POST", path: "/api/control-plane/message", on: tunnel, bearer: true, handler: s.postMessage},
		{method: "POST", path: "/api/runners/{runner_id}/command", on: tunnel, bearer: true, needs: access.All,
			handler: s.postCommand},
		{method: "GET", path: "/openapi.yaml", on: tunnel, handler: getOpenAPI},
		{method: "GET", path: "/metrics", on: both, bearer: true, handler: s.metrics.handler.ServeHTTP},
		{method: "GET", path: agentapi.ActivityPath, on: operations, handler: s.getActivity},
	}, func(r route) bool { return r.on != l && r.on != both })
}

// getActivity answers GET /activity: bootstrap restarts frpc for a new lease when no request runs.
func (s *Server) getActivity(w http.ResponseWriter, _ *http.Request) {
	answer.WriteJSON(w, http.StatusOK, agentapi.Activity{RequestsInFlight: s.metrics.inFlight[tunnel].Load()})
}

func (s *Server) handler(l listener) http.Handler {
	mux := http.NewServeMux()
	for _, r := range s.routes(l) {
		handler := r.handler
		if r.bearer && l == tunnel {
			handler = s.protect(handler, r.needs)
		}
		mux.HandleFunc(r.method+" "+r.path, handler)
		allow := strings.Replace(r.method, "GET", "GET, HEAD", 1)
		mux.HandleFunc(r.path, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Allow", allow)
			answer.WriteProblem(w, http.StatusMethodNotAllowed, "use "+allow)
		})
	}
	kubernetes, notFound := s.protect(s.kubernetes, access.None), notFound(l)
	mux.HandleFunc("/", notFound)
	return s.observe(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		sent, _, _ := strings.Cut(r.RequestURI, "?") // not decoded
		switch p := r.URL.EscapedPath(); {
		case l == tunnel && r.TLS == nil && r.RequestURI != agentapi.TunnelHealthPath &&
			(s.tunnel.https.Load() || s.config.Proxy.ClientCAFile != ""):
			answer.WriteProblem(w, http.StatusMisdirectedRequest,
				"the tunnel is of type https: use TLS, and trust the tunnel's certificate")
		case l == tunnel && strings.HasPrefix(sent+"/", kube.Prefix+"/"):
			r.Pattern = kube.Prefix + "/"
			kubernetes(w, r)
		case r.Method == http.MethodConnect || path.Clean(p) != p:
			// A ServeMux would answer CONNECT itself, and paths that are not clean with a redirect that lacks the
			// gateway's prefix.
			notFound(w, r)
		default:
			mux.ServeHTTP(w, r)
		}
	}))
}

// notFound answers for all other paths. kubectl requests some of them if its server's URL ends in another path.
func notFound(l listener) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		const none, prefix = "there is no such path: ", "the Kubernetes API is under " + kube.Prefix + "/"
		switch p := r.URL.Path; {
		case l == operations:
			answer.WriteProblem(w, http.StatusNotFound, none+"/health, /ready, /version, /activity and /metrics are served here")
		case strings.HasSuffix(p, "/api") || strings.Contains(p, "/api/v1/") || strings.Contains(p+"/", "/apis/"):
			kube.WriteStatus(w, r, http.StatusNotFound, none+prefix+": add that to the server's URL in the kubeconfig", 0)
		default:
			answer.WriteProblem(w, http.StatusNotFound, none+"/openapi.yaml lists all; "+prefix)
		}
	}
}

func (s *Server) kubernetes(w http.ResponseWriter, r *http.Request) {
	sc := scopeOf(r)
	sc.Reserve = func(bytes int64, optional bool) bool { return s.gate.reserve(sc, bytes, optional) }
	if sc.Upgrade {
		sc.started = func() { s.logRequest(sc, r, slog.LevelInfo, "stream started") }
	}
	switch s.kube.Serve(w, r, &sc.Request) {
	case 0:
	case http.StatusForbidden:
		sc.outcome = "path"
	default:
		sc.outcome = "invalid"
	}
}

func (s *Server) postCommand(w http.ResponseWriter, r *http.Request) {
	sc := scopeOf(r)
	sc.answersEarly = true
	defer func() { s.metrics.commands.WithLabelValues(strconv.Itoa(sc.status())).Inc() }()
	s.runners.Relay(w, r, r.PathValue("runner_id"), sc.Body)
}

// isKubernetes reports whether handler has found that the request is for the Kubernetes API.
func isKubernetes(r *http.Request) bool { return r.Pattern == kube.Prefix+"/" }

func always(body any) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { answer.WriteJSON(w, http.StatusOK, body) }
}
