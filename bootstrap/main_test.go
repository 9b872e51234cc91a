package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/pipeops/vm-agent/bootstrap/controlplane"
	"github.com/pipeops/vm-agent/frpc"
)

const token = "hunter2"

// bootstrap runs the command in this process and returns its exit code, the error in its last log line, and
// all that it has printed.
func bootstrap(t *testing.T, env map[string]string, args ...string) (code int, lastError, output string) {
	t.Helper()
	var out bytes.Buffer
	code = run(t.Context(), args, env, &out, &out)
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	var last struct{ Error string }
	_ = json.Unmarshal([]byte(lines[len(lines)-1]), &last) // usage errors are no JSON
	if strings.Contains(out.String(), token) {
		t.Errorf("a secret was printed:\n%s", out.String())
	}
	return code, last.Error, out.String()
}

// environment configures an agent of the control plane at url, with a tunnel of type http: its lease takes one request,
// without a certificate.
func environment(t *testing.T, url string) map[string]string {
	return map[string]string{
		"PIPEOPS_FRP_TUNNEL_TYPE": "http",
		"PIPEOPS_AGENT_ID":        "agent-001", "PIPEOPS_AGENT_TOKEN": token, "PIPEOPS_INSTANCE": "pod-1",
		"PIPEOPS_API_URL": url, "PIPEOPS_RUN_DIR": t.TempDir(),
	}
}

// TestReadySaysWhyThereIsNoLease: the kubelet makes an event of what the startup probe says.
func TestReadySaysWhyThereIsNoLease(t *testing.T) {
	var ready string
	env := environment(t, "")
	var requests atomic.Int32
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if requests.Add(1) == 1 {
			answer(http.StatusServiceUnavailable, "text/plain", "closed for today")(w, r)
			return
		}
		_, _, ready = bootstrap(t, env, "ready")
		answer(http.StatusOK, "application/json", `{"frp_token":"f"}`)(w, r)
	}))
	defer server.Close()
	env["PIPEOPS_API_URL"] = server.URL
	if code, _, output := bootstrap(t, env, "--once"); code != exitOK {
		t.Fatal(output)
	}
	if !strings.Contains(ready, "bootstrap: no lease yet: ") || !strings.Contains(ready, "503") {
		t.Errorf("before there is a lease: %s", ready)
	}
	if code, _, output := bootstrap(t, env, "ready"); code != exitOK {
		t.Errorf("then: %s", output)
	}
	if err := os.Remove(filepath.Join(env["PIPEOPS_RUN_DIR"], frpc.LeaseFile)); err != nil {
		t.Fatal(err)
	}
	if _, _, output := bootstrap(t, env, "ready"); strings.Contains(output, "no lease yet") {
		t.Errorf("the old reason is still there: %s", output)
	}
}

func TestOnceWritesTheLease(t *testing.T) {
	var request controlplane.Request
	var header http.Header
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		header = r.Header
		if err := json.NewDecoder(r.Body).Decode(&request); err != nil ||
			r.Method != http.MethodPost || r.URL.Path != "/base/auth/frp-token" {
			t.Errorf("%s %s: %v", r.Method, r.URL.Path, err)
		}
		_, _ = fmt.Fprint(w, `{"frp_token":"f","expires_at":"2026-12-01T00:00:00Z","auth_method":"token",
			"server_addr":"frp.example","server_port":7001,"user":"u","metadatas":{"lease":"l"},
			"tunnel":{"type":"tcp","remote_port":20001,"group":"g","group_key":"k"},"permissions":["read"],"later":1}`)
	}))
	defer server.Close()
	env := environment(t, server.URL+"/base/")
	code, lastError, output := bootstrap(t, env, "--once")
	if code != exitOK {
		t.Fatalf("exit code %d: %s", code, output)
	}
	want := controlplane.Request{
		AgentID: "agent-001", AgentName: "agent-001", ClusterName: "agent-001", Instance: "pod-1", Version: "dev",
	}
	if request != want || lastError != "" {
		t.Errorf("the control plane was asked %+v, want %+v", request, want)
	}
	if got := header.Get("Authorization"); got != "Bearer "+token {
		t.Errorf("Authorization: %q", got)
	}
	lease, err := frpc.ReadLease(env["PIPEOPS_RUN_DIR"])
	if err != nil {
		t.Fatal(err)
	}
	c := lease.Frpc
	if c.ServerAddr != "frp.example" || c.ServerPort != 7001 ||
		c.User != "u" || c.Token != "f" || c.Metadatas["lease"] != "l" ||
		c.Tunnel.Type != "tcp" || c.Tunnel.RemotePort != 20001 || c.Tunnel.Subdomain != "" ||
		c.Tunnel.Group != "g" || c.Tunnel.GroupKey != "k" ||
		c.Tunnel.Name != "agent-001.pod-1" || c.Tunnel.LocalPort != 8080 ||
		lease.ExpiresAt.Year() != 2026 {
		t.Errorf("got lease %+v", lease)
	}
	if c.Admin.User == "" || len(c.Admin.Password) < 20 {
		t.Error("frpc's admin API is open")
	}
	if _, err := os.Stat(filepath.Join(env["PIPEOPS_RUN_DIR"], frpc.ConfigFile)); err != nil {
		t.Error(err)
	}
}

