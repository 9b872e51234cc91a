package server

import (
	"cmp"
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
	running map[*recorder]struct{}
	memory  int64            // bytes that they have taken
	callers map[string]usage // of these, by caller
	closed  bool
	empty   chan struct{} // closed when the gate is and nothing runs any more
	drained sync.Once
}

// usage is what one caller has.
type usage struct {
	requests int
	memory   int64 // bytes
}

func newGate(l limits, refused func(limit string), log *slog.Logger) *gate {
	return &gate{limits: l, refused: refused, log: log, running: map[*recorder]struct{}{}, callers: map[string]usage{}, empty: make(chan struct{})}
}

// enter lets a request in whose headers take so many bytes, or says why not; once the gate is closed, those that may
// come in while the agent drains. leave must follow if refusal is empty.
func (g *gate) enter(rec *recorder, headers int64, whileDraining bool) (refusal string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed && !whileDraining {
		return shuttingDown
	}
	if g.callers[rec.caller].requests >= g.limits.caller {
		g.refused("caller")
		return "too many requests of this caller are being answered: try again"
	}
	if len(g.running) >= g.limits.requests { // of those that do not read, one makes room for the next try
		g.end(g.stalled(time.Now(), func(*recorder) bool { return true }), 1, "requests")
		g.refused("requests")
		return "too many requests are being answered: try again"
	}
	if !g.take(rec, headers, false) {
		return "its headers are too large beside the other requests that are being answered: try again"
	}
	g.running[rec] = struct{}{}
	g.add(rec.caller, usage{requests: 1})
	return ""
}

// add changes what a caller has. g.mu is held.
func (g *gate) add(caller string, more usage) {
	g.memory += more.memory
	now := usage{g.callers[caller].requests + more.requests, g.callers[caller].memory + more.memory}
	if g.callers[caller] = now; now == (usage{}) {
		delete(g.callers, caller)
	}
}

// reserve takes memory until the request has left, and returns false if there is not enough, or the caller has three
// quarters of all. What is optional leaves half for what is not.
func (g *gate) reserve(rec *recorder, bytes int64, optional bool) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.take(rec, bytes, optional)
}

// take is reserve with g.mu held.
func (g *gate) take(rec *recorder, bytes int64, optional bool) bool {
	size := g.limits.requestMemory
	if g.callers[rec.caller].memory+bytes > size*3/4 || g.memory+bytes > size || optional && g.memory+bytes > size/2 {
		g.refused("request_memory")
		return false
	}
	rec.memory += bytes
	g.add(rec.caller, usage{memory: bytes})
	return true
}

func (g *gate) leave(rec *recorder) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.running, rec)
	g.add(rec.caller, usage{-1, -rec.memory})
	g.closeEmpty()
}

// close lets nothing more in.
func (g *gate) close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed = true
	g.closeEmpty()
}

// closeEmpty closes empty, once, when nothing runs any more. g.mu is held.
func (g *gate) closeEmpty() {
	if g.closed && len(g.running) == 0 {
		g.drained.Do(func() { close(g.empty) })
	}
}

func (g *gate) state() (running int, memory int64, closed bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.running), g.memory, g.closed
}

const (
	stallInterval = 250 * time.Millisecond // between two looks for stalled requests
	stallGrace    = time.Second            // a caller who reads or sends nothing for less is not stalled
	callStall     = time.Minute            // a call whose caller reads or sends nothing for as long is ended
)

// endStalled ends stalled requests: calls after callStall, and those of both kinds that have stalled longest when there
// are more than the limits allow.
func (g *gate) endStalled(now time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	isCall := func(rec *recorder) bool { return !rec.isStream() }
	late := g.stalled(now.Add(stallGrace-callStall), isCall)
	g.end(late, len(late), "stalled_calls")
	reads := g.stalled(now, func(rec *recorder) bool { return isCall(rec) && rec.blocked.Load() != 0 })
	g.end(reads, len(reads)-g.limits.stalledReads, "stalled_reads")
	calls, streams := g.stalled(now, isCall), g.stalled(now, (*recorder).isStream)
	g.end(calls, len(calls)-g.limits.stalledCalls, "stalled_calls")
	g.end(streams, len(streams)-g.limits.stalledStreams, "stalled_streams")
}

// stalled returns the requests of a kind whose callers have read or sent nothing for stallGrace: those of the caller
// with most of them first, of each the longest first. g.mu is held.
func (g *gate) stalled(now time.Time, of func(*recorder) bool) []*recorder {
	var stalled []*recorder
	perCaller := map[string]int{}
	for rec := range g.running {
		since := rec.stalled()
		if since != 0 && now.UnixNano()-since >= int64(stallGrace) && of(rec) {
			stalled = append(stalled, rec)
			perCaller[rec.caller]++
		}
	}
	slices.SortFunc(stalled, func(a, b *recorder) int {
		return cmp.Or(cmp.Compare(perCaller[b.caller], perCaller[a.caller]), cmp.Compare(a.stalled(), b.stalled()))
	})
	return stalled
}

// end cuts the first n. g.mu is held.
func (g *gate) end(requests []*recorder, n int, limit string) {
	for _, rec := range requests[:min(max(n, 0), len(requests))] {
		if !rec.abort() {
			continue
		}
		g.refused(limit)
		g.log.Warn("ended a stalled request", "request_id", rec.requestID, "caller", rec.caller, "limit", limit)
	}
}
