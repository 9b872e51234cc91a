package e2e

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"

	"github.com/pipeops/vm-agent/tests/agent"
	"github.com/pipeops/vm-agent/tests/cluster"
)

// load is callers of the agent, who call all the time and watch.
type load struct {
	calls  atomic.Int64
	mu     sync.Mutex
	errors []error
}

func (l *load) failed(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.errors = append(l.errors, err)
}

// startLoad runs until the test ends, or until stop.
func startLoad(t *testing.T, i *installed) (l *load, stop func()) {
	t.Helper()
	config := agent.Caller(i.cp, agentID, agentToken)
	config.QPS = -1
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	l = &load{}
	ctx, cancel := context.WithCancel(t.Context())
	var callers sync.WaitGroup
	for range 4 {
		callers.Go(func() {
			for ctx.Err() == nil {
				if _, err := client.CoreV1().Namespaces().Get(ctx, "default", metav1.GetOptions{}); err != nil && ctx.Err() == nil {
					l.failed(err)
				}
				l.calls.Add(1)
			}
		})
	}
	factory := informers.NewSharedInformerFactory(client, 0)
	informer := factory.Core().V1().Pods().Informer()
	if err := informer.SetWatchErrorHandler(func(_ *cache.Reflector, err error) {
		if ctx.Err() == nil {
			l.failed(fmt.Errorf("watch: %w", err))
		}
	}); err != nil {
		t.Fatal(err)
	}
	factory.Start(ctx.Done())
	factory.WaitForCacheSync(ctx.Done())
	stop = sync.OnceFunc(func() { cancel(); callers.Wait(); factory.Shutdown() })
	t.Cleanup(stop)
	return l, stop
}

// TestHighAvailability: on two nodes, callers notice nothing of a rolling update, of each of the nodes drained in turn,
// and of a pod whose processes are killed.
func TestHighAvailability(t *testing.T) {
	worker, err := node.StartWorker(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := node.StopWorker(context.Background()); err != nil {
			t.Error(err)
		}
	})
	machines := map[string]*cluster.Machine{cluster.NodeName: node.Machine, cluster.WorkerName: worker}
	i := install(t, "high-availability")
	pods := node.Client.CoreV1().Pods("pipeops-system")
	ready := func() []corev1.Pod {
		t.Helper()
		var running []corev1.Pod
		eventually(t, func() error {
			list, err := pods.List(t.Context(), metav1.ListOptions{LabelSelector: "app.kubernetes.io/name=pipeops-agent"})
			if err != nil {
				return err
			}
			running = nil
			for _, pod := range list.Items {
				for _, c := range pod.Status.Conditions {
					if c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue && pod.DeletionTimestamp == nil {
						running = append(running, pod)
					}
				}
			}
			if len(running) != 2 || len(list.Items) != 2 {
				return fmt.Errorf("%d of %d pods are ready", len(running), len(list.Items))
			}
			return nil
		})
		return running
	}
	if on := ready(); on[0].Spec.NodeName == on[1].Spec.NodeName {
		t.Errorf("both pods are on %s", on[0].Spec.NodeName)
	}
	drain := func(name string) func() {
		return func() {
			defer i.must(i.admin, "uncordon", name)
			i.must(i.admin, "drain", name, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout", "3m")
			for _, pod := range ready() {
				if pod.Spec.NodeName == name {
					t.Errorf("%s is on the drained node %s", pod.Name, name)
				}
			}
		}
	}
	for _, event := range []struct {
		name string
		do   func()
	}{
		{"rolling update", func() {
			i.must(i.admin, "-n", "pipeops-system", "rollout", "restart", "deployment/pipeops-agent")
			i.must(i.admin, "-n", "pipeops-system", "rollout", "status", "deployment/pipeops-agent", "--timeout", "2m")
		}},
		{"drained worker", drain(cluster.WorkerName)},
		{"drained node", drain(cluster.NodeName)},
		{"killed pod", func() {
			victim := ready()[0]
			for _, name := range []string{"frpc", "proxy"} {
				const kill = `for p in $(pgrep -x "$1"); do if grep -q "$2" /proc/$p/mountinfo; then kill -9 "$p"; fi; done`
				if out, err := machines[victim.Spec.NodeName].Command(t.Context(), "sh", "-c", kill, "sh", name, string(victim.UID)).CombinedOutput(); err != nil {
					t.Fatalf("kill %s: %v: %s", name, err, out)
				}
			}
			eventually(t, func() error {
				pod, err := pods.Get(t.Context(), victim.Name, metav1.GetOptions{})
				if err == nil && (len(pod.Status.ContainerStatuses) == 0 || pod.Status.ContainerStatuses[0].RestartCount == 0) {
					err = errors.New("the proxy was not started again")
				}
				return err
			})
		}},
	} {
		l, stop := startLoad(t, i)
		event.do()
		ready()
		stop()
		t.Logf("%s: %d calls", event.name, l.calls.Load())
		if len(l.errors) > 0 || l.calls.Load() < 100 {
			t.Errorf("%s: %d of %d calls and watches failed, such as: %v", event.name, len(l.errors), l.calls.Load(), errors.Join(l.errors[:min(5, len(l.errors))]...))
		}
	}
}