// TestLeaseOverridesTheConfiguredTunnel: field by field, and the configuration fills what it leaves out.
func TestLeaseOverridesTheConfiguredTunnel(t *testing.T) {
	for body, want := range map[string]frpc.Tunnel{
		`{"group":"g"}`:            {Type: "http", Subdomain: "agent-001", Group: "g"},
		`{"subdomain":"other"}`:    {Type: "http", Subdomain: "other"},
		`{"type":"http"}`:          {Type: "http", Subdomain: "agent-001"},
		`{"type":"tcp"}`:           {Type: "tcp"},
		`{"custom_domains":["d"]}`: {Type: "http", CustomDomains: []string{"d"}},
	} {
		server := httptest.NewServer(answer(200, "application/json", `{"frp_token":"f","tunnel":`+body+`}`))
		env := environment(t, server.URL)
		if code, _, output := bootstrap(t, env, "--once"); code != exitOK {
			t.Fatal(output)
		}
		server.Close()
		lease, err := frpc.ReadLease(env["PIPEOPS_RUN_DIR"])
		if err != nil {
			t.Fatal(err)
		}
		want.Name, want.LocalIP, want.LocalPort = "agent-001.pod-1", "127.0.0.1", 8080
		want.HealthPath = "/ready?only=shutdown"
		if !reflect.DeepEqual(lease.Frpc.Tunnel, want) {
			t.Errorf("%s: got %+v, want %+v", body, lease.Frpc.Tunnel, want)
		}
	}
}

