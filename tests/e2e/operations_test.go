package e2e

import (
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/pipeops/vm-agent/tests/harness"
	"github.com/pipeops/vm-agent/tests/harness/agent"
	"github.com/pipeops/vm-agent/tests/harness/cluster"
	"github.com/pipeops/vm-agent/tests/harness/controlplane"
)

// previousVersion puts the manifests and the images of the previous version in place of those of this one: of the last
// tag, or of the parent commit while there is none (`make previous`). newVersion puts the manifests of this version
// over them.
func (i *installed) previousVersion() (newVersion func()) {
	t, top := i.t, filepath.Dir(i.dir)
	t.Helper()
	previous := filepath.Join(harness.Root(t), ".build", "previous")
	commit, err := os.ReadFile(filepath.Join(previous, ".build", "COMMIT"))
	if err != nil {
		t.Fatalf("%v: make previous builds it", err)
	}
	t.Logf("the previous version is commit %s", commit)
	sh := newShell(t, top)
	sh.must("mv manifests new && cp -r " + filepath.Join(previous, "manifests") + " manifests && " +
		"cp -r new/overlays/test manifests/overlays")
	base := filepath.Join("base", "kustomization.yaml")
	unpin(t, filepath.Join(i.dir, base))
	data, err := os.ReadFile(filepath.Join(i.dir, base))
	if err != nil {
		t.Fatal(err)
	}
	i.write(base, regexp.MustCompile(`newTag: \S+`).ReplaceAllString(string(data), "newTag: previous"))
	for _, archive := range archives(t) {
		name := filepath.Base(archive)
		image := "docker.io/fatedier/frpc"
		if name != "frpc.tar" {
			image = "docker.io/pipeops/vm-agent"
		}
		// Both versions have the same tag until the manifests name the next one.
		sh.must(fmt.Sprintf("skopeo copy --quiet docker-archive:%s docker-archive:%s:%s:previous",
			filepath.Join(previous, ".build", "images", name), name, image))
		if err := node.ImportImage(t.Context(), filepath.Join(top, name)); err != nil {
			t.Fatal(err)
		}
	}
	return func() { sh.must("cp -r new/. manifests") }
}

