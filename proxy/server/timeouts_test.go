package server

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"k8s.io/client-go/rest"

	"github.com/pipeops/vm-agent/proxy/kube"
)

// These tests take hours on the clock of testing/synctest, which jumps ahead when all goroutines wait. It does not
// support sockets, so connections are pipes; the servers and transports at their ends are real.

// pipes is a listener and its dialer.
type pipes struct {
	conns chan net.Conn
	done  chan struct{}
	dials atomic.Int32
	hang  atomic.Bool           // new connections are silent
	lost  atomic.Pointer[lossy] // the last connection that was dialled
}

func newPipes() *pipes { return &pipes{conns: make(chan net.Conn), done: make(chan struct{})} }

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case conn := <-p.conns:
		return conn, nil
	case <-p.done:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error   { close(p.done); return nil }
func (p *pipes) Addr() net.Addr { return &net.TCPAddr{} }

func (p *pipes) DialContext(ctx context.Context, _, _ string) (net.Conn, error) {
	client, server := net.Pipe()
	select {
	case p.conns <- server:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	p.dials.Add(1)
	conn := &lossy{Conn: client}
	conn.gone.Store(p.hang.Load())
	p.lost.Store(conn)
	return conn, nil
}

// lossy is a connection whose other end can disappear without closing it.
type lossy struct {
	net.Conn

	gone atomic.Bool
}

func (l *lossy) Write(b []byte) (int, error) {
	if l.gone.Load() {
		return len(b), nil
	}
	return l.Conn.Write(b)
}

// overPipes starts the agent's server and an API server, and returns a client and the pipes to each.
func overPipes(t *testing.T, handler http.HandlerFunc) (client *http.Client, toAgent, toAPI *pipes) {
	t.Helper()
	_, client, toAgent, toAPI = serverOverPipes(t, handler)
	return client, toAgent, toAPI
}

func serverOverPipes(t *testing.T, handler http.HandlerFunc) (s *Server, client *http.Client, toAgent, toAPI *pipes) {
	t.Helper()
	toAgent, toAPI = newPipes(), newPipes()
	certificates := httptest.NewUnstartedServer(nil)
	certificates.StartTLS()
	certificates.Close()
	api := &http.Server{Handler: handler, TLSConfig: &tls.Config{
		Certificates: certificates.TLS.Certificates, NextProtos: []string{"h2"},
		SessionTicketsDisabled: true, // it would write them while the client writes: a pipe has no room for that
	}, HTTP2: &http.HTTP2Config{MaxConcurrentStreams: 2}, ErrorLog: log.New(io.Discard, "", 0)}
	go func() { _ = api.ServeTLS(toAPI, "", "") }()
	quiet := slog.New(slog.DiscardHandler)
	s = serverBefore(t, &rest.Config{
		Host: "https://api.example", Dial: toAPI.DialContext, TLSClientConfig: rest.TLSClientConfig{Insecure: true},
	}, token, quiet)
	agent := newHTTPServer(t.Context(), tunnel, s.handler(tunnel), quiet)
	go func() { _ = agent.Serve(toAgent) }()
	transport := &http.Transport{DialContext: toAgent.DialContext}
	t.Cleanup(func() {
		transport.CloseIdleConnections()
		_ = agent.Close()
		_ = api.Close()
	})
	return s, &http.Client{Transport: transport}, toAgent, toAPI
}

// begin sends a request and returns when the answer begins.
func begin(ctx context.Context, t *testing.T, client *http.Client, method, path string) *http.Response {
	t.Helper()
	req, err := http.NewRequestWithContext(ctx, method, "http://agent.example"+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+token)
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	return resp
}

func ask(t *testing.T, client *http.Client, method, path string) (*http.Response, string) {
	t.Helper()
	resp := begin(t.Context(), t, client, method, path)
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(body)
}

// TestDeadConnectionIsDetectedWithinAMinute: the API server's end disappears without closing the connection. A GET is
// repeated over another connection; all else gets a 502.
func TestDeadConnectionIsDetectedWithinAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, _, toAPI := overPipes(t, func(w http.ResponseWriter, _ *http.Request) {
			_, _ = io.WriteString(w, "answered")
		})
		for _, test := range []struct {
			method, body string
			code         int
		}{
			{http.MethodGet, "answered", http.StatusOK},
			{http.MethodPost, "check whether the request took effect", http.StatusBadGateway},
		} {
			if resp, body := ask(t, client, http.MethodGet, "/api/k8s/version"); resp.StatusCode != http.StatusOK {
				t.Fatalf("before: %s %s", resp.Status, body)
			}
			dials := toAPI.dials.Load()
			toAPI.lost.Load().gone.Store(true)
			start := time.Now()
			resp, body := ask(t, client, test.method, "/api/k8s/api/v1/namespaces")
			if resp.StatusCode != test.code || !strings.Contains(body, test.body) {
				t.Errorf("%s: answered %s %s", test.method, resp.Status, body)
			}
			if took := time.Since(start); took > time.Minute {
				t.Errorf("%s: detected after %s", test.method, took)
			}
			if again := toAPI.dials.Load() - dials; again != map[string]int32{http.MethodGet: 1}[test.method] {
				t.Errorf("%s: %d further connections", test.method, again)
			}
		}
	})
}

