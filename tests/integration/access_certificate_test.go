package integration

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/pipeops/vm-agent/tests/harness"
)

// shows returns a client that reaches an agent through frps, with a client certificate if there is one. It opens a
// connection for each request.
func (w *world) shows(certificates ...tls.Certificate) *http.Client {
	w.t.Helper()
	addr, config := w.cp.Direct(agentID)
	config.Certificates = certificates
	transport := &http.Transport{TLSClientConfig: config, DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "tcp", addr)
		}}
	w.t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: 20 * time.Second}
}

// status requests a path and returns the status, or why there was no answer.
func status(ctx context.Context, client *http.Client, url string, header http.Header) (int, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0, err
	}
	req.Header = header
	resp, err := client.Do(req)
	if err != nil {
		return 0, err
	}
	return resp.StatusCode, resp.Body.Close()
}

// TestClientCertificates lets in callers with a certificate of the CA that the file holds now, and nobody else.
func TestClientCertificates(t *testing.T) {
	t.Parallel()
	ca, next := harness.NewAuthority(t), harness.NewAuthority(t)
	file := writeFile(t, "ca.crt", ca.PEM)
	w := connectedAs(t, "agent", "PIPEOPS_PROXY_TLS_CLIENT_CA_FILE="+file)
	_, config := w.cp.Direct(agentID)
	base := "https://" + config.ServerName
	version := base + "/api/k8s/version"
	good, header := ca.Pair(t, "alice"), w.header("alice")
	refused := func(what string, client *http.Client) {
		t.Helper()
		if code, err := status(t.Context(), client, base+"/health", nil); err == nil {
			t.Errorf("%s: answered %d", what, code)
		}
	}
	if code, err := status(t.Context(), w.shows(good), version, header); code != http.StatusOK {
		t.Errorf("a good certificate: %d, %v", code, err)
	}
	if code, err := status(t.Context(), w.shows(good), version, nil); code != http.StatusUnauthorized {
		t.Errorf("a good certificate, no token: %d, %v", code, err)
	}
	refused("no certificate", w.shows())
	refused("another CA", w.shows(next.Pair(t, "alice")))
	for what, change := range map[string]func(*x509.Certificate){
		"expired":       func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) },
		"not yet valid": func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) },
		"of a server":   func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} },
	} {
		refused(what, w.shows(ca.Pair(t, "alice", change)))
	}

	// The listener answers frpc's health check in plain HTTP, so that frpc keeps the tunnel, and nothing else.
	plain := "http" + strings.TrimPrefix(w.agent.Tunnel, "https")
	for path, want := range map[string]int{
		"/ready?only=shutdown": http.StatusOK, "/ready": http.StatusMisdirectedRequest,
		"/ready?only=shutdown&a": http.StatusMisdirectedRequest, "/health": http.StatusMisdirectedRequest,
		"/api/k8s/version": http.StatusMisdirectedRequest, "/api/agent/status": http.StatusMisdirectedRequest,
	} {
		if code, err := status(t.Context(), http.DefaultClient, plain+path, header); code != want {
			t.Errorf("plain %s: %d, want %d, %v", path, code, want, err)
		}
	}
	checks := func() float64 {
		return value(scrape(t, w.agent.Operations), "http_requests_total",
			map[string]string{"route": "/ready", "code": "200"})
	}
	before := checks()
	eventually(t, func() error {
		if now := checks(); now < before+3 {
			return fmt.Errorf("%v health checks of frpc", now-before)
		}
		return nil
	})
	if code, err := status(t.Context(), w.shows(good), version, header); code != http.StatusOK {
		t.Errorf("after health checks: %d, %v", code, err)
	}

	// Another CA, and then none.
	certificate := good
	for _, step := range []struct {
		what    string
		content []byte
		next    *harness.Authority
	}{{"another CA", next.PEM, next}, {"no CA", nil, nil}} {
		watch := w.through(w.shows(certificate), base, "/api/k8s/api/v1/namespaces/"+w.ns+"/configmaps?watch=true", header)
		if err := os.WriteFile(file, step.content, 0o600); err != nil {
			t.Fatal(err)
		}
		watch.wantEnd(t, "a watch with the certificate before "+step.what, false)
		refused("the certificate before "+step.what, w.shows(certificate))
		if step.next != nil {
			certificate = step.next.Pair(t, "alice")
			if code, err := status(t.Context(), w.shows(certificate), version, header); code != http.StatusOK {
				t.Errorf("after %s: %d, %v", step.what, code, err)
			}
		}
	}
	wantMetric(t, w.agent, `pipeops_agent_streams_ended_total{reason="certificate"} 2`)
}

// TestMissingClientCAStopsTheProxy starts the proxy while the file of the CA is missing. When it is there, the gateway
// shows a certificate of it.
func TestMissingClientCAStopsTheProxy(t *testing.T) {
	t.Parallel()
	ca := harness.NewAuthority(t)
	file := writeFile(t, "ca.crt", ca.PEM)
	w := newAccessWorld(t, "own", "PIPEOPS_PROXY_TLS_CLIENT_CA_FILE="+file)
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if err := w.agent.StartProxy(); err != nil {
		t.Fatal(err)
	}
	if code := w.agent.Proxy.ExitCode(); code == 0 || !strings.Contains(w.agent.Proxy.Log(), "proxy.tls.client_ca_file") {
		t.Errorf("exit code %d:\n%s", code, w.agent.Proxy.Log())
	}
	if err := os.WriteFile(file, ca.PEM, 0o600); err != nil {
		t.Fatal(err)
	}
	w.startAgent()
	w.cp.Show(ca.Pair(t, "gateway"))
	w.mustKubectl("get", "configmaps", "-n", w.ns)
}
