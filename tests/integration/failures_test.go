package integration

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"k8s.io/client-go/rest"

	"github.com/pipeops/vm-agent/tests/harness"
	"github.com/pipeops/vm-agent/tests/harness/agent"
	"github.com/pipeops/vm-agent/tests/harness/cluster"
	"github.com/pipeops/vm-agent/tests/harness/controlplane"
)

// TestBootstrapErrorsSayWhatToDo checks, for each failure, the exit code and a last line that names the hop, the
// cause and the next step.
func TestBootstrapErrorsSayWhatToDo(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	closed := harness.FreeAddr(t)
	for _, test := range []struct {
		name string
		env  []string
		args []string
		code int
		want string // in the error of the last line
	}{
		{"wrong token", []string{"PIPEOPS_AGENT_TOKEN=wrong-one"}, nil, 1,
			"the control plane at " + w.cp.APIURL + " refuses the agent's token (401 Unauthorized: unknown agent or wrong token): check agent.token (PIPEOPS_AGENT_TOKEN), or get a new one from the control plane"},
		{"unreachable", []string{"PIPEOPS_API_URL=https://" + closed}, []string{"--timeout", "3s"}, 1,
			"the control plane at https://" + closed + " cannot be reached: dial tcp " + closed + ": connect: connection refused: check agent.api_url (PIPEOPS_API_URL), and that the network allows HTTPS connections to it"},
		{"unknown authority", []string{"PIPEOPS_API_CA_FILE="}, []string{"--timeout", "3s"}, 1,
			"presents a certificate signed by an unknown authority"},
		{"wrong path", []string{"PIPEOPS_API_URL=" + w.cp.APIURL + "/v9"}, nil, 1,
			"does not know the request (404 Not Found, text/plain; charset=utf-8): check agent.api_url (PIPEOPS_API_URL)"},
		{"no volume", []string{"PIPEOPS_RUN_DIR=/nonexistent"}, nil, 1,
			"open the run directory: "},
	} {
		t.Run(test.name, func(t *testing.T) {
			before := w.agent.Env
			w.agent.Env = slices.Concat(before, test.env)
			defer func() { w.agent.Env = before }()
			p, err := w.agent.Once(test.args...)
			if err != nil {
				t.Fatal(err)
			}
			code := p.ExitCode()
			lines := strings.Split(strings.TrimSpace(p.Log()), "\n")
			var last struct{ Level, Error string }
			if err := json.Unmarshal([]byte(lines[len(lines)-1]), &last); err != nil {
				t.Fatalf("%v:\n%s", err, p.Log())
			}
			if code != test.code || last.Level != "ERROR" || !strings.Contains(last.Error, test.want) {
				t.Errorf("exit code %d, want %d and %q:\n%s", code, test.code, test.want, p.Log())
			}
			if strings.Contains(p.Log(), agentToken) || strings.Contains(p.Log(), "wrong-one") {
				t.Error("the log holds the token")
			}
		})
	}
}

// TestReadyExplainsWhyTheTunnelIsDown checks that /ready answers 503 for a tunnel that does not come up, and names
// the hop, the cause and the next step.
func TestReadyExplainsWhyTheTunnelIsDown(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name    string
		prepare func(w *world) // after bootstrap, before frpc
		env     []string
		want    string
	}{
		{"frps unreachable", func(w *world) { w.cp.StopFrps() }, nil,
			"frps at 127.0.0.1:%d cannot be reached: dial tcp 127.0.0.1:%[1]d: connect: connection refused: check frp.server_addr (PIPEOPS_FRP_SERVER_ADDR) and frp.server_port (PIPEOPS_FRP_SERVER_PORT), and that the network allows TCP connections to it"},
		{"frps refuses the lease", func(w *world) { w.cp.RevokeLeases() }, nil,
			"frps at 127.0.0.1:%d refuses the login: the control plane has given no such lease, or has revoked it: restart the pod to get a new lease from the control plane"},
		{"frps unverified", func(*world) {}, []string{"PIPEOPS_FRP_TLS_SERVER_NAME=other.example"},
			"frps at 127.0.0.1:%d presents a certificate for another name than other.example (subject \"CN=localhost\" for localhost, 127.0.0.1, issued by \"CN=development control plane\", valid from "},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t)
			w.agent.Env = append(w.agent.Env, test.env...)
			w.bootstrapOnce()
			test.prepare(w)
			if err := w.agent.StartFrpc(); err != nil {
				t.Fatal(err)
			}
			if err := w.agent.StartProxy(); err != nil {
				t.Fatal(err)
			}
			wantReady(t, w.agent, "tunnel", fmt.Sprintf(test.want, w.cp.FrpsPort))
		})
	}
}

