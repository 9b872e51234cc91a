package server

import (
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"testing"

	"k8s.io/client-go/rest"

	"github.com/pipeops/vm-agent/bootstrap/config"
	"github.com/pipeops/vm-agent/frpc/secret"
	"github.com/pipeops/vm-agent/proxy/access"
)

// BenchmarkCall is a small GET in each identity, without net/http's part on the caller's side, and with the API
// server's part: HTTP/2 over TLS.
func BenchmarkCall(b *testing.B) {
	answer := make([]byte, 2<<10)
	api := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(answer)
	}))
	api.EnableHTTP2 = true
	api.StartTLS()
	b.Cleanup(api.Close)
	upstream := &rest.Config{
		Host: api.URL, BearerToken: "agent", TLSClientConfig: rest.TLSClientConfig{Insecure: true},
	}
	gate, own := "Bearer "+token, "Bearer of-the-cluster"
	for identity, header := range map[string]http.Header{
		access.Agent: {"Authorization": {gate}},
		access.Named: {"Authorization": {gate}, "Impersonate-User": {"alice"}, "Impersonate-Group": {"developers"}},
		access.Own:   {"Authorization": {own}, "Pipeops-Agent-Authorization": {gate}},
	} {
		b.Run(identity, func(b *testing.B) {
			log := slog.New(slog.NewJSONHandler(io.Discard, nil)) //nolint:sloglint // to write a line is part of a call
			handler := serverWith(b, upstream, log, func(cfg *config.Config) {
				cfg.Agent.Token, cfg.Access.Identity = secret.Secret(token), identity
			}).handler(tunnel)
			b.ReportAllocs()
			for b.Loop() {
				r := httptest.NewRequest(http.MethodGet, "/api/k8s/api/v1/namespaces/default/pods/web-0", nil)
				r.Header = header.Clone()
				w := httptest.NewRecorder()
				if handler.ServeHTTP(w, r); w.Code != http.StatusOK || w.Body.Len() != len(answer) {
					b.Fatal(w.Code, w.Body)
				}
			}
		})
	}
}
