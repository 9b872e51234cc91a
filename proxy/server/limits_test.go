package server

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"k8s.io/client-go/rest"
)

// listening serves the tunnel listener of s, and returns its address.
func listening(t *testing.T, s *Server) string {
	t.Helper()
	socket, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	bounded := s.bound(tunnel, socket.(*net.TCPListener), &tls.Config{})
	server := newHTTPServer(t.Context(), tunnel, s.handler(tunnel), slog.New(slog.DiscardHandler))
	server.ConnState = bounded.ConnState
	go func() { _ = server.Serve(bounded) }()
	t.Cleanup(func() { _ = server.Close() })
	return socket.Addr().String()
}

// withLimits returns a server with changed limits, and an API server that answers with api.
func withLimits(t *testing.T, change func(*limits), api http.HandlerFunc) *Server {
	t.Helper()
	upstream := httptest.NewUnstartedServer(api)
	upstream.EnableHTTP2 = true
	upstream.Config.HTTP2 = &http.HTTP2Config{ // as the API server: streams do not stall each other
		MaxReceiveBufferPerStream: 64 << 10, MaxReceiveBufferPerConnection: 4<<20 - 1,
	}
	upstream.StartTLS()
	t.Cleanup(func() {
		upstream.CloseClientConnections()
		upstream.Close()
	})
	config := &rest.Config{Host: upstream.URL, TLSClientConfig: rest.TLSClientConfig{Insecure: true}}
	s := serverBefore(t, config, token, slog.New(slog.DiscardHandler))
	change(s.limits)
	return s
}

func refused(s *Server, limit string) float64 {
	return testutil.ToFloat64(s.metrics.refused.WithLabelValues(limit))
}

// call sends a request with the token over a new connection, and returns when the answer's headers have arrived.
func call(t *testing.T, addr, request string) (net.Conn, *http.Response, error) {
	t.Helper()
	return send(t, addr, request+" HTTP/1.1\r\nHost: a\r\n"+auth)
}

// send is call with a whole request but its last line.
func send(t *testing.T, addr, request string) (net.Conn, *http.Response, error) {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := io.WriteString(conn, request+"\r\n"); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	return conn, resp, err
}

func silent(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	_ = http.NewResponseController(w).Flush()
	<-r.Context().Done()
}

func TestRequestsInFlightAreLimited(t *testing.T) {
	s := withLimits(t, func(l *limits) { l.requests = 3 }, silent)
	addr := listening(t, s)
	watch := func(from string, want int) net.Conn {
		t.Helper()
		conn, resp, err := call(t, addr, "GET /api/k8s/api/v1/pods?watch=1 HTTP/1.1\r\nX-Forwarded-For: "+from+"\r\nX-Rest:")
		if err != nil || resp.StatusCode != want {
			t.Fatalf("from %s: answered %v, %v, want %d", from, resp, err, want)
		}
		if want == http.StatusTooManyRequests {
			body, _ := io.ReadAll(resp.Body)
			if resp.Header.Get("Retry-After") != "1" || !strings.Contains(string(body), "try again") ||
				!strings.Contains(string(body), `"TooManyRequests"`) {
				t.Errorf("answered %v %s", resp.Header, body)
			}
		}
		return conn
	}
	first := watch("192.0.2.1", http.StatusOK)
	watch("192.0.2.1", http.StatusOK)
	watch("192.0.2.1", http.StatusTooManyRequests) // one caller's share
	watch("192.0.2.2", http.StatusOK)
	watch("192.0.2.3", http.StatusTooManyRequests) // all
	if refused(s, "caller") != 1 || refused(s, "requests") != 1 || inUse(s) != 3 {
		t.Errorf("counted %v and %v, %d run", refused(s, "caller"), refused(s, "requests"), inUse(s))
	}
	_ = first.Close()
	eventually(t, func() bool { return inUse(s) == 2 })
	watch("192.0.2.3", http.StatusOK)
}

func inUse(s *Server) int { return s.gate.inUse().requests }