// TestNoTimeoutEndsAWatch: a watch that is silent for a day gets its next event.
func TestNoTimeoutEndsAWatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, _, _ := overPipes(t, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			_, _ = io.WriteString(w, "first\n")
			_ = http.NewResponseController(w).Flush()
			time.Sleep(24 * time.Hour)
			_, _ = io.WriteString(w, "second\n")
		})
		resp, body := ask(t, client, http.MethodGet, "/api/k8s/api/v1/pods?watch=true")
		if resp.StatusCode != http.StatusOK || body != "first\nsecond\n" {
			t.Errorf("answered %s %q", resp.Status, body)
		}
	})
}

// TestSlowHeadersTimeOut: with the token too.
func TestSlowHeadersTimeOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, toAgent, toAPI := overPipes(t, func(http.ResponseWriter, *http.Request) {})
		conn, err := toAgent.DialContext(t.Context(), "", "")
		if err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		dripped := make(chan struct{})
		go func() {
			defer close(dripped)
			_, err := io.WriteString(conn, "GET /api/k8s/version HTTP/1.1\r\nAuthorization: Bearer "+token+"\r\nX-Slow: ")
			for err == nil {
				time.Sleep(time.Second)
				_, err = io.WriteString(conn, "x")
			}
		}()
		_, _ = io.Copy(io.Discard, conn)
		<-dripped
		if took := time.Since(start); took > time.Minute || toAPI.dials.Load() != 0 {
			t.Errorf("cut off after %s; %d connections to the API server", took, toAPI.dials.Load())
		}
	})
}

// TestIdleConnectionsOutliveThoseOfFrps: frps reuses a connection that was idle for up to 60 s; its request would be
// lost if this end closed first.
func TestIdleConnectionsOutliveThoseOfFrps(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, toAgent, _ := overPipes(t, func(http.ResponseWriter, *http.Request) {})
		conn, err := toAgent.DialContext(t.Context(), "", "")
		if err != nil {
			t.Fatal(err)
		}
		answers := bufio.NewReader(conn)
		for range 2 {
			if _, err := io.WriteString(conn, "GET /metrics HTTP/1.1\r\nHost: agent.example\r\n"+auth+"\r\n"); err != nil {
				t.Fatal(err)
			}
			resp, err := http.ReadResponse(answers, nil)
			if err != nil {
				t.Fatal(err)
			}
			_, _ = io.Copy(io.Discard, resp.Body)
			time.Sleep(90 * time.Second)
		}
	})
}

// TestHangingDialBlocksNoOtherRequest: while one request waits for a connection that is never made, another uses an
// open one.
func TestHangingDialBlocksNoOtherRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, _, toAPI := overPipes(t, func(w http.ResponseWriter, r *http.Request) {
			if r.URL.RawQuery == "" {
				return
			}
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
		})
		var watches []context.CancelFunc
		for range 2 { // as many as one connection carries
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			resp := begin(ctx, t, client, http.MethodGet, "/api/k8s/api/v1/pods?watch=true")
			defer func() { _ = resp.Body.Close() }()
			watches = append(watches, cancel)
		}
		toAPI.hang.Store(true)
		waits := make(chan struct{})
		go func() {
			defer close(waits)
			_, _ = ask(t, client, http.MethodGet, "/api/k8s/version")
		}()
		synctest.Wait()
		watches[0]()
		synctest.Wait()
		start := time.Now()
		resp, body := ask(t, client, http.MethodGet, "/api/k8s/version")
		if took := time.Since(start); resp.StatusCode != http.StatusOK || took > time.Second {
			t.Errorf("after %s: %s %s", took, resp.Status, body)
		}
		<-waits
	})
}

