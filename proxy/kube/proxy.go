// Package kube is the way to the Kubernetes API server: Proxy forwards callers' requests, and Client sends the agent's
// own. Callers are authenticated before they reach a Proxy.
package kube

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httputil"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/pipeops/vm-agent/bootstrap/agentapi"
)

// Prefix is where the Kubernetes API begins. What follows it is the API server's path.
const Prefix = agentapi.KubernetesPrefix

// Proxy forwards requests below Prefix to the API server. Safe for concurrent use.
type Proxy struct {
	Client       *Client
	own          bool // callers have credentials of their own: a 401 is about theirs
	buffers      *buffers
	watchBuffers *buffers // small ones: watches are many and mostly silent
	log          *slog.Logger

	Drain    context.CancelFunc // ends all watches, also later ones, between two events; it does not wait for that
	draining context.Context    // ends with Drain
}

// NewProxy returns a proxy to client's API server. own says that the client has no credential: callers have. It starts
// nothing.
func NewProxy(client *Client, own bool, log *slog.Logger) *Proxy {
	p := &Proxy{Client: client, own: own, buffers: newBuffers(32 << 10), watchBuffers: newBuffers(4 << 10), log: log}
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

// Serve answers a request below Prefix. It returns the status with which it refused to forward it; 0 if it did forward.
func (p *Proxy) Serve(w http.ResponseWriter, r *http.Request, req *Request) (refused int) {
	if code, why := admit(r); code != 0 {
		if code == http.StatusMethodNotAllowed {
			w.Header().Set("Allow", strings.Join(Methods, ", "))
		}
		WriteStatus(w, r, code, why, 0)
		return code
	}
	f := &forward{Proxy: p, Request: req}
	ahead := int64(UploadWindow) // of the body, over HTTP/2
	if r.ContentLength > 0 {
		ahead = min(ahead, r.ContentLength)
	}
	switch body := req.Body; {
	case body == nil:
	case 0 < r.ContentLength && r.ContentLength <= maxRepeatable && req.Reserve(r.ContentLength, true):
		if err := body.keep(r); err != nil {
			writeBodyError(w, r, err)
			return 0
		}
	case r.ProtoMajor == 2 && !req.Reserve(ahead, false):
		WriteStatus(w, r, http.StatusTooManyRequests, "too many large bodies are being received: try again", 1)
		return http.StatusTooManyRequests
	default:
		body.stream(w, r)
		f.streamed = body
	}
	rp := &httputil.ReverseProxy{
		Rewrite: f.rewrite, Transport: p.Client, ModifyResponse: f.checkAnswer,
		ErrorHandler: f.fail, ErrorLog: slog.NewLogLogger(p.log.Handler(), slog.LevelDebug), BufferPool: p.buffers,
	}
	if req.Verb == "watch" {
		r.Header.Set("Accept-Encoding", "identity") // Kubernetes 1.37 compresses some watches: an event's end is not seen
		rp.BufferPool = p.watchBuffers
	}
	rp.ServeHTTP(w, r)
	if r.ProtoMajor == 1 { // HTTP/2 has streams that it can reset
		f.streamed.afterAnswer(w.Header())
	}
	return 0
}

// Request is a caller's request below Prefix: what decides how it is forwarded.
type Request struct {
	Description

	// Identity holds the headers that say to the API server who calls. Where it has none, the client's credential does.
	Identity http.Header
	Body     *Body // nil: there is none
	Reserve  Reserve
	Answered bool // the answer is the API server's own, not the agent's

	accepted atomic.Bool // the API server has surely accepted the credential
	watch    atomic.Pointer[watchBody]
}

// Accepted reports whether the API server has answered in a way that shows that it accepts the credential.
func (r *Request) Accepted() bool { return r.accepted.Load() }

// EndWatch ends a watch between two events, or else returns false. The caller gets an event that holds why, unless its
// code is 0.
func (r *Request) EndWatch(why *Ended) bool {
	body := r.watch.Load()
	if body != nil {
		body.end(why)
	}
	return body != nil
}

// forward is a request that is being forwarded.
type forward struct {
	*Proxy
	*Request

	streamed *Body // the body, unless there is none, or it was kept
}

// rewrite addresses the request to the API server and replaces all that says who calls by the request's Identity. It
// runs after the hop-by-hop headers are removed, so that a caller's "Connection: Authorization" removes nothing that is
// set here. The transport adds the agent's credential, but only where there is none.
func (f *forward) rewrite(pr *httputil.ProxyRequest) {
	out, target := pr.Out, f.Client.target
	out.URL.Scheme, out.URL.Host, out.Host = target.Scheme, target.Host, ""
	path := cmp.Or(strings.TrimPrefix(pr.In.URL.EscapedPath(), Prefix), "/") // byte for byte, as the query
	out.URL.RawPath = strings.TrimRight(target.EscapedPath(), "/") + path
	out.URL.Path, _ = url.PathUnescape(out.URL.RawPath) // valid: both parts were parsed
	out.URL.RawQuery = pr.In.URL.RawQuery               // ReverseProxy has normalized it

	RemoveCaller(out.Header)
	protocols := slices.DeleteFunc(ListOf(out, "Sec-Websocket-Protocol"), func(protocol string) bool {
		return protocol == "" || hasPrefixFold(protocol, TokenProtocol)
	})
	out.Header.Del("Sec-Websocket-Protocol")
	if len(protocols) > 0 && out.Header.Get("Upgrade") != "" {
		out.Header.Set("Sec-Websocket-Protocol", strings.Join(protocols, ", "))
	}
	// From pr.In: a caller's "Connection: X-Request-Id" has removed it from out.
	out.Header.Set("Audit-Id", pr.In.Header.Get("X-Request-Id"))
	out.Header.Del("X-Request-Id")
	maps.Copy(out.Header, f.Identity)
}

// RemoveCaller removes from a request's headers what says who calls, and what is between caller and agent alone.
func RemoveCaller(header http.Header) {
	for name := range header {
		if hasPrefixFold(name, "X-Remote-") || hasPrefixFold(name, "Impersonate-") || slices.Contains(removed, name) {
			header.Del(name)
		}
	}
}

// GateHeader carries the agent's token where Authorization is the caller's own.
const GateHeader = "Pipeops-Agent-Authorization"

var removed = []string{"Authorization", GateHeader, "Cookie", "X-Real-Ip", "Expect"} // Expect: see Body.stream

// TokenProtocol begins an element of Sec-WebSocket-Protocol that holds a token, which the API server accepts too.
// Source: k8s.io/apiserver/pkg/authentication/request/websocket.
const TokenProtocol = "base64url.bearer.authorization.k8s.io." //nolint:gosec // no secret

// checkAnswer turns the API server's 401 into an error, which becomes a 502: it refuses the agent's credential and says
// nothing about the caller's, unless the caller has one of its own. Below a subresource the 401 is forwarded: it may be
// a backend's behind services/proxy, or the kubelet's.
func (f *forward) checkAnswer(resp *http.Response) error {
	if resp.StatusCode < 100 || resp.StatusCode > 599 {
		return fmt.Errorf("its status %d is not one of HTTP", resp.StatusCode)
	}
	if !f.Reserve(HeaderMemory(resp.Header), false) {
		return errNoMemory
	}
	f.accepted.Store(resp.StatusCode < 400 || resp.StatusCode == http.StatusForbidden) // others may come before
	if resp.StatusCode == http.StatusUnauthorized && f.Subresource == "" && !f.own {
		return errCredential
	}
	if resp.StatusCode == http.StatusOK && f.Verb == "watch" {
		f.endBetweenEvents(resp)
	}
	// The API server redirects to paths from the root, which would leave the prefixes of the agent and of a gateway.
	base := strings.TrimRight(f.Client.target.EscapedPath(), "/")
	if to, ok := strings.CutPrefix(resp.Header.Get("Location"), base+"/"); ok && !strings.HasPrefix(to, "/") {
		up := strings.Count(strings.TrimPrefix(resp.Request.URL.EscapedPath(), base), "/") - 1
		resp.Header.Set("Location", "./"+strings.Repeat("../", up)+to)
	}
	f.Answered = true
	return nil
}

// fail answers for an API server that gave no valid answer. out is the request as rewritten.
func (f *forward) fail(w http.ResponseWriter, out *http.Request, err error) {
	f.Answered = false // an upgrade that the API server has accepted can still fail
	cause := context.Cause(out.Context())
	ended, _ := errors.AsType[*Ended](cause)
	switch {
	case ended != nil:
		WriteStatus(w, out, http.StatusForbidden, ended.Error(), 0)
	case cause != nil && f.streamed.late() || cause == nil && f.streamed.Failure() != nil:
		writeBodyError(w, out, f.streamed.Failure())
	case errors.Is(cause, ErrShutdown):
		// Without Retry-After: the request may have taken effect, and must not be repeated blindly.
		WriteStatus(w, out, http.StatusGatewayTimeout, cause.Error(), 0)
	case cause != nil:
		panic(http.ErrAbortHandler) // the caller has gone; to return would answer 200
	default:
		code, message := explain(f.Client.target.Host, err)
		f.log.WarnContext(out.Context(), "no answer from the API server",
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
