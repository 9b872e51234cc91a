// Package kube is the reverse proxy to the Kubernetes API server. Callers are authenticated before they get
// here; from here on only the agent's own credential counts.
package kube

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httputil"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
)

// Prefix is where the Kubernetes API begins. What follows it is the API server's path.
const Prefix = "/api/k8s"

// Proxy forwards requests below Prefix to the API server, with the agent's credential in place of the caller's.
type Proxy struct {
	target  *url.URL
	lanes   *lanes
	watches watches
	rp      *httputil.ReverseProxy
	watchRP *httputil.ReverseProxy // the same, with small buffers
	log     *slog.Logger
}

// New makes a proxy to the API server of config. It tells latency the seconds from each request to the
// headers of the API server's answer.
func New(config *rest.Config, latency Observer, log *slog.Logger) (*Proxy, error) {
	config = rest.CopyConfig(config)
	config.DisableCompression = true // else Go would change bodies and their headers
	config.Timeout = 0               // watches, logs and exec have no end
	target, _, err := rest.DefaultServerUrlFor(config)
	if err != nil {
		return nil, fmt.Errorf("the API server's address %q: %w", config.Host, err)
	}
	lanes, err := newLanes(config, target, latency)
	if err != nil {
		return nil, err
	}
	p := &Proxy{target: target, log: log, lanes: lanes, watches: watches{open: map[*watchBody]struct{}{}}}
	p.rp = &httputil.ReverseProxy{
		BufferPool:     &buffers{size: 32 << 10},
		Rewrite:        p.rewrite,
		Transport:      p.lanes,
		ModifyResponse: p.modify,
		ErrorHandler:   p.fail,
		ErrorLog:       slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	forWatches := *p.rp
	forWatches.BufferPool = &buffers{size: 4 << 10} // they are many and mostly silent
	p.watchRP = &forWatches
	return p, nil
}

// Observer is what Prometheus's histograms are.
type Observer interface{ Observe(seconds float64) }

// buffers lends ReverseProxy what it copies answers with. Without it every answer, however small, costs 32 KiB.
type buffers struct {
	pool sync.Pool
	size int // bytes
}

func (b *buffers) Get() []byte {
	if buffer, ok := b.pool.Get().(*[]byte); ok {
		return *buffer
	}
	return make([]byte, b.size)
}

func (b *buffers) Put(buffer []byte) { b.pool.Put(&buffer) }

// request is what Serve has found out of a request, for those who see it later.
type request struct {
	path    string // at the API server
	body    *Body  // nil if there is none, or it was kept
	reserve Reserve
	*Description
}

type contextKey struct{}

func found(ctx context.Context) *request {
	return ctx.Value(contextKey{}).(*request) // Serve has put it there
}

// Reserve takes bytes of memory until the request is answered, and returns false if there are not as many. What
// is optional leaves some for what is not.
type Reserve func(bytes int64, optional bool) bool

// Serve answers a request below Prefix. d is what Describe says of it, and body its Body; nil if it has none.
func (p *Proxy) Serve(w http.ResponseWriter, r *http.Request, d *Description, body *Body, reserve Reserve) {
	path, ok := admit(w, r)
	if !ok {
		return
	}
	found := &request{path: path, Description: d, reserve: reserve}
	r = r.WithContext(context.WithValue(r.Context(), contextKey{}, found))
	if body != nil {
		if 0 < r.ContentLength && r.ContentLength <= maxRepeatable && reserve(r.ContentLength, true) {
			if err := keep(r, body); err != nil {
				writeBroken(w, r, err)
				return
			}
		} else {
			body.patience, found.body = uploadTimeout, body
			body.outlastAnswer()
			if r.Header.Get("Expect") != "" {
				body.begin()
			}
		}
	}
	rp := p.rp
	if d.Verb == "watch" {
		rp = p.watchRP
	}
	rp.ServeHTTP(w, r)
	found.body.afterAnswer()
}

// maxHeaderSize is the size of a request's headers and target in bytes, as HTTP/2 counts: enough for an exec whose
// command makes a URL of 60 KB, and 200 groups. It is below what net/http is told to read, so that the agent says
// itself what is wrong; and below the 1 MiB of the API server, which ends a connection that others use too.
const maxHeaderSize = 112 << 10

// maxRepeatable is the size in bytes of the bodies that are read before they are sent, so that the transport can
// send them again: an API server that stops, or balances its connections, turns away requests that it has not
// looked at (GOAWAY), and each of them would be an error else. Where memory is short they are not kept.
const maxRepeatable = 256 << 10

// How long all of a body that is kept may take, as headers may, and any other between two parts.
const keepTimeout, uploadTimeout = 32 * time.Second, time.Minute

// keep reads a small body whole.
func keep(r *http.Request, body *Body) error {
	body.Within(keepTimeout)
	data := make([]byte, r.ContentLength)
	if _, err := io.ReadFull(body, data); err != nil {
		return err
	}
	_, _ = io.Copy(io.Discard, body) // to its end, of which there is nothing left
	r.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil }
	r.Body, _ = r.GetBody()
	return nil
}

