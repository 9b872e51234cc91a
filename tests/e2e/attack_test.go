package e2e

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/pipeops/vm-agent/tests/harness/attack"
	"github.com/pipeops/vm-agent/tests/harness/cluster"
	"github.com/pipeops/vm-agent/tests/harness/process"
)

// slowest bounds the p99 of an honest caller's calls during an attack, on a machine that does nothing else.
const slowest = time.Second

// TestAttacksKillNoContainer attacks the memory of the shipped pod, with its limits, from all sides at once. No
// container is killed, honest callers are answered in time, a rolling update is followed to its end, and the memory
// is released.
//
// ATTACK_DURATION sets the duration, by default 30 s. Below a minute there are fewer attackers, and response times
// are not checked.
func TestAttacksKillNoContainer(t *testing.T) {
	duration, err := time.ParseDuration(cmp.Or(os.Getenv("ATTACK_DURATION"), "30s"))
	if err != nil {
		t.Fatal(err)
	}
	i := prepare(t)
	i.setting("PIPEOPS_RUNNERS_ALLOWED_HOSTS=" + node.HostIP)
	// Attackers, control plane and API server share two cores, and have a thousand CPU shares. Without as many of
	// its own, the pod would be attacked on its CPU. Memory is as shipped.
	i.patches = `{target: {kind: Deployment}, patch: '[
		{"op": "replace", "path": "/spec/template/spec/initContainers/1/resources/requests/cpu", "value": "700m"},
		{"op": "replace", "path": "/spec/template/spec/containers/0/resources/requests/cpu", "value": "700m"}]'}`
	i.components("manage-all-namespaces", "runners")
	i.apply()
	ns := namespace(t)
	if err := attack.Create(t.Context(), node.Client, ns); err != nil {
		t.Fatal(err)
	}
	// Attackers of the operations listener are in a pod of their own, those of the tunnel listener in the agent's pod.
	neighbour := create(t, ns, pod("neighbour", "exec sleep infinity"), corev1.PodRunning)
	agentPod := i.pod()
	proxy, frpc := pidOf(t, "proxy", agentPod), pidOf(t, "frpc", agentPod)
	addr, config := i.cp.Direct(agentID)
	frps := attack.Target{Addr: addr, TLS: config, Host: config.ServerName, Prefix: "/api/k8s", Token: agentToken}
	tunnel := frps
	tunnel.Addr, tunnel.Namespace = "127.0.0.1:8080", networkOf(proxy)
	operations := attack.Target{Addr: net.JoinHostPort(agentPod.Status.PodIP, "9090"),
		Namespace: networkOf(pidOf(t, "sleep", neighbour))}
	for name, handler := range map[string]http.Handler{attack.Hostile: attack.HostileRunner(),
		attack.Loop: attack.LoopRunner(frps, attack.Loop)} {
		if err := frps.Assign(t.Context(), name, serve(t, handler)); err != nil {
			t.Fatal(err)
		}
	}
	size := attack.Size{Floods: 200, Watches: 500, Lists: 100, Uploads: 2000, Idle: 5000, Commands: 20, Ramp: duration / 2}
	if duration < time.Minute { // more TLS handshakes in that time would be an attack on the CPU
		size = attack.Size{Floods: 200, Watches: 125, Lists: 50, Uploads: 500, Idle: 1000, Commands: 20, Ramp: duration / 2}
	}
	waves, err := attack.Waves(attack.Ways{Operations: operations, Tunnel: tunnel, Frps: frps, Namespace: ns}, size)
	if err != nil {
		t.Fatal(err)
	}
	i.write("rolls.yaml", `{"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "rolls"}, "spec": {
		"replicas": 2, "selector": {"matchLabels": {"app": "rolls"}},
		"template": {"metadata": {"labels": {"app": "rolls"}}, "spec": {
			"terminationGracePeriodSeconds": 1, "containers": [{"name": "main", "image": "`+cluster.Busybox+`"}]}}}}`)
	i.mustKubectl(i.caller, "-n", ns, "apply", "-f", filepath.Join(i.dir, "rolls.yaml"))
	i.mustKubectl(i.caller, "-n", ns, "rollout", "status", "deployment/rolls", "--timeout", "1m")

	ctx, cancel := context.WithTimeout(t.Context(), duration)
	defer cancel()
	rolled := 0
	var rolling sync.WaitGroup
	rolling.Go(func() {
		for ctx.Err() == nil { // a rollout that has begun is followed to its end
			for _, args := range [][]string{{"restart", "deployment/rolls"}, {"status", "deployment/rolls", "--timeout", "2m"}} {
				if _, err := i.run(i.caller, "", nil, append([]string{"-n", ns, "rollout"}, args...)...); err != nil {
					t.Errorf("rolling update %d: %v", rolled+1, err)
					return
				}
			}
			rolled++
		}
	})
	victim := &attack.Victim{Pid: proxy, Operations: operations, Honest: frps, Within: 5 * time.Minute}
	if duration >= time.Minute {
		victim.Slowest = slowest
	}
	if err := victim.Attack(ctx, waves, t.Logf); err != nil {
		t.Error(err)
		cancel()
	} else if err := victim.Recover(t.Context(), t.Logf); err != nil {
		t.Error(err)
	}
	rolling.Wait()
	peak, _ := process.Memory(frpc, "VmHWM") // 0 if the process has ended
	t.Logf("%d rolling updates; RSS of frpc at most %.0f MB", rolled, peak)

	agentPod = i.pod()
	for _, c := range slices.Concat(agentPod.Status.InitContainerStatuses, agentPod.Status.ContainerStatuses) {
		if c.RestartCount > 0 || c.LastTerminationState.Terminated != nil {
			t.Errorf("container %s was restarted %d times, the last time after: %+v", c.Name, c.RestartCount,
				c.LastTerminationState.Terminated)
		}
	}
}