// TestUnsentBodyDelaysNoAnswer: nor does it keep the connection open.
func TestUnsentBodyDelaysNoAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, toAgent, _ := overPipes(t, func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, "refused early", http.StatusForbidden)
		})
		for request, want := range map[string]string{
			"GET /health HTTP/1.1\r\nHost: a\r\n":                                    "HTTP/1.1 200 OK",
			"POST /api/k8s/x HTTP/1.1\r\nHost: a\r\n":                                "HTTP/1.1 401 Unauthorized",
			"POST /nowhere HTTP/1.1\r\nHost: a\r\n":                                  "HTTP/1.1 404 Not Found",
			"POST /api/control-plane/message HTTP/1.1\r\nHost: a\r\n" + auth:         "HTTP/1.1 415 Unsupported Media Type",
			"POST /api/k8s/api/v1/pods HTTP/1.1\r\nHost: a\r\nX-A: large\r\n" + auth: "HTTP/1.1 403 Forbidden",
		} {
			conn, err := toAgent.DialContext(t.Context(), "", "")
			if err != nil {
				t.Fatal(err)
			}
			go func() { _, _ = fmt.Fprintf(conn, "%sContent-Length: %d\r\n\r\nabc", request, 1<<30) }()
			start := time.Now()
			answer, _ := io.ReadAll(conn)
			if status, _, _ := strings.Cut(string(answer), "\r\n"); status != want || time.Since(start) > time.Minute {
				t.Errorf("%.30q: after %s answered %q, want %q", request, time.Since(start), status, want)
			}
		}
	})
}

// lateClose is a connection to an API server that still delivers what the API server answers to its close.
type lateClose struct{ *net.TCPConn }

func (c lateClose) Close() error {
	_ = c.CloseWrite()
	time.AfterFunc(10*time.Second, func() { _ = c.TCPConn.Close() })
	return nil
}

// TestCutSessionDoesNotLookLikeSuccess: when the agent cuts a session, the API server ends the WebSocket regularly,
// which kubectl would take for the success of the command. It must not reach the caller.
func TestCutSessionDoesNotLookLikeSuccess(t *testing.T) {
	api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Connection", "Upgrade")
		w.Header().Set("Upgrade", "websocket")
		w.WriteHeader(http.StatusSwitchingProtocols)
		conn, buffer, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		_, _ = io.WriteString(conn, "hello")
		_, _ = io.Copy(io.Discard, buffer)
		_, _ = io.WriteString(conn, "goodbye")
		_ = conn.Close()
	}))
	defer api.Close()
	dial := func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := (&net.Dialer{}).DialContext(ctx, network, address)
		if err != nil {
			return nil, err
		}
		return lateClose{conn.(*net.TCPConn)}, nil
	}
	s := serverBefore(t, &rest.Config{Host: api.URL, Dial: dial}, token, slog.New(slog.DiscardHandler))
	streams, cut := context.WithCancelCause(t.Context())
	agent := httptest.NewUnstartedServer(s.handler(tunnel))
	agent.Config.BaseContext = func(net.Listener) context.Context { return streams }
	agent.Start()
	defer agent.Close()
	conn, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", agent.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	_, _ = io.WriteString(conn, "GET /api/k8s/api/v1/namespaces/a/pods/b/exec HTTP/1.1\r\nHost: a\r\n"+
		"Authorization: Bearer "+token+"\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
	answer := bufio.NewReader(conn)
	resp, err := http.ReadResponse(answer, nil)
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
		t.Fatal(resp, err)
	}
	if _, err := io.ReadFull(answer, make([]byte, len("hello"))); err != nil {
		t.Fatal(err)
	}
	cut(kube.ErrShutdown)
	if rest, err := io.ReadAll(answer); len(rest) > 0 {
		t.Errorf("after the cut the caller read %q, %v", rest, err)
	}
}

// TestSilentAPIServerTimesOut: one that speaks HTTP/1.1 and never answers.
func TestSilentAPIServerTimesOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, silentAPI := serverBeforeSilence(t)
		w := httptest.NewRecorder()
		r := httptest.NewRequest(http.MethodGet, "/api/k8s/version", nil)
		r.Header.Set("Authorization", "Bearer "+token)
		start := time.Now()
		s.handler(tunnel).ServeHTTP(w, r)
		if took := time.Since(start); w.Code != http.StatusGatewayTimeout || took > 2*time.Minute {
			t.Errorf("after %s answered %d %s", took, w.Code, w.Body)
		}
		_ = silentAPI.Close()
	})
}

// serverBeforeSilence returns a server, and an API server of plain HTTP that never answers.
func serverBeforeSilence(t *testing.T) (*Server, *pipes) {
	t.Helper()
	toAPI := newPipes()
	go func() {
		for {
			conn, err := toAPI.Accept()
			if err != nil {
				return
			}
			go func() { _, _ = io.Copy(io.Discard, conn) }()
		}
	}()
	config := &rest.Config{Host: "http://api.example", Dial: toAPI.DialContext}
	return serverBefore(t, config, token, slog.New(slog.DiscardHandler)), toAPI
}
