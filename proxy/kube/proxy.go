// Package kube is the reverse proxy to the Kubernetes API server. Callers are authenticated before they get
// here; from here on only the agent's own credential counts.
package kube

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptrace"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/client-go/rest"
)

// Prefix is where the Kubernetes API begins. What follows it is the API server's path.
const Prefix = "/api/k8s"

// Proxy forwards requests below Prefix to the API server, with the agent's credential in place of the caller's.
type Proxy struct {
	target  *url.URL
	lanes   lanes
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
	p := &Proxy{target: target, log: log, lanes: lanes{latency: latency, connecting: make(chan struct{}, 1)}, watches: watches{open: map[*watchBody]struct{}{}}}
	// Said, although it is the default: where a configuration says nothing of TLS, client-go hands out
	// http.DefaultTransport, which knows nothing of DisableCompression.
	config.NextProtos = []string{"h2", "http/1.1"}
	if p.lanes.calls, err = rest.TransportFor(config); err != nil {
		return nil, fmt.Errorf("the connection to the API server: %w", err)
	}
	// HTTP/2 has no upgrades: exec, attach and port-forward need connections of their own.
	config.NextProtos = []string{"http/1.1"}
	if p.lanes.upgrades, err = rest.TransportFor(config); err != nil {
		return nil, fmt.Errorf("the connection to the API server: %w", err)
	}
	p.rp = &httputil.ReverseProxy{
		BufferPool:     &buffers{size: 32 << 10},
		Rewrite:        p.rewrite,
		Transport:      &p.lanes,
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

// lanes sends upgrades over HTTP/1.1 and all other requests over HTTP/2.
type lanes struct {
	calls, upgrades http.RoundTripper
	latency         Observer
	connecting      chan struct{} // holds the one that looks for a connection
	http1           atomic.Bool   // the API server speaks no HTTP/2: nothing is shared
}

func (l *lanes) RoundTrip(r *http.Request) (*http.Response, error) {
	start := time.Now()
	send := l.call
	if r.Header.Get("Upgrade") != "" {
		send = l.upgrades.RoundTrip
	}
	resp, err := send(r)
	if err != nil && worthAnother(r, err) {
		resp, err = send(r)
	}
	if err == nil {
		l.latency.Observe(time.Since(start).Seconds())
	}
	return resp, err
}

// call sends a request that is no upgrade.
//
// One request at a time looks for a connection. A connection cannot be shared before it is made: without this,
// two thousand watches that begin at once, as after a restart of the API server, dialled five thousand.
func (l *lanes) call(r *http.Request) (*http.Response, error) {
	if l.http1.Load() {
		return l.calls.RoundTrip(r)
	}
	release := l.queue(r.Context())
	defer release()
	resp, err := l.calls.RoundTrip(r.WithContext(httptrace.WithClientTrace(r.Context(), &httptrace.ClientTrace{
		GotConn: func(httptrace.GotConnInfo) { release() },
	})))
	if err == nil && resp.ProtoMajor == 1 {
		l.http1.Store(true)
	}
	return resp, err
}

// queue waits for its turn, and returns what lets the next have it. Whoever has to dial lets the next have it
// after a moment, even if the dial hangs: the next may find a connection with room. Nobody waits for long.
func (l *lanes) queue(ctx context.Context) (release func()) {
	select {
	case l.connecting <- struct{}{}:
	default:
		patience := time.NewTimer(5 * time.Second)
		defer patience.Stop()
		select {
		case l.connecting <- struct{}{}:
		case <-patience.C:
			return func() {}
		case <-ctx.Done():
			return func() {}
		}
	}
	leave := sync.OnceFunc(func() { <-l.connecting })
	moment := time.AfterFunc(100*time.Millisecond, leave)
	return func() {
		moment.Stop()
		leave()
	}
}

// worthAnother says whether a connection has died under a request that can be sent again on a new one: another
// API server behind the same address may answer. client-go does the same where nothing is between.
// Source: k8s.io/client-go/rest/request.go, isErrRetryableFunc.
func worthAnother(r *http.Request, err error) bool {
	return (r.Method == http.MethodGet || r.Method == http.MethodHead) && r.Body == nil && r.Header.Get("Upgrade") == "" &&
		r.Context().Err() == nil && (utilnet.IsHTTP2ConnectionLost(err) || utilnet.IsConnectionReset(err) || utilnet.IsProbableEOF(err))
}

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
	path string // at the API server
	body *callerBody
	*Description
}

// callerBody remembers whether the caller's body could be read, so that the API server does not get the
// blame for one that could not.
type callerBody struct {
	io.ReadCloser

	broken atomic.Bool
}

func (b *callerBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		b.broken.Store(true)
	}
	return n, err
}

