package doctor

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
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
	return httpsAgentWith(t, "7400")
}

func httpsAgentWith(t *testing.T, adminPort string) (*config.Config, tls.Certificate) {
	t.Helper()
	cfg, err := config.Load("", map[string]string{
		"PIPEOPS_AGENT_ID": "agent-001", "PIPEOPS_AGENT_TOKEN": token, "PIPEOPS_INSTANCE": "pod-1",
		"PIPEOPS_FRP_TOKEN": "f", "PIPEOPS_RUN_DIR": t.TempDir(), "PIPEOPS_FRP_ADMIN_PORT": adminPort,
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

// putCertificate gives the agent a configured certificate for names, which it uses from the next lease on.
func putCertificate(t *testing.T, cfg *config.Config, names ...string) (pair tls.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: names, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cfg.Proxy.CertFile, cfg.Proxy.KeyFile = filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	for file, block := range map[string]*pem.Block{
		cfg.Proxy.CertFile: {Type: "CERTIFICATE", Bytes: der}, cfg.Proxy.KeyFile: {Type: "PRIVATE KEY", Bytes: keyDER},
	} {
		if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if pair, err = tls.LoadX509KeyPair(cfg.Proxy.CertFile, cfg.Proxy.KeyFile); err != nil {
		t.Fatal(err)
	}
	return pair
}

// TestDoctorAcceptsACertificateOfTheOperator: it need have neither the agent's id nor a name that bootstrap knows.
func TestDoctorAcceptsACertificateOfTheOperator(t *testing.T) {
	proxy := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, `{"version":"v1"}`)
	})
	operations := httptest.NewServer(proxy)
	defer operations.Close()
	for _, names := range [][]string{{"edge.example", "other.example"}, {"*.edge.example"}} {
		cfg, _ := httpsAgent(t)
		pair := putCertificate(t, cfg, names...)
		if err := lease.Run(t.Context(), cfg, time.Minute, true, slog.New(slog.DiscardHandler)); err != nil {
			t.Fatal(err)
		}
		tunnel := httptest.NewUnstartedServer(proxy)
		tunnel.TLS = &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12}
		tunnel.StartTLS()
		cfg.Proxy.ListenAddr, cfg.Proxy.MetricsAddr = tunnel.Listener.Addr().String(), operations.Listener.Addr().String()
		p := &patient{cfg: cfg}
		if result, detail := p.proxy(t.Context()); result != ok {
			t.Errorf("%q: %s", names, detail)
		}
		if result, detail := p.configuration(t.Context()); result != warning || !strings.Contains(detail, "in 0 days") {
			t.Errorf("configuration: %s: %s", result, detail)
		}
		tunnel.Close()
	}
}

// TestDoctorSaysWhoRefuses: the agent's token is at fault only where the proxy refuses the token.
func TestDoctorSaysWhoRefuses(t *testing.T) {
	var code atomic.Int32
	var body atomic.Value
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(int(code.Load()))
		_, _ = io.WriteString(w, body.Load().(string))
	}))
	defer proxy.Close()
	cfg, _ := httpsAgent(t)
	cfg.Proxy.ListenAddr = proxy.Listener.Addr().String()
	const rbac = `selfsubjectaccessreviews is forbidden: User \"agent\" cannot create resource`
	for _, test := range []struct {
		code         int
		message      string // of a metav1.Status; "": the body is not JSON
		result, says string
	}{
		{401, "the agent refuses the request: the bearer token is not this agent's token", failed, "same agent.token"},
		{403, "the agent refuses the request: the owner of this cluster allows none", skipped, "the owner of this cluster"},
		{403, rbac, failed, "RBAC must let the agent ask"},
		{429, "the agent refuses the request: too many requests: try again", failed, "too many requests: try again"},
		{500, "", failed, "500 Internal Server Error"},
		{503, "", failed, "run doctor again"},
		{503, "apiserver is starting", failed, "apiserver is starting"},
		{201, "not a review, which allows nothing", warning, "may not list pods, list nodes, keep runners: grant it"},
	} {
		text := "busy"
		if test.message != "" {
			text = fmt.Sprintf(`{"kind":"Status","message":"%s"}`, test.message)
		}
		code.Store(int32(test.code))
		body.Store(text)
		p := &patient{cfg: cfg, answered: true}
		p.callers.ListenAddr = cfg.Proxy.ListenAddr
		result, detail := p.permissions(t.Context())
		if result != test.result || !strings.Contains(detail, test.says) ||
			strings.Contains(detail, "agent.token") != (test.code == 401) {
			t.Errorf("%d %q: %s: %s", test.code, test.message, result, detail)
		}
	}
}

// TestDoctorWaitsForATunnelThatBegins: whoever has just started the agent wants to know whether it works.
func TestDoctorWaitsForATunnelThatBegins(t *testing.T) {
	states := []string{"new", "running"}
	frpc := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = fmt.Fprintf(w, `{"https":[{"name":"agent-001.pod-1","type":"https","status":%q}]}`, states[0])
		states = states[min(1, len(states)-1):]
	}))
	defer frpc.Close()
	_, port, _ := net.SplitHostPort(frpc.Listener.Addr().String())
	cfg, _ := httpsAgentWith(t, port)
	if result, detail := (&patient{cfg: cfg}).tunnel(t.Context()); result != ok {
		t.Errorf("%s: %s", result, detail)
	}
}
