package integration

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/rest"

	"github.com/pipeops/vm-agent/tests/harness/agent"
)

// agentStatus is the part of GET /api/agent/status that the tests read.
type agentStatus struct {
	Agent        struct{ ID, Instance, Version string }
	ControlPlane struct {
		Heartbeats    int
		LastHeartbeat *time.Time `json:"last_heartbeat"`
	} `json:"control_plane"`
	Tunnel struct {
		Connected    bool
		Since        *time.Time
		Detail       string
		FrpcRestarts int `json:"frpc_restarts"`
		Proxies      []struct{ Name, Type, Status string }
		LeaseExpires *time.Time `json:"lease_expires_at"`

		LeaseProblem string `json:"lease_problem"`
	}
	Cluster struct {
		Reachable                               bool
		Version                                 *string
		Namespaces, Deployments, Services, Pods *int
		Nodes                                   *struct{ Total, Ready int }
		Unavailable                             map[string]string
	}
}

// ask sends a request to the agent's API through the gateway.
func (w *world) ask(method, path string) (*http.Response, string) {
	w.t.Helper()
	client, base := w.client()
	return exchange(w.t, client, method, base+path, nil, "")
}

// openStream does too, and returns when the headers of the answer have arrived.
func (w *world) openStream(path string) *http.Response {
	w.t.Helper()
	client, base := w.client()
	req, err := http.NewRequestWithContext(w.t.Context(), http.MethodGet, base+path, nil)
	if err != nil {
		w.t.Fatal(err)
	}
	resp, err := client.Do(req)
	if err != nil {
		w.t.Fatal(err)
	}
	return resp
}

func (w *world) client() (client *http.Client, base string) {
	w.t.Helper()
	caller := agent.Caller(w.cp, agentID, w.token)
	client, err := rest.HTTPClientFor(caller)
	if err != nil {
		w.t.Fatal(err)
	}
	return client, strings.TrimSuffix(caller.Host, "/api/k8s")
}

func (w *world) status() agentStatus {
	w.t.Helper()
	resp, body := w.ask(http.MethodGet, "/api/agent/status")
	var s agentStatus
	if err := json.Unmarshal([]byte(body), &s); err != nil || resp.StatusCode != http.StatusOK {
		w.t.Fatalf("%s: %v: %s", resp.Status, err, body)
	}
	return s
}

// TestStatusMatchesTheCluster compares the status with kubectl's output, and with what was done to the tunnel. It runs
// alone, because it counts the objects of all namespaces.
func TestStatusMatchesTheCluster(t *testing.T) {
	w := connected(t)
	ns := w.namespace()
	runningPod(t, ns)
	w.mustKubectl("create", "deployment", "d", "--image=none", "-n", ns)
	count := func(kind string) int {
		return len(strings.Fields(w.mustKubectl("get", kind, "-A", "-o", "name")))
	}
	s := w.status()
	if c := s.Cluster; !c.Reachable || c.Version == nil ||
		!strings.Contains(w.mustKubectl("version"), "Server Version: "+*c.Version) || len(c.Unavailable) > 0 ||
		*c.Namespaces != count("namespaces") || *c.Deployments != count("deployments") || *c.Services != count("services") ||
		*c.Pods != count("pods") || c.Nodes.Total != count("nodes") {
		t.Errorf("cluster: %+v", c)
	}
	if s.Agent.ID != agentID || s.Agent.Version == "" || !s.Tunnel.Connected || s.Tunnel.Since == nil ||
		len(s.Tunnel.Proxies) != 1 || s.Tunnel.LeaseExpires == nil {
		t.Errorf("agent: %+v, tunnel: %+v", s.Agent, s.Tunnel)
	}
	if s.ControlPlane.Heartbeats != 0 || s.ControlPlane.LastHeartbeat != nil {
		t.Errorf("before the first heartbeat: %+v", s.ControlPlane)
	}
	for want := 1; want <= 2; want++ {
		resp, body := w.ask(http.MethodPost, "/api/agent/heartbeat")
		var alive struct {
			Status   string
			Sequence int
		}
		if err := json.Unmarshal([]byte(body), &alive); err != nil || resp.StatusCode != http.StatusOK ||
			alive.Status != "alive" || alive.Sequence != want {
			t.Errorf("heartbeat %d: %s %s", want, resp.Status, body)
		}
	}
	if again := w.status().ControlPlane; again.Heartbeats != 2 || again.LastHeartbeat == nil ||
		time.Since(*again.LastHeartbeat) > time.Minute {
		t.Errorf("after two heartbeats: %+v", again)
	}

	w.agent.Frpc.Stop()
	wantMetric(t, w.agent, "pipeops_agent_tunnel_up 0")
	if err := w.agent.StartFrpc(); err != nil {
		t.Fatal(err)
	}
	wantMetric(t, w.agent, "pipeops_agent_tunnel_up 1")
	wantMetric(t, w.agent, "pipeops_agent_frpc_restarts_total 1")
	before := *s.Tunnel.Since
	if s = w.status(); s.Tunnel.FrpcRestarts != 1 || !s.Tunnel.Connected || !s.Tunnel.Since.After(before) {
		t.Errorf("after a restart of frpc: %+v, connected before since %s", s.Tunnel, before)
	}
}

// TestStatusOmitsWhatRBACForbids checks that a value that RBAC forbids the agent to read is null, with the API
// server's reason.
func TestStatusOmitsWhatRBACForbids(t *testing.T) {
	t.Parallel()
	w := viewer(t)
	c := w.status().Cluster
	if c.Nodes != nil || !strings.Contains(c.Unavailable["nodes"],
		`nodes is forbidden: User "system:serviceaccount:pipeops-system:viewer" cannot list resource "nodes"`) ||
		c.Pods == nil || c.Version == nil || !c.Reachable || len(c.Unavailable) != 1 {
		t.Errorf("got %+v", c)
	}
}

// wantMetric waits for a line of /metrics.
func wantMetric(t *testing.T, a *agent.Agent, line string) {
	t.Helper()
	eventually(t, func() error {
		if _, text := get(t, http.DefaultClient, a.Operations+"/metrics", nil); !strings.Contains(text, "\n"+line+"\n") {
			return fmt.Errorf("/metrics has no line %q", line)
		}
		return nil
	})
}
