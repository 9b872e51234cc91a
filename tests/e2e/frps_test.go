package e2e

import (
	"fmt"
	"net/http"
	"testing"
	"time"

	"github.com/pipeops/vm-agent/tests/harness/controlplane"
	"github.com/pipeops/vm-agent/tests/harness/process"
)

// ownFrps is the frps of an operator who has no control plane.
type ownFrps struct {
	settings   string // of an agent, one per line
	callers    string // URL for callers
	tlsCallers string // the same, if the tunnel is of type https
}

// frpToken holds a dollar sign, which shells and Compose would expand.
const frpToken = "your-$frp-token"

func startFrps(t *testing.T, group *process.Group) *ownFrps {
	t.Helper()
	ports, err := controlplane.StartPlainFrps(t.Context(), group, node.HostIP, frpToken)
	if err != nil {
		t.Fatal(err)
	}
	return &ownFrps{
		settings: fmt.Sprintf("PIPEOPS_FRP_TOKEN=%s\nPIPEOPS_FRP_SERVER_ADDR=%s\nPIPEOPS_FRP_SERVER_PORT=%d\n"+
			"PIPEOPS_FRP_TUNNEL_TYPE=http\nPIPEOPS_FRP_TLS_INSECURE_SKIP_VERIFY=true\n", frpToken, node.HostIP, ports.Bind),
		callers:    fmt.Sprintf("http://%s:%d", node.HostIP, ports.HTTP),
		tlsCallers: fmt.Sprintf("https://%s:%d", node.HostIP, ports.HTTPS),
	}
}

// waitAnswering waits until the API server answers callers of the agent with this id.
func (f *ownFrps) waitAnswering(t *testing.T, id, token string) {
	t.Helper()
	client := &http.Client{Timeout: 5 * time.Second}
	eventually(t, func() error {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, f.callers+"/api/k8s/version", nil)
		if err != nil {
			return err
		}
		req.Host = id + ".example.internal"
		req.Header.Set("Authorization", "Bearer "+token)
		resp, err := client.Do(req)
		if err != nil {
			return err
		}
		_ = resp.Body.Close()
		if resp.StatusCode != http.StatusOK || resp.Header.Get("Pipeops-Agent") != id {
			return fmt.Errorf("through the tunnel: %s", resp.Status)
		}
		return nil
	})
}
