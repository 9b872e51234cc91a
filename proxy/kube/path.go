package kube

import (
	"cmp"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
)

// upstreamPath returns the part of the request's path that follows Prefix, still encoded, byte for byte as
// the caller sent it; or an error that says why it is refused. A path that this proxy and the API server
// could read differently must not get through: what is decided here would then not hold there.
func upstreamPath(r *http.Request) (string, error) {
	raw, _, _ := strings.Cut(r.RequestURI, "?")
	encoded := r.URL.EscapedPath()
	if r.Method == http.MethodConnect || !strings.HasPrefix(raw, "/") || raw != encoded {
		return "", errors.New("the request's target must be a path, and encoded as RFC 3986 asks")
	}
	decoded := r.URL.Path
	if strings.ContainsAny(decoded, "\\\x00") {
		return "", errors.New("the path holds a backslash or NUL")
	}
	for segment := range strings.SplitSeq(decoded, "/") {
		if segment == "." || segment == ".." {
			return "", fmt.Errorf("the path holds the segment %q", segment)
		}
	}
	return cmp.Or(strings.TrimPrefix(encoded, Prefix), "/"), nil
}

// forbidden says why path (decoded, below Prefix) is closed, or "" if it is open. With nodes/proxy a caller
// gets past RBAC and audit to every pod of the node, even with GET (kubernetes/kubernetes#136550); /metrics,
// /debug, /logs, /flagz and /statusz are of the API server's process and host, not of the cluster. A token that
// serviceaccounts/token makes is good for years, and without the agent.
func forbidden(path string) string {
	// Empty segments are left out. The API server leaves them in, and so serves nothing at such a path; whatever
	// else stands behind it may.
	parts := slices.DeleteFunc(strings.Split(path, "/"), func(s string) bool { return s == "" })
	switch {
	case len(parts) >= 5 && parts[0] == "api" && parts[2] == "nodes" && parts[4] == "proxy":
		return "nodes/proxy reaches every pod on the node past RBAC and audit: use pods/exec, pods/log or pods/portforward"
	case len(parts) >= 7 && parts[0] == "api" && parts[2] == "namespaces" && parts[4] == "serviceaccounts" && parts[6] == "token":
		return "serviceaccounts/token makes a credential that outlives the agent and its owner's control over it: create tokens in the cluster"
	case len(parts) >= 1 && slices.Contains([]string{"metrics", "debug", "logs", "flagz", "statusz"}, parts[0]):
		return "/" + parts[0] + " is the API server's own: read it in the cluster"
	}
	return ""
}
