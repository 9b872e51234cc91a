// Package kube is the way to the Kubernetes API server: Proxy forwards callers' requests, and Client sends the agent's
// own. Callers are authenticated before they reach a Proxy.
package kube

import (
	"context"
	"log"
	"log/slog"
	"net/http"
	"net/http/httputil"
	"strings"
	"sync"

	"github.com/pipeops/vm-agent/bootstrap/agentapi"
)

// Prefix is where the Kubernetes API begins. What follows it is the API server's path.
const Prefix = agentapi.KubernetesPrefix

// Proxy forwards requests below Prefix to the API server. Safe for concurrent use.
type Proxy struct {
	client       *Client
	own          bool // callers have credentials of their own: a 401 is about theirs
	buffers      *buffers
	watchBuffers *buffers // small ones: watches are many and mostly silent
	log          *slog.Logger
	errorLog     *log.Logger // of ReverseProxy

	Drain    context.CancelFunc // ends all watches, also later ones, between two events; it does not wait for that
	draining context.Context    // ends with Drain
}

// NewProxy returns a proxy to client's API server. own says that the client has no credential: callers have. It starts
// nothing.
func NewProxy(client *Client, own bool, log *slog.Logger) *Proxy {
	p := &Proxy{client: client, own: own, buffers: newBuffers(32 << 10), watchBuffers: newBuffers(4 << 10), log: log}
	p.errorLog = slog.NewLogLogger(log.Handler(), slog.LevelDebug)
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
		BufferPool:     p.buffers,
		Rewrite:        f.rewrite,
		Transport:      p.client,
		ModifyResponse: f.checkAnswer,
		ErrorHandler:   f.fail,
		ErrorLog:       p.errorLog,
	}
	if req.Verb == "watch" {
		rp.BufferPool = p.watchBuffers
	}
	rp.ServeHTTP(w, r)
	if r.ProtoMajor == 1 { // HTTP/2 has streams that it can reset
		f.streamed.afterAnswer(w.Header())
	}
	return 0
}
