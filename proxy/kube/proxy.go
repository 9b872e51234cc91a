// Package kube is the way to the Kubernetes API server: Proxy forwards callers' requests, and Client sends the agent's
// own. Callers are authenticated before they reach a Proxy; the API server sees the agent's credential only.
package kube

import (
	"context"
	"log/slog"
	"net/http"
	"net/http/httputil"
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
