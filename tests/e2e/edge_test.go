package e2e

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/pipeops/vm-agent/tests/harness"
	"github.com/pipeops/vm-agent/tests/harness/cluster"
	"github.com/pipeops/vm-agent/tests/harness/controlplane"
	"github.com/pipeops/vm-agent/tests/harness/process"
)

// ownFrps is the frps of an operator who has no control plane.
type ownFrps struct {
	*controlplane.PlainFrps

	settings   string // of an agent, one per line
	callers    string // URL for callers
	tlsCallers string // the same, if the tunnel is of type https
}

// frpToken holds a dollar sign, which shells and Compose would expand.
const frpToken = "your-$frp-token"

func startFrps(t *testing.T, group *process.Group) *ownFrps {
	t.Helper()
	frps, err := controlplane.StartPlainFrps(t.Context(), group, node.HostIP, frpToken)
	if err != nil {
		t.Fatal(err)
	}
	return &ownFrps{
		PlainFrps: frps,
		settings: fmt.Sprintf("PIPEOPS_FRP_TOKEN=%s\nPIPEOPS_FRP_SERVER_ADDR=%s\nPIPEOPS_FRP_SERVER_PORT=%d\n"+
			"PIPEOPS_FRP_TUNNEL_TYPE=http\nPIPEOPS_FRP_TLS_INSECURE_SKIP_VERIFY=true\n", frpToken, node.HostIP, frps.Bind),
		callers:    fmt.Sprintf("http://%s:%d", node.HostIP, frps.HTTP),
		tlsCallers: fmt.Sprintf("https://%s:%d", node.HostIP, frps.HTTPS),
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

// replacePods begins the commands of the page that rotate the frp token and the group key.
const replacePods = "kubectl apply -k manifests/overlays/edge"

// TestEdgeOverlayNeedsNoControlPlane applies the overlay of a cluster without a control plane, twice: the second pod
// joins the tunnel of the first. Then it rotates the secrets of frps. The only node is one of the control plane.
func TestEdgeOverlayNeedsNoControlPlane(t *testing.T) {
	i := prepare(t)
	taintNode(t)
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

	if err := frps.Restart(t.Context(), "another-frp-token"); err != nil {
		t.Fatal(err)
	}
	i.write("overlays/edge/frp-token", "another-frp-token\n")
	i.write("overlays/edge/group-key", "another-group-key\n")
	newShell(t, filepath.Dir(i.dir), "KUBECONFIG="+i.admin).must(readPage(t).block(t, replacePods))
	i.rollout()
	frps.waitAnswering(t, "edge-7", "your-agent-token")
}

// taintNode gives the node the taint of control-plane nodes until the test ends.
func taintNode(t *testing.T) {
	t.Helper()
	taint := func(change string) error {
		out, err := harness.Run(harness.Kubectl(context.Background(), t, t.TempDir(), node.Kubeconfig, nil,
			"taint", "node", cluster.NodeName, "node-role.kubernetes.io/control-plane:NoSchedule"+change), "")
		if err != nil {
			err = fmt.Errorf("%w: %s", err, out.Stdout)
		}
		return err
	}
	t.Cleanup(func() {
		if err := taint("-"); err != nil {
			t.Error(err)
		}
	})
	if err := taint(""); err != nil {
		t.Fatal(err)
	}
	other := pod("other", "true")
	ns := namespace(t)
	if _, err := node.Client.CoreV1().Pods(ns).Create(t.Context(), other, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error { // pods without the toleration have to wait
		p, err := node.Client.CoreV1().Pods(ns).Get(t.Context(), other.Name, metav1.GetOptions{})
		if err == nil && !slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
			return c.Reason == corev1.PodReasonUnschedulable
		}) {
			err = fmt.Errorf("pod %s: %+v", p.Name, p.Status)
		}
		return err
	})
}
