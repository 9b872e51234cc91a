package server

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
)

// overHTTP2 serves the tunnel listener of s over TLS. It returns a client that speaks HTTP/2 and reads no more than
// 64 KiB ahead, and the number of connections that it has made.
func overHTTP2(t *testing.T, s *Server) (client *http.Client, dials func() int) {
	t.Helper()
	socket, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.config.RunDir = t.TempDir()
	pool := x509.NewCertPool()
	pool.AddCert(writeCertificate(t, s.config.RunDir, 1))
	quiet := slog.New(slog.DiscardHandler)
	certificates := &certificates{runDir: s.config.RunDir, log: quiet}
	bounded := s.bound(tunnel, socket.(*net.TCPListener), certificates.config())
	server := newHTTPServer(t.Context(), tunnel, s.handler(tunnel), quiet)
	server.ConnState = bounded.ConnState
	go func() { _ = server.Serve(bounded) }()
	t.Cleanup(func() { _ = server.Close() })
	made := make(chan struct{}, 100)
	transport := &http.Transport{
		TLSClientConfig:   &tls.Config{RootCAs: pool, ServerName: "agent-001", MinVersion: tls.VersionTLS12},
		ForceAttemptHTTP2: true,
		HTTP2:             &http.HTTP2Config{MaxReceiveBufferPerStream: 64 << 10},
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			made <- struct{}{}
			return (&net.Dialer{}).DialContext(ctx, "tcp", socket.Addr().String())
		},
	}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}, func() int { return len(made) }
}

// get requests a path of the Kubernetes API.
func get(t *testing.T, client *http.Client, path, bearer string) *http.Response {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://agent-001/api/k8s"+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+bearer)
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	if resp.ProtoMajor != 2 {
		t.Fatalf("answered over %s", resp.Proto)
	}
	t.Cleanup(func() { _ = resp.Body.Close() })
	return resp
}

// events sends a line for each that comes from next, as a watch.
func events(next chan struct{}) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if !strings.Contains(r.URL.RawQuery, "watch") {
			_, _ = io.WriteString(w, "ok")
			return
		}
		for {
			_, _ = io.WriteString(w, "{}\n")
			_ = http.NewResponseController(w).Flush()
			select {
			case <-next:
			case <-r.Context().Done():
				return
			}
		}
	}
}

// TestStalledStreamOfHTTP2EndsAlone: what else runs on the connection is not affected.
func TestStalledStreamOfHTTP2EndsAlone(t *testing.T) {
	next := make(chan struct{})
	watch := events(next)
	s := withLimits(t, func(l *limits) {
		l.stalledReads, l.stalledCalls = 1, 1 // each would end the same
	}, func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "flood") {
			flood(w, r)
			return
		}
		watch(w, r)
	})
	client, dials := overHTTP2(t, s)
	lines := bufio.NewReader(get(t, client, "/api/v1/pods?watch=1", token).Body)
	line := func() {
		if text, err := lines.ReadString('\n'); text != "{}\n" {
			t.Fatalf("the watch reads %q, %v", text, err)
		}
	}
	line()
	var floods []*http.Response
	for i := range 3 {
		floods = append(floods, get(t, client, "/api/v1/flood", token))
		eventually(t, func() bool { return len(s.gate.stalledNow()) == i+1 })
	}
	eventually(t, func() bool {
		s.gate.endStalled(time.Now())
		return inUse(s) == 2 // the watch and one flood
	})
	ended := 0
	for _, resp := range floods {
		if _, err := io.CopyN(io.Discard, resp.Body, 8<<20); err != nil {
			ended++
		}
	}
	if ended != 2 || refused(s, "stalled_reads") != 2 {
		t.Errorf("%d have ended, %v are counted", ended, refused(s, "stalled_reads"))
	}
	next <- struct{}{}
	line()
	if get(t, client, "/api/v1/pods", token); dials() != 1 {
		t.Errorf("%d connections were made", dials())
	}
}