// setting adds a line to the agent's environment.
func (i *installed) setting(line string) {
	i.t.Helper()
	const name = "overlays/test/agent.env"
	data, err := os.ReadFile(filepath.Join(i.dir, name))
	if err != nil {
		i.t.Fatal(err)
	}
	i.write(name, string(data)+line+"\n")
}

// pod waits until the agent has exactly one pod, and returns it.
func (i *installed) pod() *corev1.Pod {
	i.t.Helper()
	var found *corev1.Pod
	eventually(i.t, func() error {
		pods, err := node.Client.CoreV1().Pods(i.ns).List(i.t.Context(),
			metav1.ListOptions{LabelSelector: "app.kubernetes.io/name=pipeops-agent"})
		if err == nil && len(pods.Items) != 1 {
			err = fmt.Errorf("there are %d pods of the agent", len(pods.Items))
		}
		if err == nil {
			found = &pods.Items[0]
		}
		return err
	})
	return found
}

// pidOf returns the id that a pod's process has on this machine.
func pidOf(t *testing.T, name string, pod *corev1.Pod) int {
	t.Helper()
	names, _ := filepath.Glob("/proc/[0-9]*/comm")
	for _, path := range names {
		comm, _ := os.ReadFile(path) // the process may have ended
		mounts, _ := os.ReadFile(filepath.Join(filepath.Dir(path), "mountinfo"))
		var pid int
		if _, err := fmt.Sscanf(path, "/proc/%d/comm", &pid); err == nil && string(comm) == name+"\n" &&
			strings.Contains(string(mounts), string(pod.UID)) {
			return pid
		}
	}
	t.Fatalf("pod %s has no process %s", pod.Name, name)
	return 0
}

// networkOf returns the path of a process's network namespace.
func networkOf(pid int) string { return fmt.Sprintf("/proc/%d/ns/net", pid) }

// serve serves handler where pods can reach it, and returns its URL.
func serve(t *testing.T, handler http.Handler) string {
	t.Helper()
	listener, err := net.Listen("tcp", net.JoinHostPort(node.HostIP, "0"))
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewUnstartedServer(handler)
	_ = server.Listener.Close()
	server.Listener = listener
	server.Start()
	t.Cleanup(func() { server.CloseClientConnections(); server.Close() })
	return server.URL
}
