package integration

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/pipeops/vm-agent/tests/harness"
)

// doctor runs bootstrap doctor, and returns its exit code and the result and detail of each step.
func (w *world) doctor() (code int, results, details map[string]string) {
	w.t.Helper()
	p, err := w.agent.Command("doctor", "--json")
	if err != nil {
		w.t.Fatal(err)
	}
	code = p.ExitCode()
	var findings []struct{ Step, Result, Detail string }
	if err := json.Unmarshal([]byte(p.Log()), &findings); err != nil {
		w.t.Fatalf("%v:\n%s", err, p.Log())
	}
	results, details = map[string]string{}, map[string]string{}
	for _, f := range findings {
		results[f.Step], details[f.Step] = f.Result, f.Detail
	}
	if strings.Contains(p.Log(), agentToken) {
		w.t.Error("doctor prints the token")
	}
	return code, results, details
}

// TestDoctorFindsTheBrokenHop checks what doctor reports about an agent that works, and about each broken hop.
func TestDoctorFindsTheBrokenHop(t *testing.T) {
	t.Parallel()
	const ok, failed, skipped = "ok", "failed", "skipped"
	steps := []string{"configuration", "dns", "control plane", "authentication", "frps", "tunnel", "proxy", "kubernetes",
		"permissions"}
	for _, test := range []struct {
		name string
		harm func(w *world)
		want []string          // of each step
		says map[string]string // in the detail of a step
	}{
		{"all is well", func(*world) {}, []string{ok, ok, ok, ok, ok, ok, ok, ok, ok}, map[string]string{
			"dns":            "127.0.0.1 is 127.0.0.1",
			"control plane":  `answers over TLS with subject "CN=localhost" for localhost, 127.0.0.1, issued by "CN=development control plane", valid from `,
			"authentication": "the control plane gives a lease until ",
			"frps":           "accepts the login; its certificate is verified",
			"tunnel":         "of type https is running at agent-001.agents-tls.internal",
			"permissions":    "may list pods, list nodes, keep runners",
		}},
		{"configuration", func(w *world) { w.agent.Env = append(w.agent.Env, "PIPEOPS_API_URL=nonsense") },
			[]string{failed, skipped, skipped, skipped, skipped, skipped, skipped, skipped, skipped},
			map[string]string{"configuration": "agent.api_url (PIPEOPS_API_URL): is not a server's URL"}},
		{"no control plane", func(w *world) {
			w.agent.Env = append(w.agent.Env, "PIPEOPS_API_URL=https://"+harness.FreeAddr(w.t))
		}, []string{ok, ok, failed, skipped, skipped, ok, ok, ok, ok},
			map[string]string{"control plane": "connection refused: check agent.api_url"}},
		{"wrong token", func(w *world) { w.cp.SetAgent(agentID, "another") },
			[]string{ok, ok, ok, failed, skipped, ok, ok, ok, ok},
			map[string]string{"authentication": "refuses the agent's token (401 Unauthorized"}},
		{"no frps", func(w *world) {
			w.cp.StopFrps()
			wantReady(w.t, w.agent, "tunnel", "frps at ")
		}, []string{ok, ok, ok, ok, failed, failed, ok, ok, ok}, map[string]string{
			"frps": "connection refused: check frp.server_addr", "tunnel": "frpc is not logged in to frps"}},
		{"no frpc", func(w *world) { w.agent.Frpc.Kill() },
			[]string{ok, ok, ok, ok, ok, failed, ok, ok, ok}, map[string]string{"tunnel": "check that the frpc container runs"}},
		{"no proxy", func(w *world) { w.agent.Proxy.Kill() },
			[]string{ok, ok, ok, ok, ok, ok, failed, skipped, skipped},
			map[string]string{"proxy": "check that the proxy container runs"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			w := connected(t)
			test.harm(w)
			code, results, details := w.doctor()
			for i, step := range steps {
				withdrawn := test.name == "no proxy" && step == "tunnel" // by frpc, soon
				if results[step] != test.want[i] && !withdrawn {
					t.Errorf("%s is %s, want %s: %s", step, results[step], test.want[i], details[step])
				}
				if !strings.Contains(details[step], test.says[step]) {
					t.Errorf("%s says %q, want %q", step, details[step], test.says[step])
				}
			}
			if want := strings.Contains(fmt.Sprint(test.want), failed); (code == 1) != want || code > 1 {
				t.Errorf("exit code %d", code)
			}
		})
	}
}

// TestCustomDomainBelowSubdomainHostIsExplained: frps refuses it, and wants it as the tunnel's subdomain.
func TestCustomDomainBelowSubdomainHostIsExplained(t *testing.T) {
	t.Parallel()
	w := newAccessWorld(t, "agent")
	env, _ := ownFrpsFromManifests(t, w)
	w.agent.Env = append(w.agent.Env, append(env, "PIPEOPS_FRP_TUNNEL_CUSTOM_DOMAINS=edge.k8s.example.com")...)
	if err := w.agent.Start(); err != nil {
		t.Fatal(err)
	}
	const want = "frps refuses the tunnel (start error: custom domain [edge.k8s.example.com] should not belong to " +
		"subdomain host [k8s.example.com]): a name below frps's subDomainHost must be the tunnel's subdomain, not one of its " +
		"custom domains"
	wantReady(t, w.agent, "tunnel", want)
	_, results, details := w.doctor()
	if results["tunnel"] != "failed" || details["tunnel"] != want {
		t.Errorf("doctor says: %s: %s", results["tunnel"], details["tunnel"])
	}
}

// TestDoctorFindsAnotherTokenInTheProxy: bootstrap and the proxy read their own copies of the settings.
func TestDoctorFindsAnotherTokenInTheProxy(t *testing.T) {
	t.Parallel()
	w := connected(t)
	w.agent.Env = append(w.agent.Env, "PIPEOPS_AGENT_TOKEN=another")
	_, results, details := w.doctor()
	if results["permissions"] != "failed" || !strings.Contains(details["permissions"], "401") {
		t.Errorf("doctor says: %s: %s", results["permissions"], details["permissions"])
	}
}