// eventually waits up to 10 s until a condition holds.
func eventually(t *testing.T, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !holds(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the condition does not hold after 10 s")
		}
	}
}

// flood sends an endless answer, as fast as it is read.
func flood(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	chunk := []byte(strings.Repeat("x", 32<<10))
	for r.Context().Err() == nil {
		if _, err := w.Write(chunk); err != nil {
			return
		}
	}
}

// TestTooManyStalledRequestsAreEnded: calls and streams have separate limits, and those stalled longest end first. A
// caller that reads is not affected.
func TestTooManyStalledRequestsAreEnded(t *testing.T) {
	s := withLimits(t, func(l *limits) { l.stalledReads, l.stalledStreams = 1, 2 }, flood)
	addr := listening(t, s)
	stall := func(path string, n int) (conns []net.Conn) {
		for i := range n {
			conn, resp, err := call(t, addr, "GET /api/k8s/api/v1/"+path)
			if err != nil || resp.StatusCode != http.StatusOK {
				t.Fatalf("answered %v, %v", resp, err)
			}
			conns = append(conns, conn)
			eventually(t, func() bool { return len(s.gate.stalledNow()) == i+1 })
		}
		return conns
	}
	reader, resp, err := call(t, addr, "GET /api/k8s/api/v1/pods")
	if err != nil {
		t.Fatal(err)
	}
	var read atomic.Int64
	go func() {
		for {
			n, err := io.CopyN(io.Discard, resp.Body, 1<<20)
			read.Add(n)
			if err != nil {
				return
			}
		}
	}()
	_ = reader
	for kind, path := range map[string]string{"stalled_reads": "pods", "stalled_streams": "pods?watch=1"} {
		before := inUse(s)
		conns := stall(path, 4)
		allowed := map[string]int{"stalled_reads": 1, "stalled_streams": 2}[kind]
		eventually(t, func() bool {
			s.gate.endStalled(time.Now())
			return inUse(s) == before+allowed
		})
		if refused(s, kind) != float64(4-allowed) {
			t.Errorf("%s: %v ended", kind, refused(s, kind))
		}
		ended := 0
		for _, conn := range conns { // those that were ended lose what the kernel held
			if _, err := io.CopyN(io.Discard, conn, 8<<20); err != nil {
				ended++
			}
			_ = conn.Close()
		}
		if ended != 4-allowed {
			t.Errorf("%s: %d of 4 have ended, %d may stay", kind, ended, allowed)
		}
		eventually(t, func() bool { return inUse(s) == before })
	}
	now := read.Load()
	eventually(t, func() bool { return read.Load() > now })
}

// stalledNow returns the requests that wait for their callers at this moment.
func (g *gate) stalledNow() []*scope {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.stalled(time.Now().Add(time.Second), func(sc *scope) bool {
		return sc.stalledSince() < time.Now().Add(-100*time.Millisecond).UnixNano()
	})
}

// TestTooManyStalledUploadsAreEnded: each holds one of the API server's seats, which other requests wait for.
func TestTooManyStalledUploadsAreEnded(t *testing.T) {
	s := withLimits(t, func(l *limits) { l.stalledCalls = 1 }, func(_ http.ResponseWriter, r *http.Request) {
		if _, err := io.Copy(io.Discard, r.Body); err != nil {
			panic(http.ErrAbortHandler)
		}
	})
	addr := listening(t, s)
	var conns []net.Conn
	for _, size := range []int{100, 1 << 20, 100} { // kept, streamed
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		_, _ = fmt.Fprintf(conn, "POST /api/k8s/api/v1/pods HTTP/1.1\r\nHost: a\r\n%sContent-Length: %d\r\n\r\n%s", auth,
			size, strings.Repeat("x", size-1))
		conns = append(conns, conn)
		eventually(t, func() bool { return len(s.gate.stalledNow()) == len(conns) })
	}
	eventually(t, func() bool {
		s.gate.endStalled(time.Now())
		return inUse(s) == 1
	})
	for i, conn := range conns {
		_, _ = io.WriteString(conn, "x")
		want := map[bool]int{true: http.StatusRequestTimeout, false: http.StatusOK}[i < 2]
		if resp, err := http.ReadResponse(bufio.NewReader(conn), nil); err != nil || resp.StatusCode != want {
			t.Errorf("request %d: answered %v, %v, want %d", i, resp, err, want)
		}
	}
}

