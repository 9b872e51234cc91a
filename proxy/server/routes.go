package server

import (
	_ "embed"
	"net/http"
	"path"
	"strings"

	"github.com/pipeops/vm-agent/bootstrap/version"
	"github.com/pipeops/vm-agent/frpc"
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
func (s *Server) routes(l listener) []route {
	return []route{
		// It depends on nothing but that the process works: a restart would mend nothing else.
		{method: "GET", path: "/health", ops: true, handler: always(map[string]string{"status": "ok"})},
		{method: "GET", path: "/ready", ops: true, handler: s.getReady(l)},
		{method: "GET", path: "/version", ops: true, handler: always(version.Get())},
		{method: "GET", path: "/api/agent/status", bearer: true, handler: s.getStatus},
		{method: "POST", path: "/api/agent/heartbeat", bearer: true, handler: s.heartbeat},
		{method: "POST", path: "/api/control-plane/message", bearer: true, handler: s.message},
		{method: "POST", path: commandPattern, bearer: true, handler: s.command},
		{method: "GET", path: "/openapi.yaml", handler: getOpenAPI},
		{method: "GET", path: "/metrics", ops: true, bearer: true, handler: s.metrics.handler.ServeHTTP},
	}
}

const commandPattern = "/api/runners/{runner_id}/command"

// handler serves one listener.
func (s *Server) handler(l listener) http.Handler {
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
		case l == tunnel && r.TLS == nil && s.ready.tunnel.https.Load() && r.RequestURI != frpc.HealthPath:
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
			writeProblem(w, http.StatusNotFound, "there is no such path: /health, /ready, /version and /metrics are served here")
		case p == "/api" || p == "/apis" || strings.HasPrefix(p, "/api/v1/") || strings.HasPrefix(p, "/apis/"):
			kube.WriteStatus(w, r, http.StatusNotFound,
				"there is no such path: "+prefix+": add that to the server's URL in the kubeconfig", 0)
		default:
			writeProblem(w, http.StatusNotFound, "there is no such path: /openapi.yaml lists all; "+prefix)
		}
	}
}

// kubernetes answers what is below kube.Prefix.
func (s *Server) kubernetes(w http.ResponseWriter, r *http.Request) {
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
