package server

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"k8s.io/client-go/rest"

	"github.com/pipeops/vm-agent/bootstrap/config"
)

// messages is a log handler that keeps the messages of records.
type messages struct {
	slog.Handler

	mu   sync.Mutex
	seen []string
}

func (m *messages) Enabled(context.Context, slog.Level) bool { return true }

func (m *messages) Handle(_ context.Context, r slog.Record) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.seen = append(m.seen, r.Message)
	return nil
}

func (m *messages) has(message string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, seen := range m.seen {
		if seen == message {
			return true
		}
	}
	return false
}

// serving is a server that runs, before an API server that answers when the test says so.
type serving struct {
	*Server
	*messages

	tunnel      string        // address
	slow, ready chan struct{} // closed to let the API server answer
	unready     atomic.Bool   // it does not answer /readyz at once
	stop        func()
	ended       chan error
}

// serve runs a server with changes of its configuration. The API server answers /slow, and /readyz while it is
// unready, when slow and ready are closed, and ends no watch.
func serve(t *testing.T, allow *atomic.Value, change func(*config.Config)) *serving {
	t.Helper()
	s := &serving{
		messages: &messages{}, slow: make(chan struct{}), ready: make(chan struct{}), ended: make(chan error, 1),
	}
	hold := map[string]chan struct{}{"/slow": s.slow, "/readyz": s.ready}
	api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Query().Has("watch"):
			silent(w, r)
		case strings.HasSuffix(r.URL.Path, "/configmaps/owner"):
			_, _ = fmt.Fprintf(w, `{"data":{"allow":%q}}`, allow.Load())
		case r.URL.Path == "/slow", r.URL.Path == "/readyz" && s.unready.Load():
			select {
			case <-hold[r.URL.Path]:
				_, _ = io.WriteString(w, `{"gitVersion":"v1.2.3"}`)
			case <-r.Context().Done():
			}
		case r.URL.Path == "/flood":
			flood(w, r)
		}
	}))
	t.Cleanup(func() {
		api.CloseClientConnections()
		api.Close()
	})
	// An address that no other test, and no connection that is being made, can take before Run does.
	host := fmt.Sprintf("127.%d.%d.%d", 1+rand.IntN(254), rand.IntN(256), 1+rand.IntN(254))
	free := func() string {
		socket, err := net.Listen("tcp", host+":0")
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = socket.Close() }()
		return socket.Addr().String()
	}
	s.Server = serverWith(t, &rest.Config{Host: api.URL}, slog.New(s.messages), func(cfg *config.Config) {
		cfg.Agent.Token, cfg.Proxy.DrainTimeout = token, time.Minute
		cfg.Proxy.ListenAddr, cfg.Proxy.MetricsAddr = free(), free()
		change(cfg)
	})
	s.tunnel = s.config.Proxy.ListenAddr
	ctx, cancel := context.WithCancel(t.Context())
	s.stop = cancel
	go func() { s.ended <- s.Run(ctx) }()
	eventually(t, func() bool { return s.has("serving") })
	return s
}

// asks sends a request, and returns where its answer will be.
func (s *serving) asks(t *testing.T, request string) <-chan string {
	t.Helper()
	got := make(chan string, 1)
	conn, err := net.Dial("tcp", s.tunnel)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(conn, request+" HTTP/1.1\r\nHost: a\r\n"+auth+"Content-Length: 0\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer func() { _ = conn.Close() }()
		_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
		var all strings.Builder
		buffer := make([]byte, 4096)
		for !whole(all.String()) {
			n, err := conn.Read(buffer)
			all.Write(buffer[:n])
			if err != nil {
				_, _ = fmt.Fprintf(&all, "(%v)", err)
				break
			}
		}
		got <- all.String()
	}()
	return got
}

// whole reports whether an answer has come to its end.
func whole(answer string) bool {
	head, body, found := strings.Cut(answer, "\r\n\r\n")
	var length int
	if _, rest, ok := strings.Cut(head, "\r\nContent-Length: "); found && ok {
		_, _ = fmt.Sscan(rest, &length)
		return len(body) >= length
	}
	return found && strings.HasSuffix(body, "0\r\n\r\n")
}

func wants(t *testing.T, what string, got <-chan string, parts ...string) {
	t.Helper()
	select {
	case answer := <-got:
		for _, part := range parts {
			if !strings.Contains(answer, part) || !whole(answer) {
				t.Errorf("%s: answered %q, want %q", what, answer, part)
			}
		}
	case <-time.After(10 * time.Second):
		t.Errorf("%s: no answer within 10 s", what)
	}
}

