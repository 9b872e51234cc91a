package manifests

import (
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/api/resource"
)

// TestLostNodesPodIsReplacedSoon checks that two replicas do not wait five minutes, the API server's default.
func TestLostNodesPodIsReplacedSoon(t *testing.T) {
	pod := deployments(t, variants(t)["components/high-availability"])[0].Spec.Template.Spec
	got := map[string]time.Duration{}
	for _, toleration := range pod.Tolerations {
		got[toleration.Key] = time.Duration(*toleration.TolerationSeconds) * time.Second
	}
	want := map[string]time.Duration{"node.kubernetes.io/not-ready": 30 * time.Second,
		"node.kubernetes.io/unreachable": 30 * time.Second}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

// TestNetworkPolicyTakesAnotherPort applies the patch in the comment of network-policy.
func TestNetworkPolicyTakesAnotherPort(t *testing.T) {
	dir := installation(t)
	_, comment, _ := strings.Cut(string(read(t, filepath.Join(dir, "components", "network-policy", "kustomization.yaml"))),
		"#   patches:\n")
	comment, _, _ = strings.Cut(comment, "\n#\n")
	overlay := filepath.Join(dir, "overlays", "port")
	write(t, filepath.Join(overlay, "kustomization.yaml"), "resources: [../../base]\ncomponents: "+
		"[../../components/network-policy]\npatches:\n"+strings.ReplaceAll(comment, "#   ", ""))
	ports := map[int]bool{}
	for _, policy := range objects[networkingv1.NetworkPolicy](t, build(t, overlay), "NetworkPolicy") {
		for _, rule := range policy.Spec.Egress {
			if len(rule.To) == 0 {
				for _, p := range rule.Ports {
					ports[p.Port.IntValue()] = true
				}
			}
		}
	}
	if diff := cmp.Diff(map[int]bool{443: true, 6443: true, 7000: true, 16443: true}, ports); diff != "" {
		t.Errorf("ports to anywhere (-want +got)\n%s", diff)
	}
}

// TestRequestsMeetAutopilotsMinimum sums what GKE Autopilot would raise to its minimum: 50m CPU and 52 MiB.
func TestRequestsMeetAutopilotsMinimum(t *testing.T) {
	var cpu, memory resource.Quantity
	for _, c := range containers(deployments(t, variants(t)["base"])[0].Spec.Template.Spec) {
		cpu.Add(*c.Resources.Requests.Cpu())
		memory.Add(*c.Resources.Requests.Memory())
	}
	if cpu.Cmp(resource.MustParse("50m")) < 0 || memory.Cmp(resource.MustParse("52Mi")) < 0 {
		t.Errorf("the pod requests %s CPU and %s of memory", &cpu, &memory)
	}
}
