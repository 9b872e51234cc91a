package kube

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httputil"
	"net/url"
	"slices"
	"strings"
)

// request is a caller's request that is being answered.
type request struct {
	*Proxy
	*Description

	path    string // at the API server
	body    *Body  // nil if there is none, or it was kept
	reserve Reserve
}

// rewrite addresses the request to the API server and removes the caller's credentials. It runs after the hop-by-hop
// headers are removed, so that a caller's "Connection: Authorization" removes nothing that is set here. The transport
// adds the agent's credential, but only where there is none.
func (r *request) rewrite(pr *httputil.ProxyRequest) {
	out, target := pr.Out, r.client.target
	out.URL.Scheme, out.URL.Host, out.Host = target.Scheme, target.Host, ""
	out.URL.RawPath = strings.TrimRight(target.EscapedPath(), "/") + r.path
	out.URL.Path, _ = url.PathUnescape(out.URL.RawPath) // valid: both parts were parsed
	out.URL.RawQuery = pr.In.URL.RawQuery               // byte for byte: ReverseProxy has normalized it

	for name := range out.Header {
		if hasPrefixFold(name, "X-Remote-") ||
			slices.Contains([]string{"Authorization", "Cookie", "X-Real-Ip", "Expect"}, name) { // Expect: see Body.stream
			out.Header.Del(name)
		}
	}
	// The API server accepts a token in this list too.
	// Source: k8s.io/apiserver/pkg/authentication/request/websocket.
	protocols := slices.DeleteFunc(ListOf(out, "Sec-Websocket-Protocol"), func(protocol string) bool {
		return protocol == "" || hasPrefixFold(protocol, "base64url.bearer.authorization.k8s.io.")
	})
	out.Header.Del("Sec-Websocket-Protocol")
	if len(protocols) > 0 && out.Header.Get("Upgrade") != "" {
		out.Header.Set("Sec-Websocket-Protocol", strings.Join(protocols, ", "))
	}
	// From pr.In: a caller's "Connection: X-Request-Id" has removed it from out.
	out.Header.Set("Audit-Id", pr.In.Header.Get("X-Request-Id"))
	out.Header.Del("X-Request-Id")
}

// checkAnswer turns the API server's 401 into an error, which becomes a 502: it refuses the agent's credential, not the
// caller's. Below a subresource it is forwarded: it may be the kubelet's, or a backend's behind services/proxy.
func (r *request) checkAnswer(resp *http.Response) error {
	if resp.StatusCode < 100 || resp.StatusCode > 599 {
		return fmt.Errorf("its status %d is not one of HTTP", resp.StatusCode)
	}
	if !r.reserve(HeaderMemory(resp.Header), false) {
		return errNoMemory
	}
	if resp.StatusCode == http.StatusUnauthorized && r.Subresource == "" {
		return errCredential
	}
	if resp.StatusCode == http.StatusOK && r.Verb == "watch" {
		r.endOnDrain(resp)
	}
	return nil
}

// fail answers for an API server that gave no valid answer. out is the request as rewritten.
func (r *request) fail(w http.ResponseWriter, out *http.Request, err error) {
	cause := context.Cause(out.Context())
	switch {
	case cause != nil && r.body.late() || cause == nil && r.body.Failure() != nil:
		writeBodyError(w, out, r.body.Failure())
	case errors.Is(cause, ErrShutdown):
		// Without Retry-After: the request may have taken effect, and must not be repeated blindly.
		WriteStatus(w, out, http.StatusGatewayTimeout, cause.Error(), 0)
	case cause != nil:
		panic(http.ErrAbortHandler) // the caller has gone; to return would answer 200
	default:
		code, message := explain(r.client.target.Host, err)
		r.log.WarnContext(out.Context(), "no answer from the API server",
			"error", err, "request_id", out.Header.Get("Audit-Id"))
		WriteStatus(w, out, code, message, 0)
	}
}

// HeaderMemory returns how many bytes of memory headers use at most, ReverseProxy's copy included.
func HeaderMemory(header http.Header) int64 {
	var memory int64
	for name, values := range header {
		memory += 2 * int64(len(name)+120) // measured with short headers
		for _, value := range values {
			memory += 2 * int64(len(value)+32)
		}
	}
	return memory
}

func hasPrefixFold(s, prefix string) bool {
	return len(s) >= len(prefix) && strings.EqualFold(s[:len(prefix)], prefix)
}

// maxHeaderSize limits a request's headers and target in bytes, as HTTP/2 counts them: enough for an exec with a URL of
// 60 KB, and 200 groups. It is less than net/http reads, so that the agent's own message is sent; and less than the
// API server's 1 MiB, beyond which it closes a connection that other requests share.
const maxHeaderSize = 112 << 10

// admit returns the request's path at the API server, or, if it must not reach it, the status and text of the answer.
func admit(r *http.Request) (path string, code int, why string) {
	path, err := upstreamPath(r)
	if err != nil {
		return "", http.StatusBadRequest, "the agent refuses the request: " + err.Error()
	}
	if !slices.Contains(Methods, r.Method) {
		return "", http.StatusMethodNotAllowed,
			"the agent forwards the methods of the Kubernetes API only: " + strings.Join(Methods, ", ")
	}
	if why := forbidden(strings.TrimPrefix(r.URL.Path, Prefix)); why != "" {
		return "", http.StatusForbidden, "the agent does not forward this path: " + why
	}
	size := len(r.RequestURI)
	for name, values := range r.Header {
		if hasPrefixFold(name, "Impersonate-") {
			return "", http.StatusForbidden,
				"the agent does not forward impersonation: remove --as, --as-group and --as-uid"
		}
		for _, value := range values {
			size += len(name) + len(value) + 32 // as HTTP/2 counts
		}
	}
	if size > maxHeaderSize {
		return "", http.StatusRequestHeaderFieldsTooLarge, largeHeaders
	}
	if protocols := r.Header.Values("Upgrade"); len(protocols) > 0 && (len(protocols) > 1 ||
		!strings.EqualFold(protocols[0], "websocket") && !strings.EqualFold(protocols[0], "SPDY/3.1")) {
		return "", http.StatusBadRequest, "the agent forwards upgrades to websocket and SPDY/3.1 only"
	}
	return path, 0, ""
}

// upstreamPath returns the path below Prefix as the caller sent it, or why it is refused. A path that the agent and the
// API server could read differently is refused: what is decided here would not hold there.
func upstreamPath(r *http.Request) (string, error) {
	raw, _, _ := strings.Cut(r.RequestURI, "?")
	encoded := r.URL.EscapedPath()
	if r.Method == http.MethodConnect || !strings.HasPrefix(raw, "/") || raw != encoded {
		return "", errors.New("the request's target must be a path, encoded by the rules of RFC 3986")
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

// forbidden returns why path (decoded, below Prefix) is not forwarded, or "". With nodes/proxy a caller bypasses RBAC
// and audit, even with GET (kubernetes/kubernetes#136550). /metrics, /debug, /logs, /flagz and /statusz show the API
// server's process and host. A token made by serviceaccounts/token is valid for years, and without the agent.
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
