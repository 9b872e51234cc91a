package kube

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
)

// TestSummaryOfALargeClusterTakesFewRequests: nodes in pages, all else in one small request each. What is forbidden is
// null, with the API server's reason.
func TestSummaryOfALargeClusterTakesFewRequests(t *testing.T) {
	const nodes = 1200
	var requests atomic.Int32
	proxy := before(t, func(w http.ResponseWriter, r *http.Request) {
		requests.Add(1)
		w.Header().Set("Content-Type", "application/json")
		switch r.URL.Path {
		case "/version":
			_, _ = fmt.Fprint(w, `{"major":"1","gitVersion":"v1.36.3","platform":"linux/amd64"}`)
		case "/api/v1/pods":
			_, _ = fmt.Fprint(w, `{"metadata":{"continue":"x","remainingItemCount":49999},"items":[{"metadata":{"name":"p"}}]}`)
		case "/api/v1/services":
			_, _ = fmt.Fprint(w, `{"metadata":{},"items":[{"metadata":{"name":"s"}}]}`)
		case "/api/v1/namespaces":
			_, _ = fmt.Fprint(w, `{"metadata":{"continue":"x"},"items":[{"metadata":{"name":"n"}}]}`)
		case "/apis/apps/v1/deployments":
			w.WriteHeader(http.StatusForbidden)
			_, _ = fmt.Fprint(w, `{"kind":"Status","message":"deployments.apps is forbidden"}`)
		case "/api/v1/nodes":
			var from int
			_, _ = fmt.Sscan(r.URL.Query().Get("continue"), &from)
			to, next := from+nodePage, fmt.Sprint(from+nodePage)
			if to >= nodes {
				to, next = nodes, ""
			}
			var items []string
			for i := from; i < to; i++ {
				items = append(items, fmt.Sprintf(`{"metadata":{"name":"n%d"},"status":{
					"conditions":[{"type":"DiskPressure","status":"True"},{"type":"Ready","status":"%s"}],
					"capacity":{"cpu":"2","memory":"4Gi","pods":"110"},"allocatable":{"cpu":"1500m","memory":"3Gi"},
					"nodeInfo":{"kubeletVersion":"v1.%d.0"}}}`,
					i, map[bool]string{true: "True", false: "Unknown"}[i%3 > 0], 35+i%2))
			}
			_, _ = fmt.Fprintf(w, `{"kind":"NodeList","metadata":{"continue":%q},"items":[%s],"more":[1]}`, next,
				strings.Join(items, ","))
		}
	})
	s := proxy.Client.Summarize(t.Context())
	if !s.Reachable || s.Version == nil || *s.Version != "v1.36.3" || *s.Platform != "linux/amd64" ||
		*s.Pods != 50_000 || *s.Services != 1 {
		t.Errorf("got %+v", s)
	}
	if n := s.Nodes; n == nil || n.Total != nodes || n.Ready != 800 || n.Versions["v1.35.0"] != 600 ||
		n.Versions["v1.36.0"] != 600 ||
		n.Capacity != (Resources{CPU: 2000 * nodes, Memory: 4 << 30 * nodes}) ||
		n.Allocatable != (Resources{CPU: 1500 * nodes, Memory: 3 << 30 * nodes}) {
		t.Errorf("got nodes %+v", n)
	}
	if s.Namespaces != nil || s.Deployments != nil || len(s.Unavailable) != 2 ||
		!strings.Contains(s.Unavailable["namespaces"], "does not say how many") ||
		!strings.HasSuffix(s.Unavailable["deployments"],
			"answers GET /apis/apps/v1/deployments: deployments.apps is forbidden") {
		t.Errorf("unavailable: %v", s.Unavailable)
	}
	if n := requests.Load(); n != 5+nodes/100 {
		t.Errorf("it took %d requests", n)
	}
}

// TestSummaryWithoutAnAPIServerIsNull: for one reason, which costs one request.
func TestSummaryWithoutAnAPIServerIsNull(t *testing.T) {
	var requests atomic.Int32
	proxy := before(t, func(http.ResponseWriter, *http.Request) {
		requests.Add(1)
		panic(http.ErrAbortHandler)
	})
	s := proxy.Client.Summarize(t.Context())
	if s.Reachable || s.Version != nil || s.Pods != nil || s.Nodes != nil || len(s.Unavailable) != 7 ||
		!strings.Contains(s.Unavailable["pods"], "broke off") {
		t.Errorf("got %+v", s)
	}
	if n := requests.Load(); n > 2 { // one, and once more on a new connection
		t.Errorf("it took %d requests", n)
	}
}

// TestIncompleteListOfNodesIsAnError: it must not be taken for a short list.
func TestIncompleteListOfNodesIsAnError(t *testing.T) {
	for _, body := range []string{``, `[]`, `{"items":[{"status":{}}`, `{"items":{}}`,
		`{"items":[{"status":{"capacity":{"cpu":"x"}}}]}`, `{"items":[1]}`, `{"metadata":1}`, `{"items":[]`} {
		proxy := before(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, body) })
		var nodes *Nodes
		if err := proxy.Client.readNodes(t.Context(), &nodes); err == nil || nodes != nil {
			t.Errorf("%q: got %+v, %v", body, nodes, err)
		}
	}
}
