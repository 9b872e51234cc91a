package kube

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
)

// Methods are the HTTP methods of the Kubernetes API.
var Methods = []string{http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodPatch,
	http.MethodDelete, http.MethodOptions}

func hasPrefixFold(s, prefix string) bool {
	return len(s) >= len(prefix) && strings.EqualFold(s[:len(prefix)], prefix)
}

// maxHeaderSize limits a request's headers and target in bytes, as HTTP/2 counts them: enough for an exec with a URL of
// 60 KB, and 200 groups. It is less than net/http reads, so that the agent's own message is sent; and less than the
// API server's 1 MiB, beyond which it closes a connection that other requests share.
const maxHeaderSize = 112 << 10

// admit returns the status and the message of the answer to a request that must not reach the API server; else 0.
func admit(r *http.Request) (code int, why string) {
	if why := ambiguous(r); why != "" {
		return http.StatusBadRequest, "the agent refuses the request: " + why
	}
	if !slices.Contains(Methods, r.Method) {
		return http.StatusMethodNotAllowed,
			"the agent forwards the methods of the Kubernetes API only: " + strings.Join(Methods, ", ")
	}
	if why := forbidden(strings.TrimPrefix(r.URL.Path, Prefix)); why != "" {
		return http.StatusForbidden, "the agent does not forward this path: " + why
	}
	size := len(r.RequestURI)
	for name, values := range r.Header {
		for _, value := range values {
			size += len(name) + len(value) + 32 // as HTTP/2 counts
		}
	}
	if size > maxHeaderSize {
		return http.StatusRequestHeaderFieldsTooLarge, largeHeaders
	}
	if protocols := r.Header.Values("Upgrade"); len(protocols) > 0 && (len(protocols) > 1 ||
		!strings.EqualFold(protocols[0], "websocket") && !strings.EqualFold(protocols[0], "SPDY/3.1")) {
		return http.StatusBadRequest, "the agent forwards upgrades to websocket and SPDY/3.1 only"
	}
	return 0, ""
}

// ambiguous returns why the agent and the API server could read the path differently, or "". Such a path is refused:
// what is decided here would not hold there.
func ambiguous(r *http.Request) string {
	raw, _, _ := strings.Cut(r.RequestURI, "?")
	if r.Method == http.MethodConnect || !strings.HasPrefix(raw, "/") || raw != r.URL.EscapedPath() {
		return "the request's target must be a path, encoded by the rules of RFC 3986"
	}
	if strings.ContainsAny(r.URL.Path, "\\\x00") {
		return "the path holds a backslash or NUL"
	}
	for segment := range strings.SplitSeq(r.URL.Path, "/") {
		if segment == "." || segment == ".." {
			return fmt.Sprintf("the path holds the segment %q", segment)
		}
	}
	return ""
}

// forbidden returns why path (decoded, below Prefix) is not forwarded, or "". nodes/proxy runs commands even with GET
// (kubernetes/kubernetes#136550). A token made by serviceaccounts/token can be valid for years. /metrics, /debug,
// /logs, /flagz and /statusz show the API server's process and host.
func forbidden(path string) string {
	// Without empty segments: the API server serves nothing at a path that has them, but a server in front of it may.
	parts := slices.DeleteFunc(strings.Split(path, "/"), func(s string) bool { return s == "" })
	core := len(parts) >= 5 && parts[0] == "api"
	switch {
	case core && parts[2] == "nodes" && parts[4] == "proxy":
		return "nodes/proxy reaches every pod on the node past RBAC and audit: use pods/exec, pods/log or pods/portforward"
	case core && len(parts) >= 7 && parts[2] == "namespaces" && parts[4] == "serviceaccounts" && parts[6] == "token":
		return "serviceaccounts/token makes a credential that outlives the agent: create tokens in the cluster"
	case len(parts) >= 1 && slices.Contains([]string{"metrics", "debug", "logs", "flagz", "statusz"}, parts[0]):
		return "/" + parts[0] + " is the API server's own: read it in the cluster"
	}
	return ""
}
