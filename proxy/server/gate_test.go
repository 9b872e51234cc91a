package server

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strconv"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/pipeops/vm-agent/proxy/inbound"
	"github.com/pipeops/vm-agent/proxy/kube"
)

// gateOf returns a gate, and counts what it refuses, by limit.
func gateOf(l limits) (g *gate, refusals map[string]int) {
	refusals = map[string]int{}
	return &gate{
		limits: &l, refused: func(limit string) { refusals[limit]++ }, log: slog.New(slog.DiscardHandler),
		running: map[*scope]struct{}{}, callers: map[string]usage{},
	}, refusals
}

// requestOf returns a request of a caller, as far as a gate knows it.
func requestOf(share string) *scope {
	return &scope{share: share, cancel: func(error) {}, conn: inbound.From(context.Background())}
}

// TestOneCallerLeavesPlacesForOthers: alone it has three quarters, and whoever is new gets a place until none is left.
func TestOneCallerLeavesPlacesForOthers(t *testing.T) {
	g, refusals := gateOf(limits{requests: 100, requestMemory: 1 << 30})
	own := 0
	for ; own <= 100 && g.enter(requestOf("greedy"), 0) == ""; own++ {
	}
	if own != 75 || refusals["caller"] != 1 {
		t.Errorf("one caller has %d of 100 places, refused %v", own, refusals)
	}
	for i := range 25 {
		if why := g.enter(requestOf(strconv.Itoa(i)), 0); why != "" {
			t.Fatalf("the new caller %d is refused: %s", i, why)
		}
	}
	if g.enter(requestOf("late"), 0) == "" || refusals["requests"] != 1 || g.inUse().requests != 100 {
		t.Errorf("%d of 100 run, refused %v", g.inUse().requests, refusals)
	}
}

// TestFullGateEndsAStalledRequest: one, to make room for the next try.
func TestFullGateEndsAStalledRequest(t *testing.T) {
	g, refusals := gateOf(limits{requests: 3, requestMemory: 1 << 30})
	stalled := make([]*scope, 3)
	for i := range stalled {
		stalled[i] = requestOf(strconv.Itoa(i))
		if why := g.enter(stalled[i], 0); why != "" {
			t.Fatal(why)
		}
		stalled[i].blocked.Store(time.Now().Add(time.Duration(i-10) * time.Second).UnixNano())
	}
	if g.enter(requestOf("new"), 0) == "" {
		t.Error("a request more than the limit is admitted")
	}
	if !stalled[0].aborted || stalled[1].aborted || stalled[2].aborted || refusals["requests"] != 2 {
		t.Errorf("ended %v, %v, %v, refused %v", stalled[0].aborted, stalled[1].aborted, stalled[2].aborted, refusals)
	}
}

// TestGateCountsMemory: one caller has three quarters, what is optional one half, and all of it
// comes back.
func TestGateCountsMemory(t *testing.T) {
	for optional, want := range map[bool]int{false: 750, true: 500} {
		g, refusals := gateOf(limits{requests: 10, requestMemory: 1000})
		sc := requestOf("greedy")
		if why := g.enter(sc, 100); why != "" || g.inUse() != (usage{1, 100}) {
			t.Fatalf("%s, %v in use", why, g.inUse())
		}
		got := 100
		for ; got <= 1000 && g.reserve(sc, 10, optional); got += 10 {
		}
		if got != want || refusals["request_memory"] != 1 || g.inUse().memory != int64(got) {
			t.Errorf("optional %v: one caller has %d of 1000 bytes, want %d; refused %v", optional, got, want, refusals)
		}
		other := requestOf("other")
		if why := g.enter(other, 100); why != "" {
			t.Errorf("another caller is refused: %s", why)
		}
		if g.enter(requestOf("large"), 2000) == "" {
			t.Error("headers larger than all memory are admitted")
		}
		g.leave(sc)
		g.leave(other)
		if g.inUse() != (usage{}) || len(g.callers) != 0 {
			t.Errorf("%v in use after all have left, callers %v", g.inUse(), g.callers)
		}
	}
}

// TestClosedGateAdmitsCallsAlone: no stream, of whatever kind.
func TestClosedGateAdmitsCallsAlone(t *testing.T) {
	g, _ := gateOf(limits{requests: 10, requestMemory: 1 << 20})
	call, watch, log := requestOf("a"), requestOf("b"), requestOf("c")
	watch.Verb, log.Subresource = "watch", "log"
	g.closed.Store(true)
	for _, sc := range []*scope{watch, log} {
		if why := g.enter(sc, 0); why != shuttingDown {
			t.Errorf("a new stream is answered %q", why)
		}
	}
	if why := g.enter(call, 0); why != "" {
		t.Errorf("a new call is refused: %s", why)
	}
}