// TestStalledCallEndsAfterAMinute: within the limits too. A watch and a log do not end.
func TestStalledCallEndsAfterAMinute(t *testing.T) {
	s := withLimits(t, func(*limits) {}, flood)
	addr := listening(t, s)
	for _, path := range []string{"pods", "pods?watch=1", "namespaces/a/pods/p/log"} {
		if _, resp, err := call(t, addr, "GET /api/k8s/api/v1/"+path); err != nil || resp.StatusCode != http.StatusOK {
			t.Fatalf("answered %v, %v", resp, err)
		}
	}
	eventually(t, func() bool { return len(s.gate.stalledNow()) == 3 })
	s.gate.endStalled(time.Now().Add(30 * time.Second))
	if n := inUse(s); n != 3 {
		t.Errorf("%d run after half a minute", n)
	}
	s.gate.endStalled(time.Now().Add(2 * time.Minute))
	eventually(t, func() bool { return inUse(s) == 2 })
	if refused(s, "stalled_calls") != 1 {
		t.Errorf("%v calls were ended", refused(s, "stalled_calls"))
	}
}

// TestUnreadAnswersAreNotBuffered: for a caller who does not read, the agent reads no more than its windows hold.
func TestUnreadAnswersAreNotBuffered(t *testing.T) {
	var sent atomic.Int64
	s := withLimits(t, func(*limits) {}, func(w http.ResponseWriter, r *http.Request) {
		chunk := []byte(strings.Repeat("x", 32<<10))
		for r.Context().Err() == nil {
			if n, err := w.Write(chunk); err == nil {
				sent.Add(int64(n))
			}
		}
	})
	if _, _, err := call(t, listening(t, s), "GET /api/k8s/api/v1/pods"); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() bool { return len(s.gate.stalledNow()) == 1 })
	// The agent's windows, both sockets of the caller's connection, and what the API server has not sent yet. By
	// default Go and Linux buffer more than 4 MiB here.
	if held := sent.Load(); held > 2<<20 {
		t.Errorf("%d bytes are held for a caller who reads nothing", held)
	}
}

// TestSmallBodiesAreStreamedWhenMemoryIsShort: else they are kept, to be repeated.
func TestSmallBodiesAreStreamedWhenMemoryIsShort(t *testing.T) {
	lengths := make(chan int64, 10)
	s := withLimits(t, func(l *limits) { l.requestMemory = 500 << 10 }, func(_ http.ResponseWriter, r *http.Request) {
		n, _ := io.Copy(io.Discard, r.Body)
		lengths <- n
	})
	addr := listening(t, s)
	post := func(size int) net.Conn {
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		_, _ = fmt.Fprintf(conn, "POST /api/k8s/api/v1/pods HTTP/1.1\r\nHost: a\r\n%sContent-Length: %d\r\n\r\n%s", auth,
			size, strings.Repeat("x", size-1))
		return conn
	}
	kept := post(200 << 10)
	eventually(t, func() bool { return memoryInUse(s) > 200<<10 })
	streamed := post(200 << 10)
	eventually(t, func() bool { return refused(s, "request_memory") == 1 })
	for _, conn := range []net.Conn{kept, streamed} {
		_, _ = io.WriteString(conn, "x")
		if resp, err := http.ReadResponse(bufio.NewReader(conn), nil); err != nil || resp.StatusCode != http.StatusOK {
			t.Errorf("answered %v, %v", resp, err)
		}
		if n := <-lengths; n != 200<<10 {
			t.Errorf("the API server got %d bytes", n)
		}
	}
	eventually(t, func() bool { return memoryInUse(s) == 0 })
}

