package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/kubernetes"

	"github.com/pipeops/vm-agent/tests/harness/agent"
	"github.com/pipeops/vm-agent/tests/harness/cluster"
	"github.com/pipeops/vm-agent/tests/harness/process"
)

// load is a set of callers that read, write and watch all the time.
type load struct {
	calls  atomic.Int64
	mu     sync.Mutex
	errors []error
	raw    []error // those that client-go retried
}

func (l *load) failed(to *[]error, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	*to = append(*to, err)
}

// startLoad starts callers that run until the test ends or until stop. stop returns when the watches have seen
// everything that was written. The agent must be allowed to write ConfigMaps.
func startLoad(t *testing.T, i *installed, token string) (l *load, stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	calling, stopCalling := context.WithCancel(ctx)
	l = &load{}
	config := agent.Caller(i.cp, agentID, token)
	config.QPS = -1
	agent.Observe(config, func(r *http.Request, resp *http.Response, err error) {
		switch {
		case r.Context().Err() != nil:
		case err != nil:
			l.failed(&l.raw, err)
		// The API server, too, answers 503 with Retry-After while it drains.
		case resp.StatusCode >= 500 && (resp.StatusCode != http.StatusServiceUnavailable ||
			resp.Header.Get("Retry-After") == ""):
			l.failed(&l.raw, fmt.Errorf("%s %s: %s", r.Method, r.URL.Path, resp.Status))
		}
	})
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	maps := client.CoreV1().ConfigMaps(namespace(t))
	var counter *corev1.ConfigMap
	eventually(t, func() (err error) { // the RBAC rule may be new
		counter, err = maps.Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "counter"}},
			metav1.CreateOptions{})
		return err
	})
	var callers, watchers sync.WaitGroup
	for range 3 {
		callers.Go(func() {
			for calling.Err() == nil {
				if _, err := maps.Get(calling, "counter", metav1.GetOptions{}); err != nil && calling.Err() == nil {
					l.failed(&l.errors, err)
				}
				l.calls.Add(1)
			}
		})
	}
	written := 0
	callers.Go(func() {
		for calling.Err() == nil { // not cancelled at the end, so that every write's outcome is known
			if _, err := maps.Patch(ctx, "counter", types.MergePatchType, fmt.Appendf(nil, `{"data": {"n": "%d"}}`, written+1),
				metav1.PatchOptions{}); err != nil {
				// The write may have been done: client-go does not retry it.
				l.failed(&l.raw, err)
				continue
			}
			written++
			l.calls.Add(1)
		}
	})
	seen := make([]atomic.Int64, 4)
	for n := range seen {
		watchers.Go(func() {
			version := counter.ResourceVersion
			for ctx.Err() == nil {
				w, err := maps.Watch(ctx, metav1.ListOptions{ResourceVersion: version})
				if err != nil {
					if ctx.Err() == nil {
						l.failed(&l.errors, fmt.Errorf("watch: %w", err))
					}
					return
				}
				for event := range w.ResultChan() {
					changed, ok := event.Object.(*corev1.ConfigMap)
					if !ok {
						if ctx.Err() == nil {
							l.failed(&l.raw, fmt.Errorf("watch: %w", apierrors.FromObject(event.Object)))
						}
						continue
					}
					if changed.Name != "counter" {
						continue
					}
					version = changed.ResourceVersion
					if want := fmt.Sprint(seen[n].Load() + 1); changed.Data["n"] != want {
						l.failed(&l.errors, fmt.Errorf("a watch saw %s instead of %s", changed.Data["n"], want))
					}
					seen[n].Add(1)
				}
			}
		})
	}
	stop = sync.OnceFunc(func() {
		stopCalling()
		callers.Wait()
		for n := range seen {
			if err := process.Poll(ctx, 10*time.Second, nil, func() error {
				if got := seen[n].Load(); got != int64(written) {
					return fmt.Errorf("a watch saw %d of %d changes", got, written)
				}
				return nil
			}); err != nil {
				l.failed(&l.errors, err)
			}
		}
		cancel()
		watchers.Wait()
	})
	t.Cleanup(stop)
	return l, stop
}