// move moves the agent to another control plane with another CA, as the page says. i.cp is the new one afterwards.
func (i *installed) move(p *page, sh *shell, token string) {
	t, old := i.t, i.cp
	t.Helper()
	cp, err := controlplane.Start(t.Context(), controlplane.Options{Group: harness.NewGroup(t), IP: node.HostIP,
		Agents: map[string]string{agentID: token}, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(cp.Close)
	for name, ca := range map[string][]byte{"old-ca.crt": old.CA, "new-ca.crt": cp.CA} {
		if err := os.WriteFile(filepath.Join(sh.dir, name), ca, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	sh.must(p.block(t, "cat old-ca.crt new-ca.crt"))
	sh.must("sed -i 's|^PIPEOPS_API_URL=.*|PIPEOPS_API_URL=" + cp.APIURL +
		"|' manifests/agent.env manifests/overlays/test/agent.env && cp new-ca.crt manifests/overlays/test/ca.crt")
	sh.must(p.command(t, "kubectl apply -k manifests"))
	i.rollout()
	i.cp = cp
	at := filepath.Join(sh.dir, "old.kubeconfig")
	if err := agent.WriteCaller(at, old, agentID, token); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error { // the old pod drains
		if out, err := i.run(at, "", nil, "get", "--raw", "/version"); err == nil ||
			!strings.Contains(err.Error(), "is not connected to the control plane") {
			return fmt.Errorf("the old control plane still has the agent: %s, %w", out, err)
		}
		return nil
	})
	sh.must(p.command(t, "cp new-ca.crt"))
	sh.must(p.command(t, "kubectl -n pipeops-system create secret generic pipeops-agent-tls --from-file=ca.crt --dry-run"))
	sh.must(p.command(t, "kubectl -n pipeops-system rollout restart"))
	i.rollout()
}

// assignRunner has the control plane assign a runner to the agent, which the agent stores in its registry.
func (i *installed) assignRunner(token string) {
	i.t.Helper()
	client, err := rest.HTTPClientFor(agent.Caller(i.cp, agentID, token))
	if err != nil {
		i.t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(i.t.Context(), http.MethodPost, i.cp.GatewayURL+"/agents/"+agentID+
		"/api/control-plane/message", strings.NewReader(`{"id": "m1", "type": "runner_assigned",
		"timestamp": "2026-01-02T03:04:05Z", "data": {"runner_id": "r1", "runner_endpoint": "http://r1.default.svc",
		"runner_token": "token-of-r1", "assigned_at": "2026-01-02T03:04:05Z"}}`))
	if err != nil {
		i.t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := client.Do(req)
	if err != nil {
		i.t.Fatal(err)
	}
	_ = resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		i.t.Fatalf("a runner's assignment: %s", resp.Status)
	}
}

// These begin commands of the page.
const (
	deleteEvicted = "kubectl -n pipeops-system delete pods --field-selector"
	deleteLost    = "kubectl -n pipeops-system delete pod POD --force"
)

// pressWorker has the worker run out of process ids, as its kubelet sees it, until the kubelet has evicted a pod.
func (i *installed) pressWorker(t *testing.T, worker *cluster.Machine) {
	t.Helper()
	run := func(script string) {
		t.Helper()
		if out, err := worker.Command(t.Context(), "sh", "-ec", script).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", script, err, out)
		}
	}
	run("echo 1 >/run/pid_max; mount --bind /run/pid_max /proc/sys/kernel/pid_max")
	eventually(t, func() error {
		pods := i.agents(t)
		if !slices.ContainsFunc(pods, func(p corev1.Pod) bool { return p.Status.Reason == "Evicted" }) {
			return fmt.Errorf("no pod of %d was evicted", len(pods))
		}
		return nil
	})
	run("umount /proc/sys/kernel/pid_max")
	newShell(t, filepath.Dir(i.dir), "KUBECONFIG="+i.admin).must(readPage(t, "OPERATIONS.md").command(t, deleteEvicted))
}

// loseWorker cuts the worker off and kills it. Kubernetes would notice after 50 s; here its Node is reported silent at
// once. The pod must be replaced 30 s later.
func (i *installed) loseWorker(t *testing.T) {
	t.Helper()
	var lost string
	for _, p := range i.agents(t) {
		if p.Spec.NodeName == cluster.WorkerName {
			lost = p.Name
		}
	}
	if lost == "" {
		t.Fatal("no pod is on the worker")
	}
	if err := node.LoseWorker(t.Context()); err != nil {
		t.Fatal(err)
	}
	i.mustKubectl(i.admin, "patch", "node", cluster.WorkerName, "--subresource=status", "--type=strategic", "-p",
		`{"status": {"conditions": [{"type": "Ready", "status": "Unknown", "reason": "NodeStatusUnknown"}]}}`)
	var since, replaced time.Time
	harness.Eventually(t, 2*time.Minute, func() error {
		machine, err := node.Client.CoreV1().Nodes().Get(t.Context(), cluster.WorkerName, metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, taint := range machine.Spec.Taints {
			if taint.Key == corev1.TaintNodeUnreachable && taint.Effect == corev1.TaintEffectNoExecute {
				since = taint.TimeAdded.Time
			}
		}
		replaced = time.Time{}
		for _, p := range i.agents(t) {
			if p.CreationTimestamp.After(replaced) {
				replaced = p.CreationTimestamp.Time
			}
		}
		if since.IsZero() || replaced.Before(since) {
			return fmt.Errorf("the worker has the taints %v, and the last pod is of %s", machine.Spec.Taints, replaced)
		}
		return nil
	})
	if after := replaced.Sub(since); after < 29*time.Second || after > 40*time.Second {
		t.Errorf("the pod was replaced %s after its node was found lost", after)
	}
	newShell(t, filepath.Dir(i.dir), "KUBECONFIG="+i.admin).must(
		strings.ReplaceAll(readPage(t, "OPERATIONS.md").command(t, deleteLost), "POD", lost))
}

// agents returns the agent's pods, those that have ended too.
func (i *installed) agents(t *testing.T) []corev1.Pod {
	t.Helper()
	list, err := node.Client.CoreV1().Pods("pipeops-system").List(t.Context(),
		metav1.ListOptions{LabelSelector: "app.kubernetes.io/name=pipeops-agent"})
	if err != nil {
		t.Fatal(err)
	}
	return list.Items
}
