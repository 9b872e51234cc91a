package integration

import (
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"k8s.io/client-go/rest"
)

// TestOnlyUndeliveredRequestsAreRetried checks the gateway. 503 with Retry-After makes client-go retry, so the
// gateway answers it to reads, and to writes that have certainly not reached the agent. To other writes it answers
// 502, and that the caller must look whether the write was done.
func TestOnlyUndeliveredRequestsAreRetried(t *testing.T) {
	t.Parallel()
	arrived := make(chan struct{}, 8)
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, "/api/") {
			_, _ = io.Copy(io.Discard, r.Body)
			arrived <- struct{}{}
			<-r.Context().Done() // it never answers
		}
	}))
	server.EnableHTTP2 = true
	server.StartTLS()
	t.Cleanup(func() { server.CloseClientConnections(); server.Close() })
	const path, mustLook = "/api/k8s/api/v1/namespaces/default/configmaps", "check whether the request took effect"
	for _, tunnel := range []string{"https", "http"} {
		t.Run(tunnel, func(t *testing.T) {
			w := connectedBy(t, tunnel, &rest.Config{Host: server.URL, BearerToken: "any",
				TLSClientConfig: rest.TLSClientConfig{Insecure: true}})
			client, base := w.client()
			want := func(what, method string, code int) {
				t.Helper()
				sent := ""
				if method == http.MethodPost {
					sent = "{}"
				}
				resp, body := exchange(t, client, method, base+path, http.Header{}, sent)
				again, look := resp.Header.Get("Retry-After") != "", strings.Contains(body, mustLook)
				if resp.StatusCode != code || again != (code == http.StatusServiceUnavailable) ||
					look != (code == http.StatusBadGateway) ||
					!strings.HasPrefix(body, `{"kind":"Status"`) {
					t.Errorf("%s, %s: %s, Retry-After %q: %s\nwant %d", what, method, resp.Status,
						resp.Header.Get("Retry-After"), body, code)
				}
			}
			for _, hop := range []struct {
				name         string
				kill, revive func() error
			}{
				{"proxy", func() error { w.agent.Proxy.Kill(); return nil }, w.agent.StartProxy},
				{"frpc", func() error { w.agent.Frpc.Kill(); return nil }, w.agent.StartFrpc},
				{"frps", func() error { w.cp.StopFrps(); return nil }, func() error { return w.cp.StartFrps(t.Context()) }},
			} {
				for method, code := range map[string]int{http.MethodGet: http.StatusServiceUnavailable,
					http.MethodPost: http.StatusBadGateway, http.MethodDelete: http.StatusBadGateway} {
					done := make(chan struct{})
					go func() {
						defer close(done)
						want(hop.name+" is killed on the way", method, code)
					}()
					<-arrived
					if err := hop.kill(); err != nil {
						t.Fatal(err)
					}
					<-done
					// Now it is away.
					code = http.StatusServiceUnavailable
					if tunnel == "http" && hop.name != "frps" && method != http.MethodGet {
						code = http.StatusBadGateway // frps's 404 does not say whether the request was delivered
					}
					want(hop.name+" is away", method, code)
					if err := hop.revive(); err != nil {
						t.Fatal(err)
					}
					w.waitAnswering()
				}
			}
		})
	}
	w := newWorld(t) // its agent has never started: nothing can have been delivered
	client, base := w.client()
	if resp, body := exchange(t, client, http.MethodDelete, base+path, http.Header{},
		""); resp.StatusCode != http.StatusServiceUnavailable || resp.Header.Get("Retry-After") == "" {
		t.Errorf("an agent that was never there: %s: %s", resp.Status, body)
	}
}
