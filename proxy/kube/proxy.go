// Package kube is the way to the Kubernetes API server: Proxy forwards callers' requests, and Client sends the agent's
// own. Callers are authenticated before they reach a Proxy; the API server sees the agent's credential only.
package kube

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httputil"
	"net/url"
	"slices"
	"strings"
	"sync"

	"github.com/pipeops/vm-agent/bootstrap/agentapi"
)

// Prefix is where the Kubernetes API begins. What follows it is the API server's path.
const Prefix = agentapi.KubernetesPrefix

// Proxy forwards requests below Prefix to the API server, with the agent's credential in place of the caller's.
// Safe for concurrent use.
type Proxy struct {
	client       *Client
	buffers      *buffers
	watchBuffers *buffers // small ones: watches are many and mostly silent
	log          *slog.Logger

	Drain    context.CancelFunc // ends all watches, also later ones, between two events; it does not wait for that
	draining context.Context    // ends with Drain
}

// NewProxy returns a proxy to client's API server. It starts nothing.
func NewProxy(client *Client, log *slog.Logger) *Proxy {
	p := &Proxy{client: client, buffers: newBuffers(32 << 10), watchBuffers: newBuffers(4 << 10), log: log}
	p.draining, p.Drain = context.WithCancel(context.Background())
	return p
}

// buffers lends ReverseProxy the buffers that it copies answers with. Without it each answer, however small, would
// cost 32 KiB.
type buffers struct{ sync.Pool }

func newBuffers(size int) *buffers {
	return &buffers{sync.Pool{New: func() any { return new(make([]byte, size)) }}}
}

func (b *buffers) Get() []byte { return *b.Pool.Get().(*[]byte) }

func (b *buffers) Put(buffer []byte) { b.Pool.Put(&buffer) }

// Reserve takes bytes of memory until the request is answered, and returns false if there is not enough. An optional
// reservation leaves some memory for those that are not.
type Reserve func(bytes int64, optional bool) bool

// Serve answers a request below Prefix. d is its Description, and body its Body, nil if it has none.
func (p *Proxy) Serve(w http.ResponseWriter, r *http.Request, d *Description, body *Body, reserve Reserve) {
	if code, why := admit(r); code != 0 {
		if code == http.StatusMethodNotAllowed {
			w.Header().Set("Allow", strings.Join(Methods, ", "))
		}
		WriteStatus(w, r, code, why, 0)
		return
	}
	req := &request{Proxy: p, Description: d, reserve: reserve}
	switch {
	case body == nil:
	case 0 < r.ContentLength && r.ContentLength <= maxRepeatable && reserve(r.ContentLength, true):
		if err := body.keep(r); err != nil {
			writeBodyError(w, r, err)
			return
		}
	default:
		body.stream(w, r)
		req.body = body
	}
	rp := &httputil.ReverseProxy{
		BufferPool:     p.buffers,
		Rewrite:        req.rewrite,
		Transport:      p.client,
		ModifyResponse: req.checkAnswer,
		ErrorHandler:   req.fail,
		ErrorLog:       slog.NewLogLogger(p.log.Handler(), slog.LevelDebug),
	}
	if d.Verb == "watch" {
		rp.BufferPool = p.watchBuffers
	}
	rp.ServeHTTP(w, r)
	req.body.afterAnswer(w.Header())
}

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