// TestOneCallerLeavesMemoryForOthers: unfinished messages of one caller use no more than its share, and are ended.
func TestOneCallerLeavesMemoryForOthers(t *testing.T) {
	s := withLimits(t, func(l *limits) { l.requestMemory, l.stalledCalls = 400<<10, 2 }, silent)
	addr := listening(t, s)
	for range 10 {
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		_, _ = io.WriteString(conn, "POST /api/control-plane/message HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: 192.0.2.1\r\n"+
			"Content-Type: application/json\r\n"+auth+"Content-Length: 100\r\n\r\n{")
	}
	eventually(t, func() bool { return refused(s, "request_memory") > 0 })
	watch := "GET /api/k8s/api/v1/pods?watch=1 HTTP/1.1\r\nX-Forwarded-For: 192.0.2.2\r\nX-Rest:"
	if _, resp, err := call(t, addr, watch); err != nil || resp.StatusCode != http.StatusOK {
		t.Errorf("another caller is answered %v, %v", resp, err)
	}
	eventually(t, func() bool {
		s.gate.endStalled(time.Now())
		return inUse(s) <= 3 // two messages, and the watch
	})
}

// TestHeadersOfRunningRequestsAreCounted: large headers use memory until their request is answered.
func TestHeadersOfRunningRequestsAreCounted(t *testing.T) {
	s := withLimits(t, func(l *limits) { l.requestMemory = 300 << 10 }, silent)
	addr := listening(t, s)
	large := "GET /api/k8s/api/v1/pods?watch=1 HTTP/1.1\r\n" + strings.Repeat("a:b\r\n", 2000) + "X-Rest:"
	if _, resp, err := call(t, addr, large); err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("answered %v, %v", resp, err)
	}
	for range 3 {
		if _, resp, err := call(t, addr, large); err != nil {
			t.Fatal(err)
		} else if resp.StatusCode == http.StatusTooManyRequests {
			return
		}
	}
	t.Errorf("no request is refused; %d bytes are counted", memoryInUse(s))
}

// TestHeadersOfAnswersAreLimited: from an API server that speaks HTTP/2, from one that speaks HTTP/1.1, and of
// upgrades.
func TestHeadersOfAnswersAreLimited(t *testing.T) {
	huge := func(w http.ResponseWriter, _ *http.Request) {
		for i := range 10_000 {
			w.Header()[fmt.Sprintf("A%d", i)] = []string{"b"}
		}
	}
	for name, http2 := range map[string]bool{"HTTP/2": true, "HTTP/1.1": false} {
		upstream := httptest.NewUnstartedServer(http.HandlerFunc(huge))
		upstream.EnableHTTP2 = http2
		upstream.StartTLS()
		t.Cleanup(upstream.Close)
		config := &rest.Config{Host: upstream.URL, TLSClientConfig: rest.TLSClientConfig{Insecure: true}}
		s := serverBefore(t, config, token, slog.New(slog.DiscardHandler))
		addr := listening(t, s)
		for kind, request := range map[string]string{
			"call":    "GET /api/k8s/api/v1/pods",
			"upgrade": "GET /api/k8s/x HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nX-Rest:",
		} {
			if _, resp, err := call(t, addr, request); err != nil || resp.StatusCode != http.StatusBadGateway {
				t.Errorf("%s, %s: answered %v, %v", name, kind, resp, err)
			}
		}
	}
}

func TestLimitsFitTheMemory(t *testing.T) {
	for _, memory := range []int64{64 << 20, 205 << 20, 1 << 30} {
		l := newLimits(memory)
		const idle, request, base = 40 << 10, 70 << 10, 25 << 20 // measured: tests/bench/README.md
		sum := int64(base) + int64(l.requests)*request + int64(l.connections-l.requests)*idle + l.headerMemory*5/4 +
			l.requestMemory + int64(l.stalledStreams+l.stalledCalls)*stalledMemory
		if sum > memory*5/4 {
			t.Errorf("%d MiB: the limits allow %d MiB", memory>>20, sum>>20)
		}
		if l.requests < 1 || l.requests >= l.connections {
			t.Errorf("%d MiB: %+v", memory>>20, l)
		}
	}
}

func memoryInUse(s *Server) int64 { return s.gate.inUse().memory }