// TestRefusedCallerDoesNotCloseTheConnectionOfOthers: a gateway's callers share it.
func TestRefusedCallerDoesNotCloseTheConnectionOfOthers(t *testing.T) {
	s := withLimits(t, func(*limits) {}, events(nil))
	client, dials := overHTTP2(t, s)
	for _, bearer := range []string{"wrong", token, "wrong", token} {
		want := map[bool]int{true: http.StatusOK, false: http.StatusUnauthorized}[bearer == token]
		resp := get(t, client, "/api/v1/pods", bearer)
		_, _ = io.Copy(io.Discard, resp.Body)
		if resp.StatusCode != want {
			t.Errorf("answered %s, want %d", resp.Status, want)
		}
	}
	req, _ := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://agent-001/api/k8s/api/v1/pods",
		io.LimitReader(endless{}, 10<<20))
	if resp, err := client.Do(req); err != nil || resp.StatusCode != http.StatusUnauthorized {
		t.Errorf("a large body: answered %v, %v", resp, err)
	}
	if dials() != 1 {
		t.Errorf("%d connections were made", dials())
	}
}

type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }

// TestConnectionOfHTTP2IsReplaced: once it is old, and while the agent drains, requests go over new connections, which
// frps may give to another replica. No request fails, and a watch goes on.
func TestConnectionOfHTTP2IsReplaced(t *testing.T) {
	next := make(chan struct{})
	s := withLimits(t, func(l *limits) { l.connectionAge = 0 }, events(next))
	client, dials := overHTTP2(t, s)
	lines := bufio.NewReader(get(t, client, "/api/v1/pods?watch=1", token).Body)
	for i := range 5 {
		resp := get(t, client, "/api/v1/pods", token)
		_, _ = io.Copy(io.Discard, resp.Body)
		if resp.StatusCode != http.StatusOK || dials() != i+2 {
			t.Errorf("call %d: %s, %d connections were made", i, resp.Status, dials())
		}
	}
	s.limits.connectionAge = time.Hour
	s.gate.draining.Store(true)
	for i := range 3 {
		resp := get(t, client, "/api/v1/pods", token)
		_, _ = io.Copy(io.Discard, resp.Body)
		if resp.StatusCode != http.StatusOK || dials() != i+7 {
			t.Errorf("draining: %s, %d connections were made", resp.Status, dials())
		}
	}
	for range 2 {
		if text, err := lines.ReadString('\n'); text != "{}\n" {
			t.Fatalf("the watch reads %q, %v", text, err)
		}
		go func() { next <- struct{}{} }()
	}
}

// TestUploadsOfHTTP2AreLimitedByTheirWindows: the API server may read none of them.
func TestUploadsOfHTTP2AreLimitedByTheirWindows(t *testing.T) {
	unread := func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }
	s := withLimits(t, func(l *limits) { l.requestMemory = 8 * 256 << 10 }, unread)
	client, dials := overHTTP2(t, s)
	get(t, client, "/version", "wrong") // makes the connection
	answers := make(chan int, 100)
	for range 14 {
		go func() {
			req, _ := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://agent-001/api/k8s/api/v1/pods",
				io.LimitReader(endless{}, 10<<20))
			req.Header.Set("Authorization", "Bearer "+token)
			if resp, err := client.Do(req); err == nil {
				answers <- resp.StatusCode
				_ = resp.Body.Close()
			}
		}()
	}
	refusedUploads := 0
	eventually(t, func() bool {
		for len(answers) > 0 {
			if code := <-answers; code != http.StatusTooManyRequests {
				t.Errorf("answered %d", code)
			}
			refusedUploads++
		}
		return refusedUploads+inUse(s) == 14
	})
	if refusedUploads < 15-1-8 || dials() != 1 {
		t.Errorf("%d uploads were refused; %d connections were made", refusedUploads, dials())
	}
	if resp := get(t, client, "/version", "wrong"); resp.StatusCode != http.StatusUnauthorized {
		t.Errorf("beside the uploads: %s", resp.Status)
	}
}

