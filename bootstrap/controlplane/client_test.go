package controlplane

import (
	"crypto/tls"
	"encoding/pem"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pipeops/vm-agent/bootstrap/config"
)

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// client returns a client of the control plane at url, whose certificates the authority in caFile signs.
func client(t *testing.T, url, caFile string) *Client {
	t.Helper()
	cfg, err := config.Load("", map[string]string{
		"PIPEOPS_AGENT_ID": "agent-001", "PIPEOPS_AGENT_TOKEN": "hunter2", "PIPEOPS_INSTANCE": "pod-1",
		"PIPEOPS_API_URL": url, "PIPEOPS_API_CA_FILE": caFile,
	})
	if err != nil {
		t.Fatal(err)
	}
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestOldTLSIsNotSpoken(t *testing.T) {
	for version, spoken := range map[uint16]bool{tls.VersionTLS11: false, tls.VersionTLS12: true} {
		server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			_, _ = io.WriteString(w, `{"frp_token":"f"}`)
		}))
		server.TLS = &tls.Config{MinVersion: tls.VersionTLS10, MaxVersion: version}
		server.StartTLS()
		defer server.Close()
		caFile := filepath.Join(t.TempDir(), "ca.pem")
		ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
		if err := os.WriteFile(caFile, ca, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, fail := client(t, server.URL, caFile).RequestLease(t.Context(), nil); (fail == nil) != spoken {
			t.Errorf("%s: %v", tls.VersionName(version), fail)
		}
	}
}

// TestSilentControlPlaneTimesOut: after half a minute, and the next request may do better.
func TestSilentControlPlaneTimesOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := client(t, "https://control.example", "")
		c.HTTP.Transport = roundTripper(func(r *http.Request) (*http.Response, error) {
			<-r.Context().Done()
			return nil, r.Context().Err()
		})
		begin := time.Now()
		_, fail := c.RequestLease(t.Context(), nil)
		if took := time.Since(begin); took != 30*time.Second || fail == nil || fail.Final ||
			!strings.Contains(fail.Error(), "does not answer") {
			t.Errorf("after %s: %v", took, fail)
		}
	})
}

// TestHugeAnswersAreNotRead: beyond 1 MiB.
func TestHugeAnswersAreNotRead(t *testing.T) {
	read := 0
	c := client(t, "https://control.example", "")
	c.HTTP.Transport = roundTripper(func(*http.Request) (*http.Response, error) {
		return &http.Response{StatusCode: http.StatusOK, Status: "200 OK", Body: io.NopCloser(&spaces{&read})}, nil
	})
	if _, fail := c.RequestLease(t.Context(), nil); fail == nil || !fail.Final || read > 2<<20 {
		t.Errorf("read %d bytes: %v", read, fail)
	}
}

// spaces is an answer that says nothing, for 64 MiB.
type spaces struct{ read *int }

func (s *spaces) Read(p []byte) (int, error) {
	if *s.read > 64<<20 {
		return 0, io.EOF
	}
	for i := range p {
		p[i] = ' '
	}
	*s.read += len(p)
	return len(p), nil
}
