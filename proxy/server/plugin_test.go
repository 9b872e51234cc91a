package server

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/rest"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

// hangingPlugin returns a configuration with a credential plugin that does not return until release is called, and the
// path of a file that exists once the plugin runs.
func hangingPlugin(t *testing.T) (config *rest.Config, started string, release func()) {
	t.Helper()
	dir := t.TempDir()
	started, released := filepath.Join(dir, "started"), filepath.Join(dir, "released")
	program := filepath.Join(dir, "slow-plugin")
	script := fmt.Sprintf(`#!/bin/sh
touch %s
while [ ! -e %s ]; do sleep 0.05; done
echo '{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential","status":{"token":"from-the-plugin"}}'
`, started, released)
	if err := os.WriteFile(program, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	api := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = fmt.Fprint(w, r.Header.Get("Authorization"))
	}))
	t.Cleanup(api.Close)
	release = func() {
		if err := os.WriteFile(released, nil, 0o600); err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(release)
	plugin := &clientcmdapi.ExecConfig{
		Command: program, APIVersion: "client.authentication.k8s.io/v1",
		InteractiveMode: clientcmdapi.NeverExecInteractiveMode,
	}
	insecure := rest.TLSClientConfig{Insecure: true}
	return &rest.Config{Host: api.URL, TLSClientConfig: insecure, ExecProvider: plugin}, started, release
}

// TestHangingCredentialPluginIsNamed: no caller waits longer than it wants, and all goroutines end with the plugin.
func TestHangingCredentialPluginIsNamed(t *testing.T) {
	config, _, release := hangingPlugin(t)
	s := serverBefore(t, config, token, slog.New(slog.DiscardHandler))
	before := runtime.NumGoroutine()
	for range 40 { // more than maxAbandoned
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		err := s.api.CheckReady(ctx)
		cancel()
		if err == nil || !strings.Contains(err.Error(), "slow-plugin does not answer") {
			t.Fatalf("the check says %v", err)
		}
	}
	if n := runtime.NumGoroutine(); n > before+100 {
		t.Errorf("%d goroutines, %d before", n, before)
	}
	w := do(s.handler(tunnel), "GET", "/api/k8s/version", "Bearer "+token) // too many wait: refused at once
	if w.Code != http.StatusGatewayTimeout || !strings.Contains(w.Body.String(), "slow-plugin") {
		t.Errorf("answered %d %s", w.Code, w.Body)
	}
	release()
	eventually(t, func() bool {
		w := do(s.handler(tunnel), "GET", "/api/k8s/version", "Bearer "+token)
		return w.Code == http.StatusOK && w.Body.String() == "Bearer from-the-plugin"
	})
	eventually(t, func() bool { return runtime.NumGoroutine() < before+40 })
}
