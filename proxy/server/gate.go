package server

import (
	"cmp"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pipeops/vm-agent/proxy/kube"
)

// shuttingDown is the answer to streams that arrive while the gate is closed.
const shuttingDown = "this instance of the agent is shutting down: try again, the next one will answer"

// gate admits authenticated requests within the limits, and ends stalled ones. Safe for concurrent use.
type gate struct {
	limits  *limits
	refused func(limit string) // counts a refusal
	log     *slog.Logger

	draining atomic.Bool // connections end with their next answer, because the agent shuts down
	closed   atomic.Bool // and new streams are refused

	mu      sync.Mutex
	running map[*scope]struct{}
	memory  int64            // bytes that they have reserved
	callers map[string]usage // by share
}

// usage is how much of the limits is in use, by one caller or all.
type usage struct {
	requests int
	memory   int64 // bytes
}

// enter admits a request whose headers use so many bytes of memory, and returns why not, or "": then leave must follow.
// One caller has at most three times what is free: alone three quarters of all, beside others less, so that there is
// always room for one more. Once the gate is closed, enter admits only calls.
func (g *gate) enter(sc *scope, headers int64) (refusal string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed.Load() && sc.isStream() {
		return shuttingDown
	}
	own, free := g.callers[sc.share].requests, g.limits.requests-len(g.running)
	if own > 0 && free > 0 && own+1 > 3*(free-1) {
		g.refused("caller")
		return "too many requests of this caller are being answered: try again"
	}
	if free <= 0 { // ends a stalled request, to make room for the next try
		g.end(g.stalled(time.Now(), func(*scope) bool { return true }), 1, "requests")
		g.refused("requests")
		return "too many requests are being answered: try again"
	}
	if !g.take(sc, headers, false) {
		return "its headers are too large while so many other requests are being answered: try again"
	}
	g.running[sc] = struct{}{}
	g.add(sc.share, usage{requests: 1})
	return ""
}

// add adds to the usage of a caller. g.mu is held.
func (g *gate) add(caller string, more usage) {
	g.memory += more.memory
	now := usage{g.callers[caller].requests + more.requests, g.callers[caller].memory + more.memory}
	if g.callers[caller] = now; now == (usage{}) {
		delete(g.callers, caller)
	}
}

// reserve takes memory until leave, and returns false if there is not enough, or the caller would have more than three
// times what is free then. An optional reservation leaves half for those that are not.
func (g *gate) reserve(sc *scope, bytes int64, optional bool) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.take(sc, bytes, optional)
}

// take is reserve with g.mu held.
func (g *gate) take(sc *scope, bytes int64, optional bool) bool {
	size := g.limits.requestMemory
	if free := size - g.memory - bytes; free < 0 || g.callers[sc.share].memory+bytes > 3*free ||
		optional && g.memory+bytes > size/2 {
		g.refused("request_memory")
		return false
	}
	sc.memory += bytes
	g.add(sc.share, usage{memory: bytes})
	return true
}

func (g *gate) leave(sc *scope) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.running, sc)
	g.add(sc.share, usage{-1, -sc.memory})
}

func (g *gate) inUse() usage {
	g.mu.Lock()
	defer g.mu.Unlock()
	return usage{len(g.running), g.memory}
}

// revoke ends the requests that match, and returns how many: a watch with an event that says so, if it can, and all
// others at once.
func (g *gate) revoke(match func(*scope) bool, why *kube.Ended) int {
	g.mu.Lock()
	var matching []*scope
	for sc := range g.running {
		if !sc.revoked && match(sc) {
			sc.revoked = true
			matching = append(matching, sc)
		}
	}
	g.mu.Unlock()
	for _, sc := range matching { // to close a stream may take its time
		g.log.Info("ending a request whose right has ended", "request_id", sc.requestID, "reason", why.Why)
		if sc.EndWatch(why) {
			time.AfterFunc(time.Second, func() { g.cut(sc, why) }) // if the caller does not read, or the event has no end
		} else {
			g.cut(sc, why)
		}
	}
	return len(matching)
}

// cut ends a request for why, if it still runs.
func (g *gate) cut(sc *scope, why error) {
	sc.cancel(why)
	g.mu.Lock()
	defer g.mu.Unlock()
	if _, running := g.running[sc]; running && sc.blocked.Load() != 0 {
		sc.abort()
	}
}

