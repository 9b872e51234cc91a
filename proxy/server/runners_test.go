package server

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"k8s.io/client-go/rest"

	"github.com/pipeops/vm-agent/proxy/kube"
)

// registry returns an API server whose registry holds one runner.
func registry(endpoint string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		data, _ := json.Marshal(map[string]string{"runner_endpoint": endpoint, "runner_token": "s3cret"})
		_ = json.NewEncoder(w).Encode(kube.Secret{Data: map[string][]byte{"r": data}})
	}
}

// TestFailedCommandsSayWhetherTheyMayBeDone: and what failed.
func TestFailedCommandsSayWhetherTheyMayBeDone(t *testing.T) {
	for answer, test := range map[string]struct {
		code int
		want string
	}{
		"HTTP/1.1 099 Odd\r\n\r\n":                 {502, "gave no valid answer: its status is 99: it may have done"},
		"HTTP/1.1 101 Switching Protocols\r\n\r\n": {502, "gave no valid answer: its status is 101: it may have done"},
		"HTTP/1.1 600 Odd\r\n\r\n":                 {502, "gave no valid answer: its status is 600: it may have done"},
		"HTTP/1.1 999 Odd\r\n\r\n":                 {502, "gave no valid answer: its status is 999: it may have done"},
		"SSH-2.0-OpenSSH_10.0\r\n":                 {502, "gave no valid answer: net/http: HTTP/1.x transport connection broken: malformed HTTP"},
		"":                                         {502, "broke off or gave no valid answer: EOF: it may have done"},
		"HTTP/1.1 103 Early Hints\r\n\r\n":         {502, "broke off"},
		"HTTP/1.1 599 Odd\r\nContent-Length: 4\r\n\r\nodd!": {599, "odd!"},
	} {
		t.Run(answer, func(t *testing.T) {
			listener, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = listener.Close() }()
			go func() {
				conn, err := listener.Accept()
				if err != nil {
					return
				}
				if r, err := http.ReadRequest(bufio.NewReader(conn)); err == nil {
					_, _ = io.Copy(io.Discard, r.Body)
				}
				_, _ = io.WriteString(conn, answer)
				_ = conn.Close()
			}()
			resp, body := command(t, "http://"+listener.Addr().String(), "")
			if resp.StatusCode != test.code || !strings.Contains(body, test.want) {
				t.Errorf("answered %s %s", resp.Status, body)
			}
		})
	}
	resp, body := command(t, "http://127.0.0.1:1", "")
	if resp.StatusCode != http.StatusBadGateway || !strings.Contains(body, "cannot be reached: dial tcp") ||
		strings.Contains(body, "may have") {
		t.Errorf("nobody listens: answered %s %s", resp.Status, body)
	}
}

const commandPath = "/api/runners/r/command"

// agentOf returns the tunnel listener's handler of an agent with one runner, on loopback.
func agentOf(t *testing.T, endpoint string) http.Handler {
	t.Helper()
	api := httptest.NewServer(registry(endpoint))
	t.Cleanup(api.Close)
	return serverBefore(t, &rest.Config{Host: api.URL}, token, slog.New(slog.DiscardHandler), "127.0.0.1").handler(tunnel)
}

// command sends a command to a runner on loopback through an agent.
func command(t *testing.T, endpoint, query string) (*http.Response, string) {
	t.Helper()
	agent := httptest.NewServer(agentOf(t, endpoint))
	defer agent.Close()
	return sendCommand(t, http.DefaultClient, agent.URL+commandPath+query, "do it")
}

func sendCommand(t *testing.T, client *http.Client, url, command string) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, strings.NewReader(command))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+token)
	req.Header.Set("Content-Type", "application/json")
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(body)
}

// TestRunnersAreNotBlamedForOthers: for a caller's broken body, or for the agent's shutdown.
func TestRunnersAreNotBlamedForOthers(t *testing.T) {
	ctx, cut := context.WithCancelCause(t.Context())
	runner := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		if _, err := io.Copy(io.Discard, r.Body); err == nil {
			cut(kube.ErrShutdown)
			<-r.Context().Done()
		}
	}))
	defer runner.Close()
	agent := agentOf(t, runner.URL)
	for _, want := range []int{http.StatusBadRequest, http.StatusGatewayTimeout} {
		body := iotest.ErrReader(errors.New("invalid byte in chunk length"))
		if want == http.StatusGatewayTimeout {
			body = strings.NewReader("do it")
		}
		r := httptest.NewRequestWithContext(ctx, http.MethodPost, commandPath, body)
		r.Header.Set("Authorization", "Bearer "+token)
		w := httptest.NewRecorder()
		agent.ServeHTTP(w, r)
		if w.Code != want || strings.Contains(w.Body.String(), "may have") != (want == http.StatusGatewayTimeout) {
			t.Errorf("answered %d %s, want %d", w.Code, w.Body, want)
		}
	}
}

// TestCommandThatLoopsGets508: a command that this agent has relayed before.
func TestCommandThatLoopsGets508(t *testing.T) {
	_, _, handlers := newTest(t, token)
	for via, want := range map[string]int{
		"1.1 agent-001": http.StatusLoopDetected, "1.1 gateway, 1.1 agent-001, 1.1 x": http.StatusLoopDetected,
		"1.1 agent-0012": http.StatusBadGateway, "": http.StatusBadGateway, // no registry is read here
	} {
		r := httptest.NewRequest(http.MethodPost, "/api/runners/a/command", nil)
		r.Header.Set("Authorization", "Bearer "+token)
		if via != "" {
			r.Header.Set("Via", via)
		}
		w := httptest.NewRecorder()
		handlers[tunnel].ServeHTTP(w, r)
		if w.Code != want {
			t.Errorf("%q: answered %d %s, want %d", via, w.Code, w.Body, want)
		}
	}
}