// TestUploadsOfHTTP2DoNotStallEachOther: as many as a connection takes, of which the API server reads only one.
func TestUploadsOfHTTP2DoNotStallEachOther(t *testing.T) {
	s := withLimits(t, func(l *limits) { l.requestMemory = 100 << 20 }, func(w http.ResponseWriter, r *http.Request) {
		if !strings.HasSuffix(r.URL.Path, "read") {
			<-r.Context().Done()
			return
		}
		n, _ := io.Copy(io.Discard, r.Body)
		_, _ = fmt.Fprint(w, n)
	})
	client, dials := overHTTP2(t, s)
	upload := func(ctx context.Context, path string) (*http.Response, error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://agent-001/api/k8s/api/v1/"+path,
			io.LimitReader(endless{}, 5<<20))
		if err != nil {
			return nil, err
		}
		req.Header.Set("Authorization", "Bearer "+token)
		return client.Do(req)
	}
	get(t, client, "/version", "wrong") // makes the connection
	ctx, cancel := context.WithCancel(t.Context())
	var stuck sync.WaitGroup
	for range 14 {
		stuck.Go(func() {
			if resp, err := upload(ctx, "stuck"); err == nil {
				t.Errorf("answered %s", resp.Status)
			}
		})
	}
	// Each has sent what it may when the agent has received as much as the API server's windows take.
	received := func() float64 { return testutil.ToFloat64(s.metrics.received) }
	eventually(t, func() bool {
		before := received()
		time.Sleep(50 * time.Millisecond)
		return inUse(s) == 14 && before > 0 && received() == before
	})
	resp, err := upload(t.Context(), "read")
	if err != nil {
		t.Fatal(err)
	}
	if body, err := io.ReadAll(resp.Body); string(body) != fmt.Sprint(5<<20) || dials() != 1 {
		t.Errorf("the API server read %s bytes, %v; %d connections were made", body, err, dials())
	}
	cancel()
	stuck.Wait()
}

// TestGETOverHTTP2HasNoBody: net/http gives it one, which would be counted as an upload.
func TestGETOverHTTP2HasNoBody(t *testing.T) {
	s := withLimits(t, func(l *limits) { l.requestMemory = 60 << 10 }, func(_ http.ResponseWriter, r *http.Request) {
		if r.ContentLength != 0 {
			t.Errorf("the API server gets a body of %d bytes", r.ContentLength)
		}
	})
	client, _ := overHTTP2(t, s)
	if resp := get(t, client, "/api/v1/pods", token); resp.StatusCode != http.StatusOK {
		t.Errorf("answered %s", resp.Status)
	}
}

// frame returns a frame of HTTP/2.
func frame(kind, flags byte, stream uint32, payload string) string {
	n := len(payload)
	head := []byte{byte(n >> 16), byte(n >> 8), byte(n), kind, flags}
	return string(binary.BigEndian.AppendUint32(head, stream)) + payload
}

// noWindow begins a connection of HTTP/2 whose caller takes no body.
var noWindow = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, "\x00\x04\x00\x00\x00\x00")