// TestHighAvailabilityLosesNoCall runs two replicas on two nodes. Callers see no error during a rolling update, nor
// while each node is drained in turn. If a pod's processes are killed, the pod is evicted under pressure, or its node
// is lost, its streams break: then client-go's callers retry, and their watches resume where they were and miss no
// event.
func TestHighAvailabilityLosesNoCall(t *testing.T) {
	worker := startWorker(t)
	machines := map[string]*cluster.Machine{cluster.NodeName: node.Machine, cluster.WorkerName: worker}
	i := install(t, "high-availability", "manage-all-namespaces")
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
			defer i.mustKubectl(i.admin, "uncordon", name)
			i.mustKubectl(i.admin, "drain", name, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout", "3m")
			for _, pod := range ready() {
				if pod.Spec.NodeName == name {
					t.Errorf("%s is on the drained node %s", pod.Name, name)
				}
			}
		}
	}
	for _, event := range []struct {
		name   string
		breaks bool // the pod's streams, so that client-go must retry
		do     func()
	}{
		{"rolling update", false, func() {
			i.mustKubectl(i.admin, "-n", "pipeops-system", "rollout", "restart", "deployment/pipeops-agent")
			i.rollout()
		}},
		{"drained worker", false, drain(cluster.WorkerName)},
		{"drained node", false, drain(cluster.NodeName)},
		{"killed pod", true, func() {
			victim := ready()[0]
			for _, name := range []string{"frpc", "proxy"} {
				const kill = `for p in $(pgrep -x "$1"); do if grep -q "$2" /proc/$p/mountinfo; then kill -9 "$p"; fi; done`
				if out, err := machines[victim.Spec.NodeName].Command(t.Context(), "sh", "-c", kill, "sh", name,
					string(victim.UID)).CombinedOutput(); err != nil {
					t.Fatalf("kill %s: %v: %s", name, err, out)
				}
			}
			eventually(t, func() error {
				pod, err := pods.Get(t.Context(), victim.Name, metav1.GetOptions{})
				if err != nil {
					return err
				}
				for _, c := range slices.Concat(pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses) {
					if c.Name != "bootstrap" && c.RestartCount == 0 {
						return fmt.Errorf("%s was not restarted", c.Name)
					}
				}
				return nil
			})
		}},
		// It evicts one of two pods, so that there is one on each node afterwards.
		{"node pressure", true, func() { i.pressWorker(t, worker) }},
		{"lost node", true, func() { i.loseWorker(t) }},
	} {
		l, stop := startLoad(t, i, agentToken)
		event.do()
		replicas := ready()
		if event.name == "rolling update" {
			shareCalls(t, replicas)
		}
		stop()
		t.Logf("%s: %d calls; %d were tried again or broke", event.name, l.calls.Load(), len(l.raw))
		if !event.breaks {
			l.errors = append(l.errors, l.raw...)
		}
		if len(l.errors) > 0 || l.calls.Load() < 100 {
			t.Errorf("%s: %d of %d calls and watches failed, such as: %v", event.name, len(l.errors), l.calls.Load(),
				errors.Join(l.errors[:min(5, len(l.errors))]...))
		}
	}
}

// answered matches a line of /metrics.
var answered = regexp.MustCompile(`(?m)^pipeops_agent_kubernetes_requests_total{.*} (\S+)$`)

// shareCalls waits until each of two replicas has answered 35 to 65% of the calls since now. The gateway's callers
// share one connection to the agent, which is replaced from time to time.
func shareCalls(t *testing.T, replicas []corev1.Pod) {
	t.Helper()
	calls := func() (n [2]float64, err error) {
		for k, pod := range replicas {
			text, err := node.Client.CoreV1().Pods(pod.Namespace).ProxyGet("http", pod.Name, "9090", "/metrics", nil).
				DoRaw(t.Context())
			if err != nil {
				return n, err
			}
			for _, line := range answered.FindAllSubmatch(text, -1) {
				value, err := strconv.ParseFloat(string(line[1]), 64)
				if err != nil {
					return n, err
				}
				n[k] += value
			}
		}
		return n, nil
	}
	before, err := calls()
	if err != nil {
		t.Fatal(err)
	}
	var first, second float64
	err = wait.PollUntilContextTimeout(t.Context(), time.Second, time.Minute, false, func(context.Context) (bool, error) {
		now, err := calls()
		first, second = now[0]-before[0], now[1]-before[1]
		share := first / (first + second)
		return first+second > 1000 && share > 0.35 && share < 0.65, err
	})
	t.Logf("the replicas have answered %.0f and %.0f calls", first, second)
	if err != nil {
		t.Error(err)
	}
}