// TestDrainWaitsForWhatRuns: everything is answered until frpc has withdrawn the tunnel. Then watches end, new streams
// are told to try again, and calls are answered until the last connection is closed.
func TestDrainWaitsForWhatRuns(t *testing.T) {
	t.Parallel()
	s := serve(t, nil, func(*config.Config) {})
	const newWatch = "GET /api/k8s/api/v1/pods?watch=1"
	slow, watch := s.asks(t, "GET /api/k8s/slow"), s.asks(t, newWatch)
	eventually(t, func() bool { return inUse(s.Server) == 2 })
	begin := time.Now()
	s.stop()
	eventually(t, func() bool { return s.has("draining") })
	wants(t, "frpc's health check", s.asks(t, "GET /ready?only=shutdown"), "503 Service", "shutting down")
	late := s.asks(t, newWatch)
	wants(t, "a call before the tunnel is withdrawn", s.asks(t, "GET /api/k8s/quick"), "200 OK", "Connection: close")
	wants(t, "a watch", watch, "200 OK")
	if took := time.Since(begin); took < 2*time.Second {
		t.Errorf("watches end after %s, and frpc may not have withdrawn the tunnel", took)
	}
	wants(t, "a watch of before the tunnel was withdrawn", late, "200 OK", "Connection: close")
	wants(t, "a new watch", s.asks(t, newWatch), "503 Service", "Retry-After: 1\r\n", "Connection: close", shuttingDown)
	wants(t, "a call", s.asks(t, "GET /api/k8s/quick"), "200 OK", "Connection: close")
	wants(t, "a heartbeat", s.asks(t, "POST /api/agent/heartbeat"), "200 OK", "alive")
	<-time.After(time.Second) // as callers are told to wait
	wants(t, "a caller who tries again", s.asks(t, newWatch), "503 Service", "Retry-After: 1\r\n")
	<-time.After(3 * time.Second)
	if s.has("drained") || inUse(s.Server) != 1 {
		t.Errorf("drained, though %d requests run", inUse(s.Server))
	}
	s.unready.Store(true)
	last := s.asks(t, "GET /ready?only=kubernetes") // is not waited for
	eventually(t, func() bool { return s.metrics.inFlight[tunnel].Load() == 2 })
	close(s.slow)
	wants(t, "the call", slow, "200 OK", "v1.2.3")
	eventually(t, func() bool { // until Run waits for the last answers
		conn, err := net.Dial("tcp", s.tunnel)
		if err == nil {
			_ = conn.Close()
		}
		return errors.Is(err, syscall.ECONNREFUSED)
	})
	close(s.ready)
	wants(t, "the last request", last, "200 OK")
	if err := <-s.ended; err != nil || !s.has("drained") {
		t.Errorf("ended with %v", err)
	}
}

// TestDrainTimeoutCutsWhatIsLeft: with an answer that says that it may have taken effect, and not to repeat it blindly.
func TestDrainTimeoutCutsWhatIsLeft(t *testing.T) {
	t.Parallel()
	s := serve(t, nil, func(cfg *config.Config) { cfg.Proxy.DrainTimeout = 300 * time.Millisecond })
	call := s.asks(t, "POST /api/k8s/slow")
	eventually(t, func() bool { return inUse(s.Server) == 1 })
	begin := time.Now()
	s.stop()
	select {
	case answer := <-call:
		if !strings.Contains(answer, "504 Gateway Timeout") || !strings.Contains(answer, "took effect") ||
			strings.Contains(answer, "Retry-After") || time.Since(begin) > 2500*time.Millisecond {
			t.Errorf("answered %q after %s", answer, time.Since(begin))
		}
	case <-time.After(10 * time.Second):
		t.Fatal("not answered")
	}
	if err := <-s.ended; err != nil || s.has("drained") {
		t.Errorf("ended with %v", err)
	}
	if took := time.Since(begin); took < 5*time.Second {
		t.Errorf("ended after %s: whoever was refused, and tries again after 1 s, meets a closed port", took)
	}
}

