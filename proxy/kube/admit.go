package kube

import (
	"cmp"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"unicode"

	"k8s.io/apimachinery/pkg/fields"
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

// Description says what a request below Prefix asks for, in the terms of RBAC.
type Description struct {
	Verb        string // get, list, watch, create, update, patch, delete or deletecollection; else other
	Group       string // empty for the core group, and for requests without a resource
	Resource    string // plural; empty for discovery, /version and the like
	Subresource string
	Namespace   string // empty for resources without one, and for requests to all
	Name        string // of the object; empty for requests to a collection
	Upgrade     bool   // to another protocol
}

// Describe describes a request as the API server reads it. Where a segment is empty, the verb is other: a server in
// front of the API server may read such a path in another way.
// Source: k8s.io/apiserver/pkg/endpoints/request/requestinfo.go.
func Describe(r *http.Request) Description {
	path := strings.Trim(strings.TrimPrefix(r.URL.Path, Prefix), "/")
	d := describe(r, strings.FieldsFunc(path, func(c rune) bool { return c == '/' }))
	if strings.Contains(path, "//") && d.Subresource != "proxy" {
		d.Verb = "other"
	}
	return d
}

func describe(r *http.Request, parts []string) Description {
	isUpgrade := func(token string) bool { return strings.EqualFold(token, "upgrade") }
	d := Description{
		Verb:    cmp.Or(verbs[r.Method], "other"),
		Upgrade: r.Header.Get("Upgrade") != "" && slices.ContainsFunc(ListOf(r, "Connection"), isUpgrade), // as ReverseProxy
	}
	switch {
	case len(parts) >= 3 && parts[0] == "api":
		parts = parts[2:]
	case len(parts) >= 4 && parts[0] == "apis":
		d.Group, parts = label(parts[1]), parts[3:]
	default:
		return d
	}
	watchPath := parts[0] == "watch" && len(parts) > 1 // an old form that is still served
	if watchPath {
		parts = parts[1:]
	}
	if len(parts) > 1 && parts[0] == "namespaces" {
		d.Namespace = name(parts[1])
		if len(parts) > 2 && parts[2] != "status" && parts[2] != "finalize" {
			parts = parts[2:]
		}
	}
	d.Resource = label(parts[0])
	if len(parts) > 1 {
		d.Name = name(parts[1])
	}
	if len(parts) > 2 {
		d.Subresource = label(parts[2])
	}
	switch named := len(parts) > 1; {
	case d.Verb == "get" && (watchPath || !named && isWatch(r.URL)):
		d.Verb = "watch"
	case d.Verb == "get" && !named:
		d.Verb = "list"
	case d.Verb == "delete" && !named:
		d.Verb = "deletecollection"
	}
	if d.Name == "" && (d.Verb == "watch" || d.Verb == "list") && strings.Contains(r.URL.RawQuery, "metadata.name") {
		// RBAC takes this for the name, so that a right to one object includes to watch it.
		selector, err := fields.ParseSelector(r.URL.Query().Get("fieldSelector"))
		if exact := ""; err == nil {
			exact, _ = selector.RequiresExactMatch("metadata.name")
			d.Name = name(exact)
		}
	}
	return d
}

// ListOf returns the elements of a header that is a comma-separated list, all its lines together.
func ListOf(r *http.Request, header string) []string {
	elements := strings.Split(strings.Join(r.Header.Values(header), ","), ",")
	for i := range elements {
		elements[i] = strings.TrimSpace(elements[i])
	}
	return elements
}

// label returns s if it can be the name of a group or resource, and else "invalid": callers choose it, and it goes into
// the log.
func label(s string) string {
	if strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789.-") != "" {
		return "invalid"
	}
	return name(s)
}

// name returns s if it can be the name of an object.
func name(s string) string {
	if len(s) > 253 || strings.ContainsFunc(s, func(c rune) bool { return !unicode.IsPrint(c) }) {
		return "invalid"
	}
	return s
}

var verbs = map[string]string{
	http.MethodGet: "get", http.MethodHead: "get", http.MethodPost: "create", http.MethodPut: "update",
	http.MethodPatch: "patch", http.MethodDelete: "delete",
}
