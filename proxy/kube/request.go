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

	body    *Body // nil if there is none, or it was kept
	reserve Reserve
}

// rewrite addresses the request to the API server and removes the caller's credentials. It runs after the hop-by-hop
// headers are removed, so that a caller's "Connection: Authorization" removes nothing that is set here. The transport
// adds the agent's credential, but only where there is none.
func (r *request) rewrite(pr *httputil.ProxyRequest) {
	out, target := pr.Out, r.client.target
	out.URL.Scheme, out.URL.Host, out.Host = target.Scheme, target.Host, ""
	path := cmp.Or(strings.TrimPrefix(pr.In.URL.EscapedPath(), Prefix), "/") // byte for byte, as the query
	out.URL.RawPath = strings.TrimRight(target.EscapedPath(), "/") + path
	out.URL.Path, _ = url.PathUnescape(out.URL.RawPath) // valid: both parts were parsed
	out.URL.RawQuery = pr.In.URL.RawQuery               // ReverseProxy has normalized it

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

// checkAnswer turns the API server's 401 into an error, which becomes a 502: it refuses the agent's credential and says
// nothing about the caller's. Below a subresource the 401 is forwarded: it may be a backend's behind services/proxy, or
// the kubelet's.
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

// HeaderMemory returns how many bytes of memory headers take at most, ReverseProxy's copy included. Measured: short
// headers cost about 120 bytes each.
func HeaderMemory(header http.Header) int64 {
	var memory int64
	for name, values := range header {
		memory += 2 * int64(len(name)+120)
		for _, value := range values {
			memory += 2 * int64(len(value)+32)
		}
	}
	return memory
}