// begin waits for the first byte. With it net/http tells the caller to continue; were that left to the
// transport, which reads the body elsewhere, it would race with a 1xx of the API server on the way back.
func (b *callerBody) begin() {
	reader := bufio.NewReader(b.ReadCloser)
	_, _ = reader.Peek(1) // an error comes again with the first Read
	b.ReadCloser = struct {
		io.Reader
		io.Closer
	}{reader, b.ReadCloser}
}

type contextKey struct{}

func found(ctx context.Context) *request {
	return ctx.Value(contextKey{}).(*request) // Serve has put it there
}

// Serve answers a request below Prefix. d is what Describe says of it.
func (p *Proxy) Serve(w http.ResponseWriter, r *http.Request, d *Description) {
	path, ok := admit(w, r)
	if !ok {
		return
	}
	found := &request{path: path, Description: d}
	r = r.WithContext(context.WithValue(r.Context(), contextKey{}, found))
	if r.Body != nil && r.Body != http.NoBody {
		if 0 < r.ContentLength && r.ContentLength <= maxRepeatable {
			if !repeatable(r) {
				WriteStatus(w, r, http.StatusBadRequest, metav1.StatusReasonBadRequest, brokenBody, 0)
				return
			}
		} else {
			found.body = &callerBody{ReadCloser: r.Body}
			if r.Header.Get("Expect") != "" {
				found.body.begin()
			}
			r.Body = found.body
		}
	}
	if d.Verb == "watch" {
		p.watchRP.ServeHTTP(w, r)
		return
	}
	p.rp.ServeHTTP(w, r)
}

// maxHeaderSize is less than the 1 MiB that the API server allows, by what is added here. A server that gets
// more closes the connection, and with it ends the watches of others.
const maxHeaderSize = 1<<20 - 64<<10

// maxRepeatable is the size in bytes of the bodies that are read before they are sent, so that the transport can
// send them again: an API server that stops, or balances its connections, turns away requests that it has not
// looked at (GOAWAY), and each of them would be an error else.
const maxRepeatable = 256 << 10

const brokenBody = "the body of the request cannot be read: its length or its chunks are wrong, or it has ended early"

// repeatable reads the whole body.
func repeatable(r *http.Request) bool {
	data := make([]byte, r.ContentLength)
	if _, err := io.ReadFull(r.Body, data); err != nil {
		return false
	}
	_, _ = io.Copy(io.Discard, r.Body) // to its end, of which there is nothing left
	r.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil }
	r.Body, _ = r.GetBody()
	return true
}

// admit returns the path at the API server, or answers a request that must not get there.
func admit(w http.ResponseWriter, r *http.Request) (path string, ok bool) {
	path, err := upstreamPath(r)
	if err != nil {
		WriteStatus(w, r, http.StatusBadRequest, metav1.StatusReasonBadRequest, "the agent refuses the request: "+err.Error(), 0)
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

	for name := range out.Header {
		if hasPrefixFold(name, "X-Remote-") {
			out.Header.Del(name)
		}
	}
	out.Header.Del("Authorization")
	out.Header.Del("Cookie")
	out.Header.Del("X-Real-Ip")
	out.Header.Del("Expect") // the caller has been told to continue
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
	switch cause := context.Cause(r.Context()); {
	case errors.Is(cause, ErrShutdown):
		// No Retry-After: it may have been done, and once may be enough.
		WriteStatus(w, r, http.StatusGatewayTimeout, metav1.StatusReasonTimeout, cause.Error(), 0)
		return
	case cause != nil:
		panic(http.ErrAbortHandler) // the caller has gone; to return would be to answer 200
	}
	if body := found(r.Context()).body; body != nil && body.broken.Load() {
		WriteStatus(w, r, http.StatusBadRequest, metav1.StatusReasonBadRequest, brokenBody, 0)
		return
	}
	code, reason, message := explain(p.target.Host, err)
	p.log.WarnContext(r.Context(), "no answer from the API server", "error", err, "request_id", r.Header.Get("Audit-Id"))
	WriteStatus(w, r, code, reason, message, 0)
}

// Check asks the API server for its list of versions, which every accepted credential may read.
func (p *Proxy) Check(ctx context.Context) error {
	return p.get(ctx, "/api", func(io.Reader) error { return nil })
}

func hasPrefixFold(s, prefix string) bool {
	return len(s) >= len(prefix) && strings.EqualFold(s[:len(prefix)], prefix)
}