// rawHTTP2 opens a connection for frames.
func rawHTTP2(t *testing.T, client *http.Client) net.Conn {
	t.Helper()
	transport := client.Transport.(*http.Transport)
	conn, err := transport.DialContext(t.Context(), "tcp", "")
	if err != nil {
		t.Fatal(err)
	}
	config := transport.TLSClientConfig.Clone()
	config.NextProtos = []string{"h2"}
	secure := tls.Client(conn, config)
	t.Cleanup(func() { _ = conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	return secure
}

// TestHeadersOfHTTP2AreLimited: those that do not end, and those of requests that net/http answers itself, which wait
// for a caller who reads no answer.
func TestHeadersOfHTTP2AreLimited(t *testing.T) {
	const request, short, static = "\x82\x84\x87", "\x00\x02aa\x00", "\x95" // GET / https, two fields
	for what, block := range map[string]string{
		"unfinished":           frame(1, 1, 1, request+strings.Repeat(short, 3000)) + frame(9, 0, 1, short),
		"unfinished, one byte": frame(1, 1, 1, request+strings.Repeat(static, 3700)),
		"invalid":              frame(1, 5, 1, request+strings.Repeat(short, 3000)+"\x00\x0aconnection\x01x"),
		"too large":            frame(1, 5, 1, request+strings.Repeat(static, 3800)),
	} {
		t.Run(what, func(t *testing.T) {
			s := withLimits(t, func(l *limits) { l.headerMemory = 1 << 20 }, events(nil))
			client, _ := overHTTP2(t, s)
			for range 20 {
				_, _ = io.WriteString(rawHTTP2(t, client), noWindow+block) // fails if the agent has closed it already
			}
			eventually(t, func() bool { return refused(s, "header_memory") >= 14 })
			if resp := get(t, client, "/version", token); resp.StatusCode != http.StatusOK {
				t.Errorf("answered %s", resp.Status)
			}
		})
	}
}

// TestBodiesOfStrangersAreLimited: those of requests that net/http answers itself, too, and does not read.
func TestBodiesOfStrangersAreLimited(t *testing.T) {
	s := withLimits(t, func(l *limits) { l.headerMemory = 8 << 20 }, events(nil))
	client, _ := overHTTP2(t, s)
	requests := noWindow
	for stream := uint32(1); stream < 30; stream += 2 {
		requests += frame(1, 4, stream, "\x83\x84\x87\x00\x0aconnection\x01x") // POST, answered with 400
	}
	for range 5 {
		conn := rawHTTP2(t, client)
		_, _ = io.WriteString(conn, requests)
		for stream := uint32(1); stream < 30; stream += 2 {
			_, _ = io.WriteString(conn, strings.Repeat(frame(0, 0, stream, strings.Repeat("x", 16<<10)), 16))
		}
	}
	eventually(t, func() bool { return refused(s, "header_memory") >= 3 })
	if resp := get(t, client, "/version", token); resp.StatusCode != http.StatusOK {
		t.Errorf("answered %s", resp.Status)
	}
}

// TestLargeTrailersCloseTheConnection: net/http keeps those that the headers have announced.
func TestLargeTrailersCloseTheConnection(t *testing.T) {
	s := withLimits(t, func(*limits) {}, events(nil))
	client, _ := overHTTP2(t, s)
	conn := rawHTTP2(t, client)
	request := frame(1, 4, 1, "\x83\x84\x87\x00\x0aconnection\x01x\x00\x07trailer\x02zz")
	_, _ = io.WriteString(conn, noWindow+request+frame(1, 5, 1, strings.Repeat("\x00\x02zz\x00", 100)))
	eventually(t, func() bool { return limitInUse(s, "connections") == "0" })
}

// TestTrailersWithoutABodyKeepNoRequest: of HTTP/2, which net/http would keep open at the API server.
func TestTrailersWithoutABodyKeepNoRequest(t *testing.T) {
	s := withLimits(t, func(*limits) {}, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(w, r.Body)
		if len(r.Trailer) > 0 {
			t.Error("the API server gets trailers")
		}
	})
	client, _ := overHTTP2(t, s)
	conn := rawHTTP2(t, client)
	request := "\x82\x87\x04\x12/api/k8s/api/v1/xx\x00\x07trailer\x01a\x00\x0dauthorization"
	bearer := "Bearer " + token
	if _, err := io.WriteString(conn, noWindow+frame(1, 5, 1, request+string(rune(len(bearer)))+bearer)); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() bool { return testutil.CollectAndCount(s.metrics.kube) == 1 })
}

// TestCallerOfHTTP2WhoReadsNothingIsNotRead: else net/http would keep 10,000 answers to PINGs before it closes the
// connection. It may do so all the same if all come before the first write waits, so there are several tries.
func TestCallerOfHTTP2WhoReadsNothingIsNotRead(t *testing.T) {
	s := withLimits(t, func(*limits) {}, events(nil))
	client, _ := overHTTP2(t, s)
	pings := strings.Repeat(frame(6, 0, 0, "12345678"), 1000)
	var err error
	for try := 0; try < 100 && !errors.Is(err, os.ErrDeadlineExceeded); try++ {
		conn := rawHTTP2(t, client)
		_, err = io.WriteString(conn, noWindow)
		_ = conn.SetDeadline(time.Now().Add(time.Second))
		for n := 0; err == nil; n++ {
			if _, err = io.WriteString(conn, pings); n > 10_000 {
				t.Fatal("the agent reads without end")
			}
		}
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error(err)
	}
	// Nor does frpc keep what is not read.
	eventually(t, func() bool { return limitInUse(s, "connections") == "0" })
}