// TestRevokedRequestsEndOnce: those that match, with the cause; a caller who does not read loses the connection.
func TestRevokedRequestsEndOnce(t *testing.T) {
	g, _ := gateOf(limits{requests: 100, requestMemory: 1 << 20})
	var ended []error
	enter := func(share string) *scope {
		sc := requestOf(share)
		sc.cancel = func(why error) { ended = append(ended, why) }
		if why := g.enter(sc, 0); why != "" {
			t.Fatal(why)
		}
		return sc
	}
	reads, other, deaf := enter("a"), enter("b"), enter("a")
	deaf.blocked.Store(time.Now().UnixNano())
	why := &kube.Ended{Why: "its right has ended"}
	ofA := func(sc *scope) bool { return sc.share == "a" }
	if n := g.revoke(ofA, why); n != 2 || len(ended) != 2 || !errors.Is(ended[0], why) || !errors.Is(ended[1], why) {
		t.Errorf("ended %d: %v", n, ended)
	}
	if reads.aborted || !deaf.aborted || other.aborted || other.revoked {
		t.Errorf("aborted %v, %v, %v", reads.aborted, deaf.aborted, other.aborted)
	}
	if n := g.revoke(ofA, why); n != 0 || len(ended) != 2 {
		t.Errorf("ended %d again: %v", n, ended)
	}
}

// TestRevokedWatchWithoutAReaderEnds: its last event cannot be sent, so that it is cut a second later.
func TestRevokedWatchWithoutAReaderEnds(t *testing.T) {
	t.Parallel()
	s := withLimits(t, func(*limits) {}, flood)
	if _, _, err := call(t, listening(t, s), "GET /api/k8s/api/v1/pods?watch=1"); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() bool { return len(s.gate.stalledNow()) == 1 })
	s.gate.revoke(func(*scope) bool { return true }, &kube.Ended{Why: "its right has ended"})
	eventually(t, func() bool { return inUse(s) == 0 })
}

// TestStalledRequestsOfOneCallerEndFirst: of the caller with most of them, the one stalled longest; and none that has
// stalled for less than a second.
func TestStalledRequestsOfOneCallerEndFirst(t *testing.T) {
	g, refusals := gateOf(limits{requests: 100, requestMemory: 1 << 20, stalledCalls: 100, stalledReads: 2})
	now := time.Now()
	stalled := func(share string, since time.Duration) *scope {
		sc := requestOf(share)
		if why := g.enter(sc, 0); why != "" {
			t.Fatal(why)
		}
		sc.blocked.Store(now.Add(-since).UnixNano())
		return sc
	}
	old, first := stalled("one", 50*time.Second), stalled("many", 20*time.Second)
	third, second := stalled("many", 2*time.Second), stalled("many", 10*time.Second)
	fresh := stalled("many", 900*time.Millisecond)
	got := g.stalled(now, func(*scope) bool { return true })
	for i, want := range []*scope{first, second, third, old} {
		if len(got) != 4 || got[i] != want {
			t.Fatalf("%d are stalled, the order is wrong at %d", len(got), i)
		}
	}
	g.endStalled(now)
	if !first.aborted || !second.aborted || third.aborted || old.aborted || fresh.aborted ||
		refusals["stalled_reads"] != 2 {
		t.Errorf("of four stalled reads, two may stay: refused %v", refusals)
	}
	if g.endStalled(now.Add(9 * time.Second)); old.aborted {
		t.Error("a call that is stalled for 59 s has ended")
	}
	if g.endStalled(now.Add(11 * time.Second)); !old.aborted || refusals["stalled_calls"] != 1 {
		t.Errorf("a call that is stalled for 61 s has not ended: refused %v", refusals)
	}
}