// TestReadyReportsALostTunnel checks that a tunnel that was up is not reported as still up.
func TestReadyReportsALostTunnel(t *testing.T) {
	t.Parallel()
	w := connected(t)
	w.cp.StopFrps()
	wantReady(t, w.agent, "tunnel", fmt.Sprintf(
		"frps at 127.0.0.1:%d cannot be reached: dial tcp 127.0.0.1:%[1]d: connect: connection refused: check frp.server_addr (PIPEOPS_FRP_SERVER_ADDR) and frp.server_port (PIPEOPS_FRP_SERVER_PORT), and that the network allows TCP connections to it",
		w.cp.FrpsPort))
	if r := w.kubectl(w.caller, "", "get", "namespaces"); r.Code == 0 ||
		!strings.Contains(r.Stderr, "the gateway cannot reach frps: dial tcp") {
		t.Errorf("kubectl: %+v", r)
	}
}

// TestWrongFrpTokenIsReported has frps itself refuse the shared token, without a control plane.
func TestWrongFrpTokenIsReported(t *testing.T) {
	t.Parallel()
	w, addr := ownFrps(t, "wrong")
	if err := w.agent.Start(); err != nil {
		t.Fatal(err)
	}
	wantReady(t, w.agent, "tunnel",
		"frps at "+addr+" refuses the login: token in login doesn't match token from configuration: check frp.token (PIPEOPS_FRP_TOKEN)")
}

// TestFrpTokenNeedsNoControlPlane checks that with frp.token set the control plane is not asked, and that the tunnel
// comes up at the operator's own frps.
func TestFrpTokenNeedsNoControlPlane(t *testing.T) {
	t.Parallel()
	w, _ := ownFrps(t, "the-right-token")
	w.startAgent()
}

// TestUnverifiedFrpsGetsNoCredential checks that by default no credential is sent to a frps with a self-signed
// certificate.
func TestUnverifiedFrpsGetsNoCredential(t *testing.T) {
	t.Parallel()
	w, addr := ownFrps(t, "the-right-token")
	w.agent.Env = append(w.agent.Env, "PIPEOPS_FRP_TLS_INSECURE_SKIP_VERIFY=false")
	if err := w.agent.Start(); err != nil {
		t.Fatal(err)
	}
	wantReady(t, w.agent, "tunnel",
		"frps at "+addr+" presents the certificate that frps makes for itself, which nobody can verify: ")
	eventually(t, func() error {
		if strings.Count(w.agent.Frpc.Log(), "connect to server error: ") < 2 {
			return errors.New(w.agent.Frpc.Log())
		}
		return nil
	})
	logs, err := filepath.Glob(filepath.Join(w.group.Dir(), "*frps*.log"))
	if err != nil || len(logs) != 2 {
		t.Fatal(logs, err)
	}
	for _, name := range logs {
		if data, err := os.ReadFile(name); err != nil || strings.Contains(string(data), "client login") {
			t.Errorf("%s, %v: frps was sent a login:\n%s", name, err, data)
		}
	}
}