// TestRunWatchesOverRequests: it ends those that stall, reviews the rights of streams, follows the token's file and, in
// the drain too, the owner's switch.
func TestRunWatchesOverRequests(t *testing.T) {
	t.Parallel()
	var allow atomic.Value
	allow.Store("all")
	file := filepath.Join(t.TempDir(), "token")
	write := func(token string) {
		if err := os.WriteFile(file, []byte(token), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(token)
	s := serve(t, &allow, func(cfg *config.Config) { cfg.Agent.TokenFile, cfg.Access.ConfigMap = file, "owner" })
	s.gate.mu.Lock()
	s.limits.stalledReads = 0
	s.gate.mu.Unlock()
	eventually(t, func() bool { return s.owner.State().Allow.String() == "all" })
	if _, resp, err := call(t, s.tunnel, "GET /api/k8s/flood"); err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("answered %v, %v", resp, err)
	}
	_ = s.asks(t, "GET /api/k8s/api/v1/pods?watch=1")
	eventually(t, func() bool { return refused(s.Server, "stalled_reads") == 1 && inUse(s.Server) == 1 })
	eventually(t, func() bool { return testutil.ToFloat64(s.metrics.reviewAge) > 0 })
	write("another")
	eventually(t, func() bool {
		return s.auth.check(http.Header{"Authorization": {"Bearer another"}}, "Authorization") == nil
	})

	slow := s.asks(t, "GET /api/k8s/slow")
	eventually(t, func() bool { return inUse(s.Server) == 2 })
	s.stop()
	eventually(t, func() bool { return s.has("draining") })
	allow.Store("none")
	wants(t, "a call that the owner forbids while the agent drains", slow, "403 Forbidden", "owner of this cluster")
	if err := <-s.ended; err != nil || !s.has("drained") {
		t.Errorf("ended with %v", err)
	}
}

// TestRunReportsAListenerThatFails: with the setting to correct.
func TestRunReportsAListenerThatFails(t *testing.T) {
	s := serverWith(t, &rest.Config{Host: "http://127.0.0.1:1"}, slog.New(slog.DiscardHandler), func(cfg *config.Config) {
		cfg.Proxy.MetricsAddr, cfg.Proxy.ListenAddr = "127.0.0.1:0", "192.0.2.1:1"
	})
	if err := s.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "PIPEOPS_LISTEN_ADDR") {
		t.Errorf("ended with %v", err)
	}
}

// TestOwnIdentitySendsNothingOfTheAgent: neither its token nor its client certificate goes with a caller's request.
func TestOwnIdentitySendsNothingOfTheAgent(t *testing.T) {
	certificates := t.TempDir()
	writeCertificate(t, certificates, 1)
	type seen struct {
		authorization string
		certificates  int
	}
	got := make(chan seen, 1)
	api := httptest.NewUnstartedServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		got <- seen{r.Header.Get("Authorization"), len(r.TLS.PeerCertificates)}
	}))
	api.TLS = &tls.Config{ClientAuth: tls.RequestClientCert}
	api.StartTLS()
	t.Cleanup(api.Close)
	for identity, want := range map[string]seen{"own": {"Bearer theirs", 0}, "agent": {"", 1}} {
		upstream := &rest.Config{Host: api.URL, TLSClientConfig: rest.TLSClientConfig{
			Insecure: true, CertFile: filepath.Join(certificates, "tls.crt"), KeyFile: filepath.Join(certificates, "tls.key"),
		}}
		s := serverWith(t, upstream, slog.New(slog.DiscardHandler), func(cfg *config.Config) {
			cfg.Agent.Token, cfg.Access.Identity = token, identity
		})
		r := httptest.NewRequest(http.MethodGet, "/api/k8s/version", nil)
		r.Header.Set("Authorization", "Bearer "+token)
		if identity == "own" {
			r.Header = http.Header{"Pipeops-Agent-Authorization": {"Bearer " + token}, "Authorization": {"Bearer theirs"}}
		}
		w := httptest.NewRecorder()
		s.handler(tunnel).ServeHTTP(w, r)
		if w.Code != http.StatusOK {
			t.Fatalf("%s: answered %d %s", identity, w.Code, w.Body)
		}
		if saw := <-got; saw != want {
			t.Errorf("%s: the API server saw %+v, want %+v", identity, saw, want)
		}
	}
}

// TestUpgradesCountAs101: in the metrics and the log, whatever ends them.
func TestUpgradesCountAs101(t *testing.T) {
	api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		_, _ = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
		_ = conn.Close()
	}))
	t.Cleanup(api.Close)
	log := &strings.Builder{}
	s := serverBefore(t, &rest.Config{Host: api.URL}, token, slog.New(slog.NewJSONHandler(log, nil)))
	conn, resp, err := call(t, listening(t, s), "GET /api/k8s/api/v1/namespaces/a/pods/p/exec HTTP/1.1\r\n"+
		"Connection: Upgrade\r\nUpgrade: websocket\r\nX-Rest:")
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols || resp.Header.Get("Pipeops-Agent") != "agent-001" {
		t.Fatalf("answered %v, %v", resp, err)
	}
	_ = conn.Close()
	eventually(t, func() bool { return inUse(s) == 0 && s.metrics.inFlight[tunnel].Load() == 0 })
	if n := testutil.ToFloat64(s.metrics.kube.WithLabelValues("connect", "101", "upgrade", "api_server")); n != 1 {
		t.Errorf("%v upgrades are counted", n)
	}
	var line struct{ Status int }
	lines := strings.Split(strings.TrimSpace(log.String()), "\n")
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &line); err != nil || line.Status != 101 {
		t.Errorf("logged %v %s", err, log)
	}
}
