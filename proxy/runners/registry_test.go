package runners

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"k8s.io/client-go/rest"

	"github.com/pipeops/vm-agent/bootstrap/config"
	"github.com/pipeops/vm-agent/frpc/secret"
	"github.com/pipeops/vm-agent/proxy/answer"
	"github.com/pipeops/vm-agent/proxy/kube"
)

// registry is an API server that has the Secret of the registry; the integration tests have a real one.
type registry struct {
	mu   sync.Mutex
	data map[string][]byte
}

func (g *registry) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if r.Method == http.MethodPut {
		var written kube.Secret
		_ = json.NewDecoder(r.Body).Decode(&written)
		g.data = written.Data
	}
	stored := kube.Secret{Data: g.data}
	stored.ResourceVersion = "1"
	_ = json.NewEncoder(w).Encode(stored)
}

func (g *registry) processed(t *testing.T) (ids []string) {
	t.Helper()
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := json.Unmarshal(g.data["_processed"], &ids); err != nil {
		t.Fatal(err)
	}
	return ids
}

// before returns runners with a registry, whose endpoints may be in *.svc. Whatever is dialled leads to runner.
func before(t *testing.T, runner http.HandlerFunc) (r *Runners, g *registry, dials func() int) {
	t.Helper()
	g = &registry{data: map[string][]byte{}}
	api := httptest.NewServer(g)
	t.Cleanup(api.Close)
	client, err := kube.NewClient(&rest.Config{Host: api.URL}, func(*http.Request, float64) {})
	if err != nil {
		t.Fatal(err)
	}
	cfg := &config.Config{}
	cfg.Agent.ID, cfg.Runners.AllowedHosts, cfg.Kubernetes.Namespace = "agent-001", []string{"*.svc"}, "pipeops-system"
	r = New(client, cfg, func() {}, slog.New(slog.DiscardHandler))
	server := httptest.NewServer(runner)
	t.Cleanup(server.Close)
	var dialled atomic.Int32
	r.Transport.DialContext = func(ctx context.Context, network, _ string) (net.Conn, error) {
		dialled.Add(1)
		return (&net.Dialer{}).DialContext(ctx, network, server.Listener.Addr().String())
	}
	return r, g, func() int { return int(dialled.Load()) }
}

func assignment(id, endpoint string, token string) Assignment {
	return Assignment{ID: id, runner: runner{Endpoint: endpoint, Token: secret.Secret(token)}}
}

func (g *registry) store(id string, value any) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.data[id], _ = json.Marshal(value)
}

// relay sends a command with the headers to the runner r.
func relay(r *Runners, body io.Reader, headers ...string) *httptest.ResponseRecorder {
	req := httptest.NewRequest(http.MethodPost, "/api/runners/r/command", body)
	for i := 0; i < len(headers); i += 2 {
		req.Header.Add(headers[i], headers[i+1])
	}
	w := httptest.NewRecorder()
	r.Relay(w, req, "r", nil)
	return w
}

// TestAMessageIsAppliedOnce: the same id again changes nothing, whatever it says.
func TestAMessageIsAppliedOnce(t *testing.T) {
	r, g, _ := before(t, nil)
	for i, want := range []error{nil, ErrDuplicate} {
		endpoint := []string{"http://first.svc", "http://second.svc"}[i]
		if err := r.Assign(t.Context(), "m1", assignment("r", endpoint, "s3cret")); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", endpoint, err, want)
		}
	}
	if stored := string(g.data["r"]); !strings.Contains(stored, "first.svc") {
		t.Errorf("stored %s", stored)
	}
	if err := r.Unassign(t.Context(), "m1", "r"); !errors.Is(err, ErrDuplicate) || g.data["r"] == nil {
		t.Errorf("unassigned by an id that was used: %v", err)
	}
	if err := r.Unassign(t.Context(), "m2", "r"); err != nil || g.data["r"] != nil {
		t.Errorf("not unassigned: %v", err)
	}
}

