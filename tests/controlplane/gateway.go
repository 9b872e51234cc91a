package controlplane

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httputil"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/pipeops/vm-agent/proxy/kube"
)

// agentHeader marks what an agent has answered.
const agentHeader = "Pipeops-Agent"

// gateway leads /agents/{id}/… to the agent of that id, by way of frps's vhost port. It is HTTPS, because
// kubectl sends no token over http, and leaves authentication to the agent.
func (c *ControlPlane) gateway(vhost string) http.Handler {
	rp := &httputil.ReverseProxy{
		Rewrite: func(pr *httputil.ProxyRequest) {
			id, path, _ := cutAgent(pr.In.URL.Path)
			_, rawPath, _ := cutAgent(pr.In.URL.EscapedPath())
			pr.Out.URL.Scheme, pr.Out.URL.Host = "http", vhost
			pr.Out.URL.Path, pr.Out.URL.RawPath = path, rawPath
			pr.Out.URL.RawQuery = pr.In.URL.RawQuery
			pr.Out.Host = id + "." + domain
			// The gateway tells callers to continue; a second 100 from behind would race with its own.
			pr.Out.Header.Del("Expect")
			// Else frps's transport asks for gzip on its own, has the API server compress, and unpacks it again.
			if pr.In.Header.Get("Accept-Encoding") == "" {
				pr.Out.Header.Set("Accept-Encoding", "identity")
			}
		},
		ModifyResponse: func(resp *http.Response) error {
			id, _, _ := strings.Cut(resp.Request.Host, ".")
			if resp.Header.Get(agentHeader) != id {
				return errNoAgent
			}
			return nil
		},
		ErrorHandler: c.unavailable,
		ErrorLog:     slog.NewLogLogger(c.options.Log.Handler(), slog.LevelDebug),
		Transport:    &http.Transport{MaxIdleConnsPerHost: 100, DisableCompression: true, IdleConnTimeout: 50 * time.Second},
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id, _, ok := cutAgent(r.URL.Path)
		c.mu.Lock()
		_, known := c.agents[id]
		c.mu.Unlock()
		if !ok || !known {
			kube.WriteStatus(w, r, http.StatusNotFound, metav1.StatusReasonNotFound,
				fmt.Sprintf("the control plane knows no agent %.100q: the server URL is https://<gateway>/agents/<agent id>/api/k8s", id), 0)
			return
		}
		rp.ServeHTTP(w, r)
	})
}

// errNoAgent stands for an answer that no agent gave: frps answers 404 for a tunnel that is not up, which kubectl
// would take for an object that does not exist.
var errNoAgent = errors.New("no agent is connected")

// unavailable asks for another try in a second. client-go makes ten before it gives the error to its user, so
// that kubectl works on when a hop is started again. r is the request as rewritten.
func (c *ControlPlane) unavailable(w http.ResponseWriter, r *http.Request, err error) {
	if errors.Is(err, context.Canceled) {
		panic(http.ErrAbortHandler) // the caller has gone; to return would be to answer 200
	}
	id, _, _ := strings.Cut(r.Host, ".")
	message := fmt.Sprintf("agent %q is not connected to the control plane: look at its pod's bootstrap and frpc logs, and at GET /ready on its port 9090", id)
	c.mu.Lock()
	refused, ok := c.refusals[id]
	c.mu.Unlock()
	if ok {
		message += fmt.Sprintf("; frps refused its tunnel at %s: %s", refused.at.UTC().Format(time.RFC3339), refused.reason)
	}
	if !errors.Is(err, errNoAgent) {
		message = fmt.Sprintf("the gateway cannot reach frps: %v: check that the control plane's frps runs", err)
	}
	kube.WriteStatus(w, r, http.StatusServiceUnavailable, metav1.StatusReasonServiceUnavailable, message, 1)
}

// cutAgent splits /agents/{id}/rest into id and /rest. It works on encoded paths as on decoded ones.
func cutAgent(path string) (id, rest string, ok bool) {
	path, ok = strings.CutPrefix(path, "/agents/")
	id, rest, _ = strings.Cut(path, "/")
	return id, "/" + rest, ok
}
