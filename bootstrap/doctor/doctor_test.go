package doctor

import (
	"crypto/tls"
	"io"
	"log"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pipeops/vm-agent/bootstrap/config"
	"github.com/pipeops/vm-agent/bootstrap/lease"
	"github.com/pipeops/vm-agent/frpc"
)

const token = "hunter2"

// httpsAgent writes a lease with a tunnel of type https, and returns the configuration and the tunnel's certificate.
func httpsAgent(t *testing.T) (*config.Config, tls.Certificate) {
	t.Helper()
	cfg, err := config.Load("", map[string]string{
		"PIPEOPS_AGENT_ID": "agent-001", "PIPEOPS_AGENT_TOKEN": token, "PIPEOPS_INSTANCE": "pod-1",
		"PIPEOPS_FRP_TOKEN": "f", "PIPEOPS_RUN_DIR": t.TempDir(),
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := lease.Run(t.Context(), cfg, time.Minute, true, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	pair, err := tls.LoadX509KeyPair(filepath.Join(cfg.RunDir, frpc.CertFile), filepath.Join(cfg.RunDir, frpc.KeyFile))
	if err != nil {
		t.Fatal(err)
	}
	return cfg, pair
}

// TestDoctorUsesTLSOnAnHTTPSTunnel: where the tunnel is of type https, the proxy's tunnel listener answers only over
// TLS, and doctor trusts only the tunnel's certificate.
func TestDoctorUsesTLSOnAnHTTPSTunnel(t *testing.T) {
	proxy := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body := map[string]string{
			"/version": `{"version":"v1"}`, "/ready": `{"checks":{"kubernetes":{"ok":true}}}`,
		}[r.URL.Path]
		if strings.HasSuffix(r.URL.Path, "/selfsubjectaccessreviews") && r.Header.Get("Authorization") == "Bearer "+token {
			body = `{"status":{"allowed":true}}`
		}
		_, _ = io.WriteString(w, body)
	})
	operations := httptest.NewServer(proxy)
	defer operations.Close()
	cfg, pair := httpsAgent(t)
	_, otherPair := httpsAgent(t)
	for name, test := range map[string]struct {
		certificate *tls.Certificate // nil: no TLS
		proxy       string           // what doctor says of the step
		permissions string
	}{
		"the tunnel's certificate": {&pair, "version v1 serves", "may list pods, list nodes, keep runners"},
		"another certificate":      {&otherPair, "TLS with the proxy and the tunnel's certificate failed", "the proxy and the API server come first"},
		"no TLS":                   {nil, "TLS with the proxy and the tunnel's certificate failed", "the proxy and the API server come first"},
	} {
		t.Run(name, func(t *testing.T) {
			tunnel := httptest.NewUnstartedServer(proxy)
			tunnel.Config.ErrorLog = log.New(io.Discard, "", 0)
			if test.certificate == nil {
				tunnel.Start()
			} else {
				tunnel.TLS = &tls.Config{Certificates: []tls.Certificate{*test.certificate}, MinVersion: tls.VersionTLS12}
				tunnel.StartTLS()
			}
			defer tunnel.Close()
			cfg.Proxy.ListenAddr, cfg.Proxy.MetricsAddr = tunnel.Listener.Addr().String(), operations.Listener.Addr().String()
			p := &patient{cfg: cfg}
			if _, got := p.proxy(t.Context()); !strings.Contains(got, test.proxy) {
				t.Errorf("proxy: %s", got)
			}
			if _, got := p.permissions(t.Context()); got != test.permissions {
				t.Errorf("permissions: %s", got)
			}
		})
	}
}
