package attack

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"
)

// Assign assigns a runner to the agent, as its control plane does.
func (t Target) Assign(ctx context.Context, runner, endpoint string) error {
	message := fmt.Sprintf(`{"id": "assign-%s", "type": "runner_assigned", "timestamp": "2026-01-02T03:04:05Z", "data": {
		"runner_id": %[1]q, "runner_endpoint": %q, "runner_token": "secret",
		"assigned_at": "2026-01-02T03:04:05Z"}}`, runner, endpoint)
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, t.URL("/api/control-plane/message"),
		strings.NewReader(message))
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+t.Token)
	req.Header.Set("Content-Type", "application/json")
	resp, err := t.Transport(false).RoundTrip(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		answer, _ := io.ReadAll(resp.Body)
		return fmt.Errorf("assign runner %s: %s: %s", runner, resp.Status, answer)
	}
	return nil
}

// HostileRunner answers every command with 10 MB of short headers, which is below the limit of net/http's client.
func HostileRunner() http.Handler {
	answer := append([]byte("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n"), shortHeaders(10_000_000)...)
	answer = append(answer, "\r\n"...)
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			panic(err)
		}
		defer func() { _ = conn.Close() }()
		_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
		_, _ = conn.Write(answer)
	})
}

// LoopRunner sends each command back to the agent as a command for the runner with the given name. Nothing
// distinguishes it from a new command, so each is answered only after all that follow it.
func LoopRunner(agent Target, runner string) http.Handler {
	agent.TLS = cheap(agent.TLS)
	transport := agent.from("127.0.0.2").Transport(false)
	transport.ResponseHeaderTimeout = 0
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		again, err := http.NewRequestWithContext(r.Context(), http.MethodPost, agent.URL(commandPath(runner)), http.NoBody)
		if err != nil {
			panic(err)
		}
		again.Header.Set("Authorization", "Bearer "+agent.Token)
		resp, err := transport.RoundTrip(again)
		if err != nil {
			w.WriteHeader(http.StatusBadGateway)
			return
		}
		_ = resp.Body.Close()
		w.WriteHeader(resp.StatusCode)
	})
}