// TestStalledKindsHaveTheirOwnLimits: 16 calls, of them 2 whose caller does not read; and streams by themselves.
func TestStalledKindsHaveTheirOwnLimits(t *testing.T) {
	for kind, test := range map[string]struct {
		make func(since time.Time) *scope
		stay int
	}{
		"stalled_reads": {func(since time.Time) *scope {
			sc := requestOf("a")
			sc.blocked.Store(since.UnixNano())
			return sc
		}, 2},
		"stalled_calls": {func(time.Time) *scope {
			sc := requestOf("a")
			sc.Body = kube.NewBody(httptest.NewRecorder(), silentBody{t.Context()}, func(float64) {})
			go func() { _, _ = sc.Body.Read(make([]byte, 1)) }()
			for sc.Body.Blocked() == 0 {
				time.Sleep(time.Millisecond)
			}
			return sc
		}, 16},
		"stalled_streams": {func(since time.Time) *scope {
			sc := requestOf("a")
			sc.Verb = "watch"
			sc.blocked.Store(since.UnixNano())
			return sc
		}, 30},
	} {
		l := *newLimits(defaultMemory)
		l.stalledStreams = 30
		g, refusals := gateOf(l)
		now := time.Now()
		for i := range 50 {
			if why := g.enter(test.make(now.Add(time.Duration(i)*time.Millisecond)), 0); why != "" {
				t.Fatal(why)
			}
		}
		g.endStalled(now.Add(2 * time.Second))
		if refusals[kind] != 50-test.stay || len(refusals) != 1 {
			t.Errorf("of 50, %d may stay; refused %v", test.stay, refusals)
		}
	}
}

// silentBody is a body that never comes.
type silentBody struct{ ctx context.Context }

func (b silentBody) Read([]byte) (int, error) { <-b.ctx.Done(); return 0, io.EOF }
func (silentBody) Close() error               { return nil }

// TestStalledRequestsAreLookedForOften: four times a second, so that few more than the limits can stall.
func TestStalledRequestsAreLookedForOften(t *testing.T) {
	if stallInterval != 250*time.Millisecond {
		t.Errorf("every %s", stallInterval)
	}
}

// TestLimitsOfTheShippedPod: four fifths of 256 MiB, as proxy/README.md has them.
func TestLimitsOfTheShippedPod(t *testing.T) {
	got := *newLimits(256 << 20 / 5 * 4)
	if want := (limits{
		connections: 1851, headerMemory: 23697817, requestMemory: 37916508, requests: 1157,
		stalledCalls: 16, stalledReads: 2, stalledStreams: 241, connectionAge: 30 * time.Second,
	}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

// TestServersHaveTheirBounds: what net/http itself keeps to.
func TestServersHaveTheirBounds(t *testing.T) {
	public := newHTTPServer(t.Context(), tunnel, nil, slog.New(slog.DiscardHandler))
	ops := newHTTPServer(t.Context(), operations, nil, slog.New(slog.DiscardHandler))
	if public.MaxHeaderBytes != 128<<10 || public.ReadHeaderTimeout != 32*time.Second || public.ReadTimeout != 0 ||
		public.WriteTimeout != 0 || public.IdleTimeout != 0 {
		t.Errorf("the tunnel listener: %+v", public)
	}
	if want := (http.HTTP2Config{
		MaxConcurrentStreams: 15, MaxReceiveBufferPerStream: 256 << 10, MaxReceiveBufferPerConnection: 15 * 256 << 10,
		MaxReadFrameSize: 16 << 10, SendPingTimeout: 32 * time.Second,
	}); !reflect.DeepEqual(*public.HTTP2, want) {
		t.Errorf("HTTP/2: %+v", *public.HTTP2)
	}
	if ops.MaxHeaderBytes != 16<<10 || ops.ReadHeaderTimeout != 32*time.Second || ops.ReadTimeout != time.Minute ||
		ops.WriteTimeout != time.Minute || ops.IdleTimeout != 2*time.Minute {
		t.Errorf("the operations listener: %+v", ops)
	}
}

// TestListenersHaveTheirLimits: as the metrics show them.
func TestListenersHaveTheirLimits(t *testing.T) {
	s, _, _ := newTest(t, token)
	s.limits = newLimits(256 << 20 / 5 * 4)
	for _, l := range []listener{tunnel, operations} {
		socket, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = socket.Close() })
		s.bound(l, socket.(*net.TCPListener), nil)
	}
	for limit, want := range map[string]float64{
		"connections": 1851, "header_memory_bytes": 23697817, "operations_connections": 100,
		"operations_header_memory_bytes": 5924454, "commands": 32,
	} {
		if got := testutil.ToFloat64(s.metrics.limits.WithLabelValues(limit)); got != want {
			t.Errorf("%s: %v, want %v", limit, got, want)
		}
	}
}