// TestOldestMessagesAreForgotten: beyond 256 that changed the registry.
func TestOldestMessagesAreForgotten(t *testing.T) {
	r, g, _ := before(t, nil)
	var ids []string
	for i := range 256 {
		ids = append(ids, fmt.Sprint("m", i))
	}
	g.store("_processed", ids[:255])
	for i, id := range []string{"m255", "new"} {
		if err := r.Unassign(t.Context(), id, "r"); err != nil {
			t.Fatal(err)
		}
		want := append(slices.Clone(ids), "new")[i : 256+i]
		if got := g.processed(t); !slices.Equal(got, want) {
			t.Errorf("after %q it knows %d ids, %s to %s", id, len(got), got[0], got[len(got)-1])
		}
	}
}

// TestInvalidAssignmentsAreRefused: by the bounds of proxy/README.md.
func TestInvalidAssignmentsAreRefused(t *testing.T) {
	r, _, _ := before(t, nil)
	const host = "http://r.a.svc/"
	for name, test := range map[string]struct {
		a     Assignment
		valid bool
	}{
		"endpoint of 2,048 bytes": {assignment("r", host+strings.Repeat("a", 2048-len(host)), "t"), true},
		"endpoint of 2,049 bytes": {assignment("r", host+strings.Repeat("a", 2049-len(host)), "t"), false},
		"token of 8,192 bytes":    {assignment("r", host, strings.Repeat("t", 8192)), true},
		"token of 8,193 bytes":    {assignment("r", host, strings.Repeat("t", 8193)), false},
		"no token":                {assignment("r", host, ""), false},
		"token with a line break": {assignment("r", host, "t\r\nX-Remote-User:a"), false},
		"token with a space":      {assignment("r", host, "t t"), false},
		"token with a letter":     {assignment("r", host, "tä"), false},
		"id of 128 characters":    {assignment(strings.Repeat("r", 128), host, "t"), true},
		"id of 129 characters":    {assignment(strings.Repeat("r", 129), host, "t"), false},
		"id of the registry":      {assignment("_processed", host, "t"), false},
		"another host":            {assignment("r", "http://169.254.169.254/", "t"), false},
	} {
		err := r.Assign(t.Context(), name, test.a)
		_, invalid := errors.AsType[answer.InvalidError](err)
		if invalid == test.valid || test.valid && err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestRunnerGetsNothingOfTheCaller: neither the agent's token nor a cookie of the gateway, but its own token.
func TestRunnerGetsNothingOfTheCaller(t *testing.T) {
	got := make(chan *http.Request, 1)
	r, g, _ := before(t, func(_ http.ResponseWriter, req *http.Request) { got <- req })
	g.store("r", map[string]string{"runner_endpoint": "http://r.a.svc/run", "runner_token": "s3cret"})
	w := relay(r, strings.NewReader("{}"), "Authorization", "Bearer agents", "Cookie", "session=gateway",
		"X-Real-Ip", "192.0.2.1", "Pipeops-Agent-Authorization", "Bearer agents", "X-Remote-User", "admin", "Impersonate-User", "admin",
		"Upgrade", "websocket", "Connection", "Upgrade", "Sec-Websocket-Protocol", "base64url.bearer.authorization.k8s.io.eA",
		"X-Of-The-Command", "stays")
	if w.Code != http.StatusOK {
		t.Fatalf("answered %d %s", w.Code, w.Body)
	}
	req := <-got
	for _, name := range []string{
		"Cookie", "X-Real-Ip", "Pipeops-Agent-Authorization", "X-Remote-User", "Impersonate-User", "Upgrade",
		"Sec-Websocket-Protocol",
	} {
		if req.Header.Get(name) != "" {
			t.Errorf("the runner got %s: %s", name, req.Header.Get(name))
		}
	}
	if req.Header.Get("Authorization") != "Bearer s3cret" || req.Header.Get("X-Of-The-Command") != "stays" ||
		req.Header.Get("Via") != "1.1 agent-001" || req.Host != "r.a.svc" || req.URL.Path != "/run" {
		t.Errorf("the runner got %s %s %v", req.Host, req.URL, req.Header)
	}
	if w = relay(r, nil, "Via", "1.1 agent-001"); w.Code != http.StatusLoopDetected {
		t.Errorf("a command that loops: %d", w.Code)
	}
}

// TestStoredEndpointIsCheckedAgain: the setting may have changed since, and others may write the Secret.
func TestStoredEndpointIsCheckedAgain(t *testing.T) {
	r, g, dials := before(t, func(http.ResponseWriter, *http.Request) {})
	for _, endpoint := range []string{
		"http://elsewhere.example/", "http://169.254.169.254/", "file:///etc/passwd", "http://u:p@r.a.svc/",
	} {
		g.store("r", map[string]string{"runner_endpoint": endpoint, "runner_token": "s3cret"})
		if w := relay(r, nil); w.Code != http.StatusBadGateway || dials() != 0 {
			t.Errorf("%s: answered %d %s, %d dialled", endpoint, w.Code, w.Body, dials())
		}
	}
	g.store("r", map[string]string{"runner_endpoint": "http://r.a.svc/", "runner_token": "s3cret"})
	if w := relay(r, nil); w.Code != http.StatusOK || dials() != 1 {
		t.Errorf("an allowed one: answered %d %s", w.Code, w.Body)
	}
}

// TestCommandsAreLimited: 32 at a time, and the next is told when to try again.
func TestCommandsAreLimited(t *testing.T) {
	entered, release := make(chan struct{}), make(chan struct{})
	r, g, _ := before(t, func(http.ResponseWriter, *http.Request) {
		entered <- struct{}{}
		<-release
	})
	refused := 0
	r.refused = func() { refused++ }
	g.store("r", map[string]string{"runner_endpoint": "http://r.a.svc/", "runner_token": "s3cret"})
	var running sync.WaitGroup
	for range 32 {
		running.Go(func() {
			if w := relay(r, nil); w.Code != http.StatusOK {
				t.Errorf("answered %d %s", w.Code, w.Body)
			}
		})
		<-entered
	}
	if w := relay(r, nil); w.Code != http.StatusTooManyRequests || w.Header().Get("Retry-After") != "1" || refused != 1 ||
		r.Running() != 32 {
		t.Errorf("beside %d: answered %d %v, %d refused", r.Running(), w.Code, w.Header(), refused)
	}
	close(release)
	running.Wait()
	if r.Running() != 0 {
		t.Errorf("%d commands still count", r.Running())
	}
}

// TestSizesOfCommandsAreLimited: 10 MiB to a runner, 64 MiB and 16 KiB of headers from it. A cut answer does not look
// complete.
func TestSizesOfCommandsAreLimited(t *testing.T) {
	size, headers := 0, 0
	r, g, _ := before(t, func(w http.ResponseWriter, req *http.Request) {
		if _, err := io.Copy(io.Discard, req.Body); err != nil {
			return
		}
		w.Header().Set("X-Large", strings.Repeat("x", headers))
		w.Header().Set("Content-Length", fmt.Sprint(size))
		_, _ = io.CopyN(w, zeros{}, int64(size))
	})
	g.store("r", map[string]string{"runner_endpoint": "http://r.a.svc/", "runner_token": "s3cret"})
	for _, test := range []struct{ command, answer, headers, code int }{
		{10 << 20, 0, 15 << 10, http.StatusOK},
		{10<<20 + 1, 0, 0, http.StatusRequestEntityTooLarge},
		{0, 0, 32 << 10, http.StatusBadGateway},
	} {
		size, headers = test.answer, test.headers
		if w := relay(r, io.LimitReader(zeros{}, int64(test.command))); w.Code != test.code {
			t.Errorf("%+v: answered %d %s", test, w.Code, w.Body)
		}
	}
	headers = 0
	agent := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		r.Relay(w, req, "r", nil)
	}))
	defer agent.Close()
	for want, whole := range map[int]bool{64 << 20: true, 64<<20 + 1: false} {
		size = want
		resp, err := http.Get(agent.URL)
		if err != nil {
			t.Fatal(err)
		}
		n, err := io.Copy(io.Discard, resp.Body)
		_ = resp.Body.Close()
		if (err == nil) != whole || n > 64<<20 {
			t.Errorf("of %d bytes, %d came: %v", want, n, err)
		}
	}
}

// zeros is an endless body.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }
