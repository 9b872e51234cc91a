package attack

import (
	"net/http"
	"time"
)

// HostileRunner answers every command with 10 MB of short headers, which is less than net/http's client takes.
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

// LoopRunner sends each command back to the agent as a command for the runner of that name, with nothing that tells it
// from a new one. Each is answered after all those that come after it.
func LoopRunner(agent Target, runner string) http.Handler {
	transport := agent.Transport(false)
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