// TestCommandsKeepTheirQuery: it follows the endpoint's own.
func TestCommandsKeepTheirQuery(t *testing.T) {
	runner := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, r.RequestURI)
	}))
	defer runner.Close()
	for _, test := range [][3]string{
		{"", "", "/x"}, {"?a=b", "", "/x?a=b"}, {"", "?c=d%20;e", "/x?c=d%20;e"}, {"?a=b", "?c=d", "/x?a=b&c=d"},
	} {
		if resp, body := command(t, runner.URL+"/x"+test[0], test[1]); resp.StatusCode != http.StatusOK || body != test[2] {
			t.Errorf("%q: answered %s %s", test, resp.Status, body)
		}
	}
}

// slowly sends a request, then one more byte of its body every 7 s, and returns the status line of the answer.
func slowly(t *testing.T, toAgent *pipes, request string) string {
	t.Helper()
	conn, err := toAgent.DialContext(t.Context(), "", "")
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	defer func() {
		_ = conn.Close()
		<-ended
	}()
	go func() {
		defer close(ended)
		_, err := io.WriteString(conn, request)
		for err == nil {
			time.Sleep(7 * time.Second)
			_, err = io.WriteString(conn, "x")
		}
	}()
	status, _ := bufio.NewReader(conn).ReadString('\n')
	return strings.TrimSpace(status)
}

// TestSlowBodiesTimeOut: of messages, commands, and small ones for the Kubernetes API. A large one is a stream,
// without a limit on the whole.
func TestSlowBodiesTimeOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _, toAgent, _ := serverOverPipes(t, func(w http.ResponseWriter, r *http.Request) {
			if strings.HasPrefix(r.URL.Path, "/slow") {
				_, _ = io.Copy(io.Discard, r.Body)
				return
			}
			registry("http://r.a.svc/")(w, r)
		})
		runnerOverPipes(t, s, func(_ http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) })
		for path, test := range map[string]struct {
			status string
			after  time.Duration
		}{
			messagePath:           {"HTTP/1.1 408 Request Timeout", 32 * time.Second},
			commandPath:           {"HTTP/1.1 408 Request Timeout", 5 * time.Minute},
			"/api/k8s/slow/small": {"HTTP/1.1 408 Request Timeout", 32 * time.Second},
			"/api/k8s/slow/large": {"HTTP/1.1 200 OK", 7 * 600 * time.Second},
		} {
			start := time.Now()
			begun := ""
			if strings.HasSuffix(path, "large") {
				begun = strings.Repeat("x", 256<<10)
			}
			status := slowly(t, toAgent, fmt.Sprintf(
				"POST %s HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n%sContent-Length: %d\r\n\r\n%s",
				path, auth, len(begun)+600, begun))
			if took := time.Since(start); status != test.status || took < test.after || took > test.after+10*time.Second {
				t.Errorf("%s: %q after %s", path, status, took)
			}
		}
	})
}

// runnerOverPipes starts a runner that s reaches over pipes.
func runnerOverPipes(t *testing.T, s *Server, handler http.HandlerFunc) {
	t.Helper()
	toRunner := newPipes()
	server := &http.Server{Handler: handler}
	go func() { _ = server.Serve(toRunner) }()
	transport := s.runners.Transport
	transport.DialContext = toRunner.DialContext
	t.Cleanup(func() {
		transport.CloseIdleConnections()
		_ = server.Close()
	})
}

// TestSilentRunnersTimeOut: 30 s after the command's last byte, and 5 minutes after its first.
func TestSilentRunnersTimeOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, client, _, _ := serverOverPipes(t, registry("http://r.a.svc/"))
		ended := make(chan struct{})
		runnerOverPipes(t, s, func(_ http.ResponseWriter, r *http.Request) {
			if r.URL.RawQuery == "reads" {
				_, _ = io.Copy(io.Discard, r.Body)
			}
			<-ended
		})
		for query, want := range map[string]time.Duration{"reads": 30 * time.Second, "sleeps": 5 * time.Minute} {
			start := time.Now()
			resp, body := sendCommand(t, client, "http://agent.example"+commandPath+"?"+query, strings.Repeat("x", 1<<20))
			if took := time.Since(start); resp.StatusCode != http.StatusGatewayTimeout ||
				!strings.Contains(body, "may have done the command") || took.Round(time.Second) != want {
				t.Errorf("%s: after %s answered %s %s", query, took, resp.Status, body)
			}
		}
		close(ended)
		time.Sleep(time.Second) // for as long net/http keeps a connection on which a body was not read
	})
}

// TestSilentRegistryTimesOut: an API server that never answers delays messages and commands by 10 s.
func TestSilentRegistryTimesOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, _, _ := overPipes(t, func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
		for _, path := range []string{commandPath, messagePath} {
			start := time.Now()
			resp, body := sendCommand(t, client, "http://agent.example"+path,
				`{"id":"1","type":"runner_unassigned","data":{"runner_id":"r"}}`)
			if took := time.Since(start); resp.StatusCode != http.StatusGatewayTimeout ||
				!strings.Contains(body, "API server") || took.Round(time.Second) != 10*time.Second {
				t.Errorf("%s: after %s answered %s %s", path, took, resp.Status, body)
			}
		}
	})
}
