package main

import (
	"net/http"
	"sync"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/pipeops/vm-agent/proxy/kube"
)

// gate counts what runs, and lets nothing in once it is closed.
type gate struct {
	mu      sync.Mutex
	running int
	closed  bool
	empty   chan struct{} // closed when the gate is and nothing runs any more
}

func newGate() *gate { return &gate{empty: make(chan struct{})} }

// wrap lets requests through to next while the gate is open.
func (g *gate) wrap(next http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if !g.enter() {
			kube.WriteStatus(w, r, http.StatusServiceUnavailable, metav1.StatusReasonServiceUnavailable,
				"this instance of the agent is shutting down: try again, the next one will answer", 1)
			return
		}
		defer g.leave()
		next(w, r)
	}
}

func (g *gate) enter() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return false
	}
	g.running++
	return true
}

func (g *gate) leave() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.running--
	if g.closed && g.running == 0 {
		close(g.empty)
	}
}

// close lets nothing more in.
func (g *gate) close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.closed && g.running == 0 {
		close(g.empty)
	}
	g.closed = true
}

func (g *gate) isClosed() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.closed
}