const (
	stallInterval = 250 * time.Millisecond // between two calls of endStalled
	stallGrace    = time.Second            // a request is stalled once its caller reads or sends nothing for so long
	callTimeout   = time.Minute            // a call is ended once its caller reads or sends nothing for so long
)

// endStalled ends calls that are stalled for callTimeout, and of too many stalled requests those stalled longest.
func (g *gate) endStalled(now time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	isCall := func(sc *scope) bool { return !sc.isStream() }
	late := g.stalled(now.Add(stallGrace-callTimeout), isCall) // stalled for callTimeout, not only stallGrace
	g.end(late, len(late), "stalled_calls")
	reads := g.stalled(now, func(sc *scope) bool { return isCall(sc) && sc.blocked.Load() != 0 })
	g.end(reads, len(reads)-g.limits.stalledReads, "stalled_reads")
	calls, streams := g.stalled(now, isCall), g.stalled(now, (*scope).isStream)
	g.end(calls, len(calls)-g.limits.stalledCalls, "stalled_calls")
	g.end(streams, len(streams)-g.limits.stalledStreams, "stalled_streams")
}

// stalled returns the stalled requests of a kind: those of the caller with most of them first, and of each caller the
// one stalled longest first. g.mu is held.
func (g *gate) stalled(now time.Time, of func(*scope) bool) []*scope {
	var stalled []*scope
	perCaller := map[string]int{}
	for sc := range g.running {
		since := sc.stalledSince()
		if since != 0 && now.UnixNano()-since >= int64(stallGrace) && of(sc) {
			stalled = append(stalled, sc)
			perCaller[sc.share]++
		}
	}
	slices.SortFunc(stalled, func(a, b *scope) int {
		return cmp.Or(cmp.Compare(perCaller[b.share], perCaller[a.share]), cmp.Compare(a.stalledSince(), b.stalledSince()))
	})
	return stalled
}

// end ends the first n requests. g.mu is held.
func (g *gate) end(requests []*scope, n int, limit string) {
	for _, sc := range requests[:min(max(n, 0), len(requests))] {
		if sc.abort() {
			g.refused(limit)
			g.log.Warn("ended a stalled request", "request_id", sc.requestID, "caller", sc.caller, "limit", limit)
		}
	}
}

// streams returns one running stream for each right that streams need.
func (g *gate) streams() map[right]*scope {
	g.mu.Lock()
	defer g.mu.Unlock()
	streams := map[right]*scope{}
	for sc := range g.running {
		if sc.right != nil && sc.Resource != "" {
			streams[*sc.right] = sc
		}
	}
	return streams
}

// limits bound what callers can make the proxy hold. proxy/README.md has the table with the reasons.
type limits struct {
	connections    int   // open on the tunnel listener; on the operations listener opsConnections
	headerMemory   int64 // bytes for headers until their request is authenticated; the operations listener has a quarter
	requestMemory  int64 // bytes for headers and small bodies of authenticated requests
	requests       int   // authenticated requests for the API server or a runner, streams included
	stalledCalls   int   // of these, calls whose caller neither reads nor sends
	stalledReads   int   // of these, calls whose caller does not read
	stalledStreams int   // and watches, logs and upgrades

	// A connection of HTTP/2 that is older takes no more requests, so that callers with few of them use all replicas.
	connectionAge time.Duration
}

const (
	maxHeaderBytes = 128 << 10 // of a request on the tunnel listener; net/http adds 4 KiB
	opsHeaderBytes = 16 << 10
	opsConnections = 100
	maxStreams     = 15       // on a connection of HTTP/2; callers open another then
	baseMemory     = 24 << 20 // bytes that the proxy itself needs
	stalledMemory  = 96 << 10 // bytes for a stream whose caller does not read: its window, and what is in transit
)

// newLimits returns limits that fit memory, in bytes, with what the proxy itself needs.
func newLimits(memory int64) *limits {
	memory = max(memory-baseMemory, memory/4)
	return &limits{
		connections: int(memory / (100 << 10)), headerMemory: memory / 8, requestMemory: memory / 5,
		requests:       int(memory / (160 << 10)),
		stalledCalls:   16,
		stalledReads:   2, // an answer of 10 MB holds 100 of the 245 seats that the API server has for the agent
		stalledStreams: int(memory / 8 / stalledMemory),
		connectionAge:  30 * time.Second,
	}
}
