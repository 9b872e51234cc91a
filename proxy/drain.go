package main

import "sync"

// shuttingDown is the answer to what comes while the gate is closed.
const shuttingDown = "this instance of the agent is shutting down: try again, the next one will answer"

// gate counts what runs, and lets nothing in once it is closed.
type gate struct {
	mu      sync.Mutex
	running int
	closed  bool
	empty   chan struct{} // closed when the gate is and nothing runs any more
}

func newGate() *gate { return &gate{empty: make(chan struct{})} }

// enter says whether the gate is open. Who is let in must leave.
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
