package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pipeops/vm-agent/frpc"
	"github.com/pipeops/vm-agent/tests/harness/agent"
	"github.com/pipeops/vm-agent/tests/harness/controlplane"
)

// TestAgentCannotTakeAnotherAgentsTunnel checks that the control plane's plugin identifies an agent by its
// credential, and refuses it another agent's names, whatever its frpc.toml says.
func TestAgentCannotTakeAnotherAgentsTunnel(t *testing.T) {
	t.Parallel()
	eachMethod(t, func(t *testing.T, method func(*controlplane.Options)) {
		const thief, token = "agent-002", "the-thiefs-token"
		w := newWorld(t, method, func(o *controlplane.Options) { o.Agents[thief] = token })
		var err error
		if w.agent, err = agent.New(w.group, w.cp, thief, token, api.kubeconfig); err != nil {
			t.Fatal(err)
		}
		w.bootstrapOnce()
		toml := strings.ReplaceAll(w.file(frpc.ConfigFile), thief, agentID)
		if !strings.Contains(toml, "metadatas.") {
			toml = fmt.Sprintf("metadatas.agent_id = %q\n%s", agentID, toml)
		}
		toml = strings.ReplaceAll(toml, "/agent-"+agentID+"/", "/agent-"+thief+"/") // the thief's own token
		if err := os.WriteFile(filepath.Join(w.agent.RunDir, frpc.ConfigFile), []byte(toml), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := w.agent.StartFrpc(); err != nil {
			t.Fatal(err)
		}
		if err := w.agent.StartProxy(); err != nil { // frpc opens no tunnel to a proxy that is not ready
			t.Fatal(err)
		}
		eventually(t, func() error {
			const want = `the lease of agent "` + thief + `" is not for this tunnel`
			proxies, err := w.lease().Frpc.Admin.Status(t.Context())
			if err == nil && (len(proxies) != 1 || proxies[0].Status != "start error" ||
				!strings.Contains(proxies[0].Err, want)) {
				err = fmt.Errorf("frpc's proxies are %+v, want %q", proxies, want)
			}
			return err
		})
	})
}
