package integration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pipeops/vm-agent/tests/harness"
	"github.com/pipeops/vm-agent/tests/harness/controlplane"
)

// TestDevelopmentControlPlaneKeepsTheContract runs `controlplane check` against the development control plane, over
// both types of tunnel.
func TestDevelopmentControlPlaneKeepsTheContract(t *testing.T) {
	t.Parallel()
	for _, tunnel := range []string{"https", "http"} {
		t.Run(tunnel, func(t *testing.T) {
			t.Parallel()
			w := connectedBy(t, tunnel, api.agent,
				func(o *controlplane.Options) { o.Agents["away"], o.Agents["revoked"] = agentToken, agentToken })
			w.cp.Revoke("revoked", true)
			token := filepath.Join(w.group.Dir(), "token")
			if err := os.WriteFile(token, []byte(agentToken), 0o600); err != nil {
				t.Fatal(err)
			}
			p, err := w.group.Start("check", nil, harness.Binary(t, "controlplane"), "check", "--agent-id", agentID,
				"--token-file", token,
				"--revoked-id", "revoked", "--revoked-token-file", token, "--ca-file", w.cp.CAFile, "--frps", "127.0.0.1",
				"--gateway", w.cp.GatewayURL+"/agents/"+agentID, "--away", w.cp.GatewayURL+"/agents/away", w.cp.APIURL)
			if err != nil {
				t.Fatal(err)
			}
			if code := p.ExitCode(); code != 0 || strings.Contains(p.Log(), "skipped") ||
				!strings.Contains(p.Log(), "200 were answered, and came once") ||
				!strings.Contains(p.Log(), "101 Switching Protocols") {
				t.Errorf("exit code %d:\n%s", code, p.Log())
			}
		})
	}
}
