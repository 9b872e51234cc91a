package e2e

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pipeops/vm-agent/tests/harness"
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

// TestEdgeOverlayNeedsNoControlPlane applies the overlay of a cluster without a control plane, twice: the second pod
// joins the tunnel of the first.
func TestEdgeOverlayNeedsNoControlPlane(t *testing.T) {
	i := prepare(t)
	frps := startFrps(t, harness.NewGroup(t))
	const overlay = "overlays/edge/kustomization.yaml"
	data, err := os.ReadFile(filepath.Join(i.dir, overlay))
	if err != nil {
		t.Fatal(err)
	}
	_, address, _ := strings.Cut(strings.TrimSpace(frps.settings), "\n") // the token is in its file
	const placeholder = "PIPEOPS_FRP_SERVER_ADDR=frp.example.com"
	yaml := strings.Replace(string(data), placeholder, strings.ReplaceAll(address, "\n", "\n      - "), 1)
	if yaml == string(data) {
		t.Fatalf("%s has no %s", overlay, placeholder)
	}
	i.write("overlays/edge/agent-token", "your-agent-token\n")
	i.write("overlays/edge/frp-token", frpToken+"\n")
	i.write("overlays/edge/group-key", "your-group-key\n")
	for _, level := range []string{"warn", "info"} {
		i.write(overlay, strings.Replace(yaml, "PIPEOPS_LOG_LEVEL=warn", "PIPEOPS_LOG_LEVEL="+level, 1))
		i.mustKubectl(i.admin, "apply", "-k", "manifests/overlays/edge")
		i.rollout()
		frps.waitAnswering(t, "edge-7", "your-agent-token")
	}
}