// TestHTTP1InAConnectionOfHTTP2IsNotServed: nobody would count its headers.
func TestHTTP1InAConnectionOfHTTP2IsNotServed(t *testing.T) {
	client, _ := overHTTP2(t, withLimits(t, func(*limits) {}, events(nil)))
	conn := rawHTTP2(t, client)
	_, _ = io.WriteString(conn, "GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
	if answer, err := io.ReadAll(conn); len(answer) > 0 {
		t.Errorf("answered %q, %v", answer, err)
	}
}

// TestReservedBitOfAStreamHidesNoHeaders: those of later streams are counted as before.
func TestReservedBitOfAStreamHidesNoHeaders(t *testing.T) {
	s := withLimits(t, func(l *limits) { l.headerMemory = 1 << 20 }, events(nil))
	client, _ := overHTTP2(t, s)
	block := "\x82\x84\x87" + strings.Repeat("\x00\x02aa\x00", 3000) + "\x00\x0aconnection\x01x" // answered with 400
	for range 20 {
		_, _ = io.WriteString(rawHTTP2(t, client),
			noWindow+frame(1, 5, 1<<31|1, "\x82\x84\x87")+frame(1, 5, 3, block)+frame(1, 5, 5, block))
	}
	eventually(t, func() bool { return refused(s, "header_memory") >= 14 })
}

// limitInUse returns what the metrics say of a limit.
func limitInUse(s *Server, limit string) string {
	answer := httptest.NewRecorder()
	s.metrics.handler.ServeHTTP(answer, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	_, value, _ := strings.Cut(answer.Body.String(), `limit_in_use{limit="`+limit+`"} `)
	value, _, _ = strings.Cut(value, "\n")
	return value
}

// TestRefusedStreamsAreForgotten: a client sends up to 100 requests before it knows how many may run, and some after
// it was told to use another connection. That a watch runs beside them changes nothing.
func TestRefusedStreamsAreForgotten(t *testing.T) {
	burst := ""
	for stream := uint32(3); stream < 200; stream += 2 {
		burst += frame(1, 5, stream, "\x82\x87\x04\x08/version") // whose answer is not read
	}
	resets := ""
	for stream := uint32(3); stream < 200; stream += 2 {
		resets += frame(3, 0, stream, "\x00\x00\x00\x08") // and then not wanted
	}
	for what, test := range map[string]struct {
		age   time.Duration
		watch bool
		sent  []string
	}{
		"too many":           {time.Hour, false, []string{burst + resets}},
		"beside a watch":     {time.Hour, true, []string{burst}},
		"after GOAWAY":       {0, true, []string{"", burst}},
		"reset after GOAWAY": {0, true, []string{"", burst + resets}},
	} {
		t.Run(what, func(t *testing.T) {
			s := withLimits(t, func(l *limits) { l.connectionAge = test.age }, events(nil))
			client, _ := overHTTP2(t, s)
			conn := rawHTTP2(t, client)
			bearer, first := "Bearer "+token, noWindow
			if test.watch {
				path := "/api/k8s/api/v1/pods?watch=1"
				first += frame(1, 5, 1, "\x82\x87\x04"+string(rune(len(path)))+path+"\x0f\x08"+string(rune(len(bearer)))+bearer)
			}
			frames := make(chan byte, 1000)
			go func() { // reads the answers
				defer close(frames)
				for in := bufio.NewReader(conn); ; {
					var head [9]byte
					if _, err := io.ReadFull(in, head[:]); err != nil {
						return
					}
					_, _ = in.Discard(int(binary.BigEndian.Uint32(head[:]) >> 8))
					frames <- head[3]
				}
			}()
			for i, sent := range test.sent {
				for i > 0 && <-frames != 7 { //nolint:revive // until GOAWAY
				}
				if _, err := io.WriteString(conn, first+sent); err != nil {
					t.Fatal(err)
				}
				first = ""
			}
			// A PING's answer shows that all was read.
			if _, err := io.WriteString(conn, frame(6, 0, 0, "12345678")); err != nil {
				t.Fatal(err)
			}
			for <-frames != 6 { //nolint:revive // until then
			}
			eventually(t, func() bool { return limitInUse(s, "header_memory_bytes") == "0" })
			if test.watch && inUse(s) != 1 {
				t.Error("the watch has ended")
			}
		})
	}
}

// TestCutConnectionsOfHTTP2LeaveNoMemory: net/http's timer for idle connections would keep each of those that a caller
// cuts during a request.
func TestCutConnectionsOfHTTP2LeaveNoMemory(t *testing.T) {
	s := withLimits(t, func(*limits) {}, events(nil))
	client, _ := overHTTP2(t, s)
	used := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	cut := func(n int) {
		for range n {
			conn := rawHTTP2(t, client)
			// A request with a body that does not come.
			_, _ = io.WriteString(conn, noWindow+frame(1, 4, 1, "\x83\x84\x87"+strings.Repeat("\x00\x02aa\x00", 10)))
			_, _ = io.ReadFull(conn, make([]byte, 9)) // its SETTINGS have arrived
			_ = conn.Close()
		}
		eventually(t, func() bool { return limitInUse(s, "connections") == "0" })
	}
	cut(10)
	before := used()
	cut(90)
	eventually(t, func() bool { return used() < before+500_000 })
}