// admit returns the path at the API server, or answers a request that must not get there.
func admit(w http.ResponseWriter, r *http.Request) (path string, ok bool) {
	path, err := upstreamPath(r)
	if err != nil {
		WriteStatus(w, r, http.StatusBadRequest, metav1.StatusReasonBadRequest, "the agent refuses the request: "+err.Error(), 0)
		return "", false
	}
	if verbs[r.Method] == "" {
		w.Header().Set("Allow", methods)
		WriteStatus(w, r, http.StatusMethodNotAllowed, metav1.StatusReasonMethodNotAllowed, "the agent forwards the methods of the Kubernetes API only: "+methods, 0)
		return "", false
	}
	if why := forbidden(strings.TrimPrefix(r.URL.Path, Prefix)); why != "" {
		WriteStatus(w, r, http.StatusForbidden, metav1.StatusReasonForbidden, "the agent does not forward this path: "+why, 0)
		return "", false
	}
	size := len(r.RequestURI)
	for name, values := range r.Header {
		if hasPrefixFold(name, "Impersonate-") {
			WriteStatus(w, r, http.StatusForbidden, metav1.StatusReasonForbidden, "the agent does not forward impersonation: remove --as, --as-group and --as-uid", 0)
			return "", false
		}
		for _, value := range values {
			size += len(name) + len(value) + 32 // as HTTP/2 counts
		}
	}
	if size > maxHeaderSize {
		WriteStatus(w, r, http.StatusRequestHeaderFieldsTooLarge, reasonLargeHeaders, largeHeaders, 0)
		return "", false
	}
	if protocols := r.Header.Values("Upgrade"); len(protocols) > 0 && (len(protocols) > 1 ||
		!strings.EqualFold(protocols[0], "websocket") && !strings.EqualFold(protocols[0], "SPDY/3.1")) {
		WriteStatus(w, r, http.StatusBadRequest, metav1.StatusReasonBadRequest, "the agent forwards upgrades to websocket and SPDY/3.1 only", 0)
		return "", false
	}
	return path, true
}

// rewrite runs after the hop-by-hop headers are gone, so that a "Connection: Authorization" of the caller
// removes nothing of what is set from here on. The transports add the credential, but only where there is
// none: the caller's must go.
func (p *Proxy) rewrite(pr *httputil.ProxyRequest) {
	out := pr.Out
	out.URL.Scheme, out.URL.Host, out.Host = p.target.Scheme, p.target.Host, ""
	out.URL.RawPath = strings.TrimRight(p.target.EscapedPath(), "/") + found(pr.In.Context()).path
	out.URL.Path, _ = url.PathUnescape(out.URL.RawPath) // valid: both parts were parsed
	out.URL.RawQuery = pr.In.URL.RawQuery               // byte for byte: ReverseProxy had tidied it

	for name := range out.Header { // Expect: the caller has been told to continue
		if hasPrefixFold(name, "X-Remote-") || slices.Contains([]string{"Authorization", "Cookie", "X-Real-Ip", "Expect"}, name) {
			out.Header.Del(name)
		}
	}
	// The API server takes a token from this list too.
	if protocols := withoutTokens(out.Header.Values("Sec-Websocket-Protocol")); protocols != "" && out.Header.Get("Upgrade") != "" {
		out.Header.Set("Sec-Websocket-Protocol", protocols)
	} else {
		out.Header.Del("Sec-Websocket-Protocol")
	}
	// From the request as it came in: the caller's "Connection: X-Request-Id" has removed it from out.
	out.Header.Set("Audit-Id", pr.In.Header.Get("X-Request-Id"))
	out.Header.Del("X-Request-Id")
}