// ownFrps prepares an agent with a token for an operator's own frps, and no control plane that answers.
func ownFrps(t *testing.T, token string) (w *world, addr string) {
	t.Helper()
	w = newWorld(t)
	ports, err := controlplane.StartPlainFrps(t.Context(), w.group, "127.0.0.1", "the-right-token")
	if err != nil {
		t.Fatal(err)
	}
	w.agent.Env = append(w.agent.Env, "PIPEOPS_FRP_TOKEN="+token, "PIPEOPS_API_URL=https://"+harness.FreeAddr(t),
		"PIPEOPS_FRP_SERVER_ADDR=127.0.0.1", fmt.Sprintf("PIPEOPS_FRP_SERVER_PORT=%d", ports.Bind),
		"PIPEOPS_FRP_TLS_CA_FILE=", "PIPEOPS_FRP_TLS_INSECURE_SKIP_VERIFY=true", "PIPEOPS_FRP_TUNNEL_TYPE=http")
	return w, fmt.Sprintf("127.0.0.1:%d", ports.Bind)
}

// startedWithAPIServer starts an agent after change has modified the configuration for its API server.
func startedWithAPIServer(t *testing.T, change func(*rest.Config), env ...string) *world {
	t.Helper()
	w := newWorld(t)
	config := rest.CopyConfig(api.agent)
	change(config)
	kubeconfig := filepath.Join(w.group.Dir(), "spoilt.kubeconfig")
	if err := cluster.WriteKubeconfig(kubeconfig, config); err != nil {
		t.Fatal(err)
	}
	w.agent.Env = append(append(w.agent.Env, "KUBECONFIG="+kubeconfig), env...)
	if err := w.agent.Start(); err != nil {
		t.Fatal(err)
	}
	return w
}

// TestAPIServer401BecomesA502 checks that a caller whose token was right is not told that it was wrong, when it is
// the agent's own credential that the API server refuses.
func TestAPIServer401BecomesA502(t *testing.T) {
	t.Parallel()
	w := startedWithAPIServer(t, func(config *rest.Config) { config.BearerToken = "not-a-token" })
	const want = "the Kubernetes API server refuses the agent's credential (401 Unauthorized): " +
		"check the agent's ServiceAccount or kubeconfig; the caller's token was accepted"
	wantReady(t, w.agent, "kubernetes", want)
	wantKubectl(t, w, w.caller, "Error from server (BadGateway): ", want)
}

// TestUnreachableAPIServerIsA502 checks that kubectl shows which hop failed.
func TestUnreachableAPIServerIsA502(t *testing.T) {
	t.Parallel()
	closed := harness.FreeAddr(t)
	w := startedWithAPIServer(t, func(config *rest.Config) { config.Host = "https://" + closed })
	want := "the agent cannot reach the Kubernetes API server at " + closed + ": dial tcp " + closed +
		": connect: connection refused: check that it runs, and the agent's kubeconfig"
	wantReady(t, w.agent, "kubernetes", want)
	wantKubectl(t, w, w.caller, "Error from server (BadGateway): ", want)
}

// TestCallersWithoutTheTokenAreRefused checks that the agent refuses them, and that no part of such a request reaches
// the API server.
func TestCallersWithoutTheTokenAreRefused(t *testing.T) {
	t.Parallel()
	w := connected(t)
	wrong := filepath.Join(w.group.Dir(), "wrong-caller.kubeconfig")
	if err := agent.WriteCaller(wrong, w.cp, agentID, "wrong"); err != nil {
		t.Fatal(err)
	}
	wantKubectl(t, w, wrong, "error: You must be logged in to the server (",
		"the agent refuses the request: the bearer token is not this agent's token: check the token in the kubeconfig or client")
	for path, want := range map[string]int{
		"/health": http.StatusOK, "/ready": http.StatusOK, "/version": http.StatusOK,
		"/metrics": http.StatusUnauthorized, "/api/k8s/": http.StatusUnauthorized,
		"/api/k8s/version": http.StatusUnauthorized, "/nothing": http.StatusNotFound,
	} {
		if resp, body := get(t, http.DefaultClient, w.agent.Tunnel+path, nil); resp.StatusCode != want {
			t.Errorf("%s: got %s, want %d: %s", path, resp.Status, want, body)
		}
	}
	if _, text := get(t, http.DefaultClient, w.agent.Operations+"/metrics", nil); strings.Contains(text,
		"pipeops_agent_kubernetes_requests_total{") {
		t.Errorf("a request went to the API server:\n%s", text)
	}
	for path, want := range map[string]int{
		"/health": http.StatusOK, "/ready": http.StatusOK, "/version": http.StatusOK, "/metrics": http.StatusOK,
		"/api/k8s/version": http.StatusNotFound,
	} {
		token := http.Header{"Authorization": {"Bearer " + agentToken}}
		if resp, body := get(t, http.DefaultClient, w.agent.Operations+path, token); resp.StatusCode != want {
			t.Errorf("operations listener, %s: got %s, want %d: %s", path, resp.Status, want, body)
		}
	}
}