// TestAnswersOfTheControlPlane: what the control plane may answer, and the error for it.
func TestAnswersOfTheControlPlane(t *testing.T) {
	const lease = `{"frp_token":"f"}`
	var elsewhere atomic.Int32
	other := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { elsewhere.Add(1) }))
	t.Cleanup(other.Close)
	for _, test := range []struct {
		name    string
		answers []http.HandlerFunc // one for each attempt; the last for all others
		calls   int32
		code    int
		want    string
	}{
		{"first 503, then a lease", []http.HandlerFunc{answer(503, "", ""), answer(200, "application/json", lease)}, 2, exitOK, ""},
		{"first 503 that repeats the token, then a lease", []http.HandlerFunc{answer(503, "application/json", `{"error":"`+token+`"}`), answer(200, "application/json", lease)}, 2, exitOK, ""},
		{"first 429, then a lease", []http.HandlerFunc{answer(429, "", ""), answer(200, "application/json", lease)}, 2, exitOK, ""},
		{"broken connection, then a lease", []http.HandlerFunc{func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, answer(200, "application/json", lease)}, 2, exitOK, ""},
		{"401", []http.HandlerFunc{answer(401, "application/json", `{"detail":"no such token"}`)}, 1, exitFailed, "refuses the agent's token (401 Unauthorized: no such token): check agent.token (PIPEOPS_AGENT_TOKEN)"},
		{"403", []http.HandlerFunc{answer(403, "application/json", `{"message":"revoked"}`)}, 1, exitFailed, `does not let agent "agent-001" connect (403 Forbidden: revoked): check agent.id (PIPEOPS_AGENT_ID)`},
		{"an error that repeats the token", []http.HandlerFunc{answer(401, "application/json", `{"error":"bad token `+token+`"}`)}, 1, exitFailed, "refuses the agent's token (401 Unauthorized: bad token [redacted]): check"},
		{"404", []http.HandlerFunc{answer(404, "text/html", "<html>")}, 1, exitFailed, "does not know the request (404 Not Found, text/html): check agent.api_url (PIPEOPS_API_URL)"},
		{"redirect", []http.HandlerFunc{func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, other.URL, http.StatusFound) }}, 1, exitFailed, "redirects to \"" + other.URL + "\", and the token is not sent there"},
		{"HTML", []http.HandlerFunc{answer(200, "text/html", "<html>")}, 1, exitFailed, "answers with something other than a lease (text/html, invalid character"},
		{"truncated", []http.HandlerFunc{answer(200, "application/json", lease[:8])}, 1, exitFailed, "answers with something other than a lease (application/json, unexpected end"},
		{"too large", []http.HandlerFunc{answer(200, "application/json", strings.Repeat(" ", 1<<20)+lease)}, 1, exitFailed, "answers with more than 1 MiB"},
		{"no frp_token", []http.HandlerFunc{answer(200, "application/json", `{}`)}, 1, exitFailed, "answers without frp_token"},
		{"unknown auth_method", []http.HandlerFunc{answer(200, "application/json", `{"frp_token":"f","auth_method":"magic"}`)}, 1, exitFailed, `auth_method "magic", which this version does not know`},
		{"impossible port", []http.HandlerFunc{answer(200, "application/json", `{"frp_token":"f","server_port":-5}`)}, 1, exitFailed, "lease has the invalid port -5"},
		{"unknown tunnel", []http.HandlerFunc{answer(200, "application/json", `{"frp_token":"f","tunnel":{"type":"magic"}}`)}, 1, exitFailed, `a tunnel of type "magic", which this version does not know`},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			var calls atomic.Int32
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				test.answers[min(int(calls.Add(1)), len(test.answers))-1](w, r)
			}))
			defer server.Close()
			code, lastError, output := bootstrap(t, environment(t, server.URL), "--once")
			if code != test.code || !strings.Contains(lastError, test.want) || calls.Load() != test.calls {
				t.Errorf("exit code %d after %d attempts, want %d after %d; output, want %q:\n%s",
					code, calls.Load(), test.code, test.calls, test.want, output)
			}
		})
	}
	t.Cleanup(func() {
		if elsewhere.Load() != 0 {
			t.Error("a redirect was followed")
		}
	})
}

func answer(code int, contentType, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", contentType)
		w.WriteHeader(code)
		_, _ = fmt.Fprint(w, body)
	}
}

func TestCommandLineErrors(t *testing.T) {
	for _, test := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"--help"}, exitOK, "bootstrap --once [flags]"},
		{[]string{"--version"}, exitOK, `"version":"dev"`},
		{nil, exitUsage, "agent.id (PIPEOPS_AGENT_ID): required"},
		{[]string{"--check"}, exitUsage, "agent.id (PIPEOPS_AGENT_ID): required"},
		{[]string{"--nonsense"}, exitUsage, "flag provided but not defined"},
		{[]string{"--once", "--timeout", "0"}, exitUsage, "--timeout must be positive"},
		{[]string{"--once", "extra"}, exitUsage, `unknown argument "extra"`},
		{[]string{"--once", "--config", "/nonexistent"}, exitUsage, "open /nonexistent: no such file or directory"},
	} {
		if code, _, output := bootstrap(t, nil, test.args...); code != test.code || !strings.Contains(output, test.want) {
			t.Errorf("%v: exit code %d, want %d; output, want %q:\n%s", test.args, code, test.code, test.want, output)
		}
	}
}

// TestShortTokenIsWarnedOf: it works, and the log and doctor warn of it.
func TestShortTokenIsWarnedOf(t *testing.T) {
	server := httptest.NewServer(answer(200, "application/json", `{"frp_token":"f"}`))
	defer server.Close()
	for token, short := range map[string]bool{"fifteen-letters": true, "your-agent-token": false} {
		env := environment(t, server.URL)
		env["PIPEOPS_AGENT_TOKEN"], env["PIPEOPS_FRP_SERVER_ADDR"] = token, "127.0.0.1" // doctor knocks there
		const warning = "agent.token (PIPEOPS_AGENT_TOKEN) has fewer than 16 characters"
		code, _, output := bootstrap(t, env, "--once")
		if code != exitOK || strings.Contains(output, warning) != short || strings.Contains(output, token) {
			t.Errorf("exit code %d: %s", code, output)
		}
		if _, _, output := bootstrap(t, env, "doctor"); !strings.HasPrefix(output, "ok       configuration   valid") ||
			strings.Contains(output, warning) != short {
			t.Errorf("doctor: %s", output)
		}
	}
}