// withoutTokens drops the sub-protocols that carry a bearer token.
// Source: k8s.io/apiserver/pkg/authentication/request/websocket.
func withoutTokens(values []string) string {
	var kept []string
	for protocol := range strings.SplitSeq(strings.Join(values, ","), ",") {
		protocol = strings.TrimSpace(protocol)
		if protocol != "" && !hasPrefixFold(protocol, "base64url.bearer.authorization.k8s.io.") {
			kept = append(kept, protocol)
		}
	}
	return strings.Join(kept, ", ")
}

// modify keeps the API server's 401 from the caller, whose own credential it says nothing about. Below a
// subresource it may be another's 401, such as a dashboard's behind services/proxy or the kubelet's.
func (p *Proxy) modify(resp *http.Response) error {
	request := found(resp.Request.Context())
	if resp.StatusCode < 100 || resp.StatusCode > 599 {
		return fmt.Errorf("its status is %d, which is none of HTTP", resp.StatusCode)
	}
	if !request.reserve(HeaderMemory(resp.Header), false) {
		return errNoMemory
	}
	if resp.StatusCode == http.StatusUnauthorized && request.Subresource == "" {
		return errCredential
	}
	if resp.StatusCode == http.StatusOK && request.Verb == "watch" {
		p.watches.track(resp)
	}
	return nil
}

// ErrShutdown is the cause with which a request's context ends when the agent stops before the API server
// has answered.
var ErrShutdown = errors.New("the agent has stopped before the Kubernetes API server answered: look whether what you asked for was done, and try again")

// fail answers for an API server that did not. r is the request as rewritten.
func (p *Proxy) fail(w http.ResponseWriter, r *http.Request, err error) {
	body := found(r.Context()).body
	if r.Context().Err() != nil && body.late() {
		writeBroken(w, r, body.Failure())
		return
	}
	switch cause := context.Cause(r.Context()); {
	case errors.Is(cause, ErrShutdown):
		// No Retry-After: it may have been done, and once may be enough.
		WriteStatus(w, r, http.StatusGatewayTimeout, metav1.StatusReasonTimeout, cause.Error(), 0)
		return
	case cause != nil:
		panic(http.ErrAbortHandler) // the caller has gone; to return would be to answer 200
	}
	if err := body.Failure(); err != nil {
		writeBroken(w, r, err)
		return
	}
	code, reason, message := explain(p.target.Host, err)
	p.log.WarnContext(r.Context(), "no answer from the API server", "error", err, "request_id", r.Header.Get("Audit-Id"))
	WriteStatus(w, r, code, reason, message, 0)
}

// Check asks the API server whether it is ready, which depends on its storage too. A credential that may not ask
// that is accepted all the same.
func (p *Proxy) Check(ctx context.Context) error {
	err := p.get(ctx, "/readyz", func(io.Reader) error { return nil })
	if hasCode(err, http.StatusForbidden) || hasCode(err, http.StatusNotFound) {
		return nil
	}
	return err
}

// HeaderMemory returns how many bytes of memory headers take at most, with the copy that ReverseProxy makes.
// Measured: short ones cost about 120 bytes each.
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

func hasPrefixFold(s, prefix string) bool {
	return len(s) >= len(prefix) && strings.EqualFold(s[:len(prefix)], prefix)
}