// TestGatewayGivesUpOnASilentFrps: a frps that is frozen accepts connections, and says nothing. And an agent that the
// gateway does not know is no object that does not exist.
func TestGatewayGivesUpOnASilentFrps(t *testing.T) {
	t.Parallel()
	w := connected(t)
	if err := syscall.Kill(w.cp.FrpsPid(), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	resp, body := w.ask(http.MethodGet, "/version")
	if err := syscall.Kill(w.cp.FrpsPid(), syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode != http.StatusServiceUnavailable || !strings.Contains(body, "is not connected") {
		t.Errorf("a silent frps: %s: %s", resp.Status, body)
	}
	if err := agent.WriteCaller(w.caller, w.cp, "agent-009", agentToken); err != nil {
		t.Fatal(err)
	}
	r := w.kubectl(w.caller, "", "delete", "configmap", "hello", "--ignore-not-found")
	if r.Code == 0 || !strings.Contains(r.Stderr, "knows no agent") {
		t.Errorf("an unknown agent: %+v", r)
	}
}

// wantReady waits until /ready answers 503 and the named check fails with a detail that begins with the given text.
func wantReady(t *testing.T, a *agent.Agent, check, detail string) {
	t.Helper()
	eventually(t, func() error {
		code, answer, err := a.Ready(t.Context())
		if err == nil && (code != http.StatusServiceUnavailable || !strings.HasPrefix(answer.Checks[check].Detail, detail)) {
			err = fmt.Errorf("/ready answers %d %+v\nwant the check %s to say %q", code, answer, check, detail)
		}
		return err
	})
}

// wantKubectl expects kubectl to fail and to show the message, once the tunnel is up: as the error of `get --raw`,
// and as a warning of `get`, which begins with discovery and shows none of its errors.
func wantKubectl(t *testing.T, w *world, kubeconfig, kind, message string) {
	t.Helper()
	eventually(t, func() error {
		r := w.kubectl(kubeconfig, "", "get", "--raw", "/api/v1/namespaces")
		if want := kind + message; r.Code != 1 || !strings.HasPrefix(r.Stderr, want) {
			return fmt.Errorf("kubectl get --raw: %+v\nwant %q", r, want)
		}
		return nil
	})
	r := w.kubectl(kubeconfig, "", "get", "namespaces")
	if want := "Warning: " + message + "\n"; r.Code != 1 || !strings.HasPrefix(r.Stderr, want) {
		t.Errorf("kubectl get: %+v\nwant %q", r, want)
	}
}

// TestReadyReportsAStoppedEtcd stops the storage of the API server, which still answers but can do nothing.
func TestReadyReportsAStoppedEtcd(t *testing.T) {
	t.Parallel()
	own, err := cluster.Start(t.Context(), harness.NewGroup(t))
	if err != nil {
		t.Fatal(err)
	}
	w := startedWithAPIServer(t, func(config *rest.Config) { *config = *own.Config })
	w.waitReady()
	own.Etcd.Kill()
	wantReady(t, w.agent, "kubernetes", "the Kubernetes API server at "+strings.TrimPrefix(own.Config.Host, "https://")+
		" answers GET /readyz: 500 Internal Server Error; [-]etcd failed")
}
