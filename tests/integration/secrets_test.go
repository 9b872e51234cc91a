package integration

import (
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/pipeops/vm-agent/tests/harness"
)

// TestNoSecretIsLoggedOrReturned calls every route with marked secrets, at log level debug, and finds none of them in
// what the agent's own processes print or answer: logs, metrics, status, errors, the OpenAPI description.
func TestNoSecretIsLoggedOrReturned(t *testing.T) {
	t.Parallel()
	w, ns := connectedWithRunners(t)
	if err := syscall.Kill(w.agent.Proxy.Pid(), syscall.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	runner := serve(t, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	const mark = "marked-secret"
	lease, err := os.ReadFile(filepath.Join(w.agent.RunDir, "lease.json"))
	if err != nil {
		t.Fatal(err)
	}
	secrets := []string{mark, agentToken, api.agent.BearerToken}
	for line := range strings.Lines(string(lease)) { // frp's token, and the password of frpc's admin API
		if key, value, ok := strings.Cut(line, ":"); ok && (strings.Contains(key, `"token"`) ||
			strings.Contains(key, `"password"`)) {
			secrets = append(secrets, strings.Trim(strings.TrimSpace(value), `",`))
		}
	}
	if len(secrets) < 5 {
		t.Fatalf("the lease holds no token and password:\n%s", lease)
	}
	var said strings.Builder
	ask := func(method, path, body string, header http.Header) {
		t.Helper()
		resp, answer := exchange(t, asItIs, method, w.agent.Tunnel+path, header, body)
		said.WriteString(resp.Status + "\n")
		_ = resp.Header.Write(&said)
		said.WriteString(answer)
	}
	right := http.Header{"Authorization": {"Bearer " + agentToken}, "Content-Type": {"application/json"},
		"Cookie": {mark}, "X-A": {mark}}
	wrong := http.Header{"Authorization": {"Bearer " + mark}, "Cookie": {mark}}
	paths := []struct{ method, path, body string }{
		{http.MethodGet, "/health?q=" + mark, ""},
		{http.MethodGet, "/ready?q=" + mark, ""},
		{http.MethodGet, "/version", ""},
		{http.MethodGet, "/openapi.yaml", ""},
		{http.MethodGet, "/api/agent/status", ""},
		{http.MethodPost, "/api/agent/heartbeat", `{"token":"` + mark + `"}`},
		{http.MethodPost, "/api/control-plane/message", `{"id":"1","type":"runner_assigned","data":{"runner_id":"r","runner_endpoint":"` + runner + `/?token=` + mark + `","runner_token":"` + mark + `"}}`},
		{http.MethodPost, "/api/control-plane/message", `{"id":"2","type":"runner_assigned","data":{"runner_id":"gone","runner_endpoint":"http://` + harness.FreeAddr(t) + `/?token=` + mark + `","runner_token":"` + mark + `"}}`},
		{http.MethodPost, "/api/control-plane/message", `{"id":"3","type":"runner_assigned","data":{"runner_id":"r","runner_endpoint":"http://user:` + mark + `@127.0.0.1/","runner_token":"` + mark + `"}}`},
		{http.MethodPost, "/api/control-plane/message", `{"id":"4","type":"runner_assigned","data":{"runner_id":"r","runner_endpoint":5,"runner_token":["` + mark + `"]}}`},
		{http.MethodPost, "/api/runners/r/command?q=" + mark, mark},
		{http.MethodPost, "/api/runners/gone/command", mark},
		{http.MethodPost, "/api/runners/none/command", mark},
		{http.MethodPost, "/api/k8s/api/v1/namespaces/" + ns + "/pods/p/exec?command=" + mark, ""},
		{http.MethodPut, "/api/k8s/" + mark + "/x?" + mark, mark},
		{http.MethodGet, "/api/k8s/../" + mark, ""},
	}
	for _, p := range paths {
		for _, header := range []http.Header{right, wrong, {}} {
			ask(p.method, p.path, p.body, header)
		}
	}
	ask(http.MethodGet, "/metrics", "", right)
	said.WriteString(w.agent.Proxy.Log())
	logs, err := filepath.Glob(filepath.Join(w.group.Dir(), "bootstrap*.log"))
	if err != nil || len(logs) == 0 {
		t.Fatal(err, "bootstrap has no log")
	}
	for _, name := range logs {
		data, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		said.Write(data)
	}
	for i, secret := range secrets {
		if at := strings.Index(said.String(), secret); at >= 0 {
			t.Errorf("secret %d of %d is printed: …%.300s", i, len(secrets), said.String()[max(0, at-200):])
		}
	}
}
