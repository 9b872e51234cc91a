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

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/rest"

	"github.com/pipeops/vm-agent/bootstrap/agentapi"
)

// Prefix is where the Kubernetes API begins. What follows it is the API server's path.
const Prefix = agentapi.KubernetesPrefix

// Proxy forwards requests below Prefix to the API server, with the agent's credential in place of the caller's.
type Proxy struct {
	target       *url.URL
	lanes        *lanes
	buffers      buffers
	watchBuffers buffers // small ones: watches are many and mostly silent
	log          *slog.Logger

	Drain    context.CancelFunc // ends all watches between two events, those to come included; it does not wait
	draining context.Context    // ends with Drain
}

// New makes a proxy to the API server of config. It tells latency the seconds from each request to the
// headers of the API server's answer.
func New(config *rest.Config, latency func(seconds float64), log *slog.Logger) (*Proxy, error) {
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
	p := &Proxy{target: target, lanes: lanes, buffers: buffers{size: 32 << 10}, watchBuffers: buffers{size: 4 << 10}, log: log}
	p.draining, p.Drain = context.WithCancel(context.Background())
	return p, nil
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

// request is a request that is being answered.
type request struct {
	*Proxy
	*Description

	path    string // at the API server
	body    *Body  // nil if there is none, or it was kept
	reserve Reserve
}

// Reserve takes bytes of memory until the request is answered, and returns false if there are not as many. What
// is optional leaves some for what is not.
type Reserve func(bytes int64, optional bool) bool

// Serve answers a request below Prefix. d is what Describe says of it, and body its Body; nil if it has none.
func (p *Proxy) Serve(w http.ResponseWriter, r *http.Request, d *Description, body *Body, reserve Reserve) {
	path, code, why := admit(r)
	if code != 0 {
		if code == http.StatusMethodNotAllowed {
			w.Header().Set("Allow", strings.Join(Methods, ", "))
		}
		WriteStatus(w, r, code, why, 0)
		return
	}
	req := &request{Proxy: p, Description: d, path: path, reserve: reserve}
	if body != nil {
		if 0 < r.ContentLength && r.ContentLength <= maxRepeatable && reserve(r.ContentLength, true) {
			if err := keep(r, body); err != nil {
				writeBroken(w, r, err)
				return
			}
		} else {
			body.patience, req.body = uploadTimeout, body
			// Else net/http closes the body when the answer begins. The transport may still read from it then, takes that
			// for a failure, and breaks off the rest of the answer. afterAnswer must follow.
			_ = body.control.EnableFullDuplex()
			if r.Header.Get("Expect") != "" && r.ProtoAtLeast(1, 1) {
				// Else net/http tells the caller to continue when the transport, elsewhere, first reads the body: it would
				// race with a 1xx of the API server on the way back.
				w.WriteHeader(http.StatusContinue)
			}
		}
	}
	rp := &httputil.ReverseProxy{
		BufferPool:     &p.buffers,
		Rewrite:        req.rewrite,
		Transport:      p.lanes,
		ModifyResponse: req.modify,
		ErrorHandler:   req.fail,
		ErrorLog:       slog.NewLogLogger(p.log.Handler(), slog.LevelDebug),
	}
	if d.Verb == "watch" {
		rp.BufferPool = &p.watchBuffers
	}
	rp.ServeHTTP(w, r)
	req.body.afterAnswer(w.Header())
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

// admit returns the path at the API server, or, for a request that must not get there, the code and the text of the
// answer.
func admit(r *http.Request) (path string, code int, why string) {
	path, err := upstreamPath(r)
	if err != nil {
		return "", http.StatusBadRequest, "the agent refuses the request: " + err.Error()
	}
	if !slices.Contains(Methods, r.Method) {
		return "", http.StatusMethodNotAllowed, "the agent forwards the methods of the Kubernetes API only: " + strings.Join(Methods, ", ")
	}
	if why := forbidden(strings.TrimPrefix(r.URL.Path, Prefix)); why != "" {
		return "", http.StatusForbidden, "the agent does not forward this path: " + why
	}
	size := len(r.RequestURI)
	for name, values := range r.Header {
		if hasPrefixFold(name, "Impersonate-") {
			return "", http.StatusForbidden, "the agent does not forward impersonation: remove --as, --as-group and --as-uid"
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

// rewrite runs after the hop-by-hop headers are gone, so that a "Connection: Authorization" of the caller
// removes nothing of what is set from here on. The transports add the credential, but only where there is
// none: the caller's must go.
func (r *request) rewrite(pr *httputil.ProxyRequest) {
	out := pr.Out
	out.URL.Scheme, out.URL.Host, out.Host = r.target.Scheme, r.target.Host, ""
	out.URL.RawPath = strings.TrimRight(r.target.EscapedPath(), "/") + r.path
	out.URL.Path, _ = url.PathUnescape(out.URL.RawPath) // valid: both parts were parsed
	out.URL.RawQuery = pr.In.URL.RawQuery               // byte for byte: ReverseProxy had tidied it

	for name := range out.Header { // Expect: the caller has been told to continue
		if hasPrefixFold(name, "X-Remote-") || slices.Contains([]string{"Authorization", "Cookie", "X-Real-Ip", "Expect"}, name) {
			out.Header.Del(name)
		}
	}
	// The API server takes a token from this list too. Source: k8s.io/apiserver/pkg/authentication/request/websocket.
	protocols := slices.DeleteFunc(ListOf(out, "Sec-Websocket-Protocol"), func(protocol string) bool {
		return protocol == "" || hasPrefixFold(protocol, "base64url.bearer.authorization.k8s.io.")
	})
	out.Header.Del("Sec-Websocket-Protocol")
	if len(protocols) > 0 && out.Header.Get("Upgrade") != "" {
		out.Header.Set("Sec-Websocket-Protocol", strings.Join(protocols, ", "))
	}
	// From the request as it came in: the caller's "Connection: X-Request-Id" has removed it from out.
	out.Header.Set("Audit-Id", pr.In.Header.Get("X-Request-Id"))
	out.Header.Del("X-Request-Id")
}

// modify keeps the API server's 401 from the caller, whose own credential it says nothing about. Below a
// subresource it may be another's 401, such as a dashboard's behind services/proxy or the kubelet's.
func (r *request) modify(resp *http.Response) error {
	if resp.StatusCode < 100 || resp.StatusCode > 599 {
		return fmt.Errorf("its status is %d, which is none of HTTP", resp.StatusCode)
	}
	if !r.reserve(HeaderMemory(resp.Header), false) {
		return errNoMemory
	}
	if resp.StatusCode == http.StatusUnauthorized && r.Subresource == "" {
		return errCredential
	}
	if resp.StatusCode == http.StatusOK && r.Verb == "watch" {
		r.track(resp)
	}
	return nil
}

// ErrShutdown is the cause with which a request's context ends when the agent stops before the API server has answered.
var ErrShutdown = errors.New("the agent has stopped before the Kubernetes API server answered: look whether what you asked for was done, and try again")

// fail answers for an API server that did not. out is the request as rewritten.
func (r *request) fail(w http.ResponseWriter, out *http.Request, err error) {
	cause := context.Cause(out.Context())
	switch {
	case cause != nil && r.body.late() || cause == nil && r.body.Failure() != nil:
		writeBroken(w, out, r.body.Failure())
	case errors.Is(cause, ErrShutdown):
		// No Retry-After: it may have been done, and once may be enough.
		WriteStatus(w, out, http.StatusGatewayTimeout, cause.Error(), 0)
	case cause != nil:
		panic(http.ErrAbortHandler) // the caller has gone; to return would be to answer 200
	default:
		code, message := explain(r.target.Host, err)
		r.log.WarnContext(out.Context(), "no answer from the API server", "error", err, "request_id", out.Header.Get("Audit-Id"))
		WriteStatus(w, out, code, message, 0)
	}
}

// Check asks the API server whether it is ready, which depends on its storage too. A credential that may not ask
// that is accepted all the same.
func (p *Proxy) Check(ctx context.Context) error {
	err := p.call(ctx, http.MethodGet, "/readyz", nil, func(io.Reader) error { return nil })
	if apierrors.IsForbidden(err) || apierrors.IsNotFound(err) {
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
