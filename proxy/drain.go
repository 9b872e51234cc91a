package main

import (
	"cmp"
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"
)

// shuttingDown is the answer to what comes while the gate is closed.
const shuttingDown = "this instance of the agent is shutting down: try again, the next one will answer"

// gate counts the requests for the API server and for runners that run, lets in no more than the limits allow, and
// nothing once it is closed.
type gate struct {
	limits  limits
	refused func(limit string) // counts
	log     *slog.Logger

	mu      sync.Mutex
	running map[*recorder]string // the source of each
	callers map[string]int       // how many of each source
	closed  bool
	empty   chan struct{} // closed when the gate is and nothing runs any more
}

func newGate(l limits, refused func(limit string), log *slog.Logger) *gate {
	return &gate{limits: l, refused: refused, log: log, running: map[*recorder]string{}, callers: map[string]int{}, empty: make(chan struct{})}
}

// enter lets a request of source in, or says why not. leave must follow if refusal is empty.
func (g *gate) enter(rec *recorder, source string) (refusal string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return shuttingDown
	}
	if len(g.running) >= g.limits.requests { // of those that do not read, one makes room for the next try
		g.end(g.stalled(time.Now(), func(*recorder) bool { return true }), 1, "requests")
		g.refused("requests")
		return "too many requests are being answered: try again"
	}
	if g.callers[source] >= g.limits.caller {
		g.refused("caller")
		return "too many requests of this caller are being answered: try again"
	}
	g.running[rec] = source
	g.callers[source]++
	return ""
}

func (g *gate) leave(rec *recorder) {
	g.mu.Lock()
	defer g.mu.Unlock()
	source := g.running[rec]
	delete(g.running, rec)
	if g.callers[source]--; g.callers[source] == 0 {
		delete(g.callers, source)
	}
	if g.closed && len(g.running) == 0 {
		close(g.empty)
	}
}

// close lets nothing more in.
func (g *gate) close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.closed && len(g.running) == 0 {
		close(g.empty)
	}
	g.closed = true
}

func (g *gate) state() (running int, closed bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.running), g.closed
}

const (
	stallInterval = 250 * time.Millisecond // between two looks for stalled requests
	stallGrace    = time.Second            // a caller who reads or sends nothing for less is not stalled
	callStall     = time.Minute            // a call whose caller reads or sends nothing for as long is ended
)

// watch ends stalled requests until ctx ends: calls after callStall, and those of both kinds that have stalled
// longest when there are more than the limits allow.
func (g *gate) watch(ctx context.Context) {
	tick := time.NewTicker(stallInterval)
	defer tick.Stop()
	for {
		select {
		case now := <-tick.C:
			g.endStalled(now)
		case <-ctx.Done():
			return
		}
	}
}

func (g *gate) endStalled(now time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	isCall := func(rec *recorder) bool { return !rec.isStream() }
	late := g.stalled(now.Add(stallGrace-callStall), isCall)
	g.end(late, len(late), "stalled_calls")
	calls, streams := g.stalled(now, isCall), g.stalled(now, (*recorder).isStream)
	g.end(calls, len(calls)-g.limits.stalledCalls, "stalled_calls")
	g.end(streams, len(streams)-g.limits.stalledStreams, "stalled_streams")
}

// stalled returns the requests of a kind whose callers have read or sent nothing for stallGrace, the longest first. g.mu is
// held.
func (g *gate) stalled(now time.Time, of func(*recorder) bool) []*recorder {
	var stalled []*recorder
	for rec := range g.running {
		since := rec.stalled()
		if since != 0 && now.UnixNano()-since >= int64(stallGrace) && !rec.ended && of(rec) {
			stalled = append(stalled, rec)
		}
	}
	slices.SortFunc(stalled, func(a, b *recorder) int { return cmp.Compare(a.stalled(), b.stalled()) })
	return stalled
}

// end cuts the first n. g.mu is held.
func (g *gate) end(requests []*recorder, n int, limit string) {
	for _, rec := range requests[:min(max(n, 0), len(requests))] {
		rec.ended = true
		rec.abort()
		g.refused(limit)
		g.log.Warn("ended a stalled request", "request_id", rec.requestID, "caller", rec.caller, "limit", limit)
	}
}
