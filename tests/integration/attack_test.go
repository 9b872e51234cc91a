package integration

import (
	"context"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/pipeops/vm-agent/tests/harness/attack"
	"github.com/pipeops/vm-agent/tests/harness/process"
)

// TestAttacksStayBelowTheMemoryLimit attacks the proxy's memory from all sides at once. The proxy stays below its
// container's memory limit, calls of honest callers succeed, if more slowly, and the memory is released.
func TestAttacksStayBelowTheMemoryLimit(t *testing.T) {
	// Four fifths of the limit, which the proxy sets itself in a container.
	w, ns := connectedWithRunners(t, "PIPEOPS_FRP_TUNNEL_TYPE=https", "GOMEMLIMIT=204MiB")
	if err := attack.Create(t.Context(), api.Client, ns); err != nil {
		t.Fatal(err)
	}
	addr, config := w.cp.Direct(agentID)
	frps := attack.Target{Addr: addr, TLS: config, Host: config.ServerName, Prefix: "/api/k8s", Token: agentToken}
	tunnel, operations := frps, attack.Target{Addr: strings.TrimPrefix(w.agent.Operations, "http://")}
	tunnel.Addr = strings.TrimPrefix(w.agent.Tunnel, "https://")
	for name, handler := range map[string]http.Handler{attack.Hostile: attack.HostileRunner(),
		attack.Loop: attack.LoopRunner(frps, attack.Loop)} {
		runner := httptest.NewServer(handler)
		t.Cleanup(func() { runner.CloseClientConnections(); runner.Close() })
		if err := frps.Assign(t.Context(), name, runner.URL); err != nil {
			t.Fatal(err)
		}
	}
	waves, err := attack.Waves(attack.Ways{Operations: operations, Tunnel: tunnel, Frps: frps, Namespace: ns},
		attack.Size{Floods: 50, Watches: 100, Lists: 100, Uploads: 300, Idle: 1000, Commands: 10, Ramp: 10 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 25*time.Second)
	defer cancel()
	victim := &attack.Victim{Pid: w.agent.Proxy.Pid(), Operations: operations, Honest: frps, Within: 5 * time.Minute}
	if err := victim.Attack(ctx, waves, t.Logf); err != nil {
		t.Error(err)
	}
	// frpc buffers what callers send until the proxy has read it. Its container has twice the limit.
	if peak, err := process.Memory(w.agent.Frpc.Pid(), "VmHWM"); err != nil || peak > 2*attack.Limit {
		t.Errorf("frpc had %.0f MB, %v", peak, err)
	}
	for _, p := range []interface{ Done() <-chan struct{} }{w.agent.Bootstrap, w.agent.Frpc, w.agent.Proxy} {
		select {
		case <-p.Done():
			t.Error("a process of the agent has ended")
		default:
		}
	}
	if !t.Failed() {
		t.Parallel() // only the attack needs the machine for itself
		if err := victim.Recover(t.Context(), t.Logf); err != nil {
			t.Error(err)
		}
	}
}
