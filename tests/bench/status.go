package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/pipeops/vm-agent/tests/harness/cluster"
	"github.com/pipeops/vm-agent/tests/harness/process"
	"github.com/pipeops/vm-agent/tests/harness/relay"
)

// status measures the cost of GET /api/agent/status with a real API server, with few objects and with many.
func status(ctx context.Context) error {
	group, err := process.NewGroup()
	if err != nil {
		return err
	}
	defer group.Close()
	c, err := cluster.Start(ctx, group)
	if err != nil {
		return err
	}
	r, err := relay.Start(ctx, "127.0.0.1", strings.TrimPrefix(c.Config.Host, "https://"), 0)
	if err != nil {
		return err
	}
	defer r.Close()
	r.Silent.Store(false)
	config := rest.CopyConfig(c.Config)
	config.Host = "https://" + r.Addr
	kubeconfig := filepath.Join(group.Dir(), "status.kubeconfig")
	if err := cluster.WriteKubeconfig(kubeconfig, config); err != nil {
		return err
	}
	fmt.Println("| pods | nodes | requests to the API server | KB from it | first answer ms " +
		"| answers while it is good, µs | RSS MB at most |")
	fmt.Println("| --- | --- | --- | --- | --- | --- | --- |")
	pods, nodes := 0, 0
	for _, size := range []struct{ pods, nodes int }{{500, 10}, {50_000, 1_000}} {
		fmt.Fprintf(os.Stderr, "status: making %d pods and %d nodes\n", size.pods, size.nodes)
		if err := fill(ctx, c.Config, pods, size.pods, nodes, size.nodes); err != nil {
			return err
		}
		pods, nodes = size.pods, size.nodes
		if err := measureStatus(ctx, group, r, kubeconfig, pods, nodes); err != nil {
			return err
		}
	}
	fmt.Println()
	return nil
}

func measureStatus(ctx context.Context, group *process.Group, r *relay.Relay, kubeconfig string,
	pods, nodes int) error {
	binary, err := process.Binary("proxy")
	if err != nil {
		return err
	}
	listen, err := process.FreeAddr()
	if err != nil {
		return err
	}
	metrics, err := process.FreeAddr()
	if err != nil {
		return err
	}
	proxy, err := group.Start(fmt.Sprintf("status-proxy-%d", pods), []string{
		"PIPEOPS_AGENT_ID=bench", "PIPEOPS_AGENT_TOKEN=callers", "KUBECONFIG=" + kubeconfig, "PIPEOPS_RUN_DIR=" + group.Dir(),
		"PIPEOPS_LISTEN_ADDR=" + listen, "PIPEOPS_METRICS_ADDR=" + metrics,
	}, binary)
	if err != nil {
		return err
	}
	defer proxy.Stop()
	p := peer{url: "http://" + listen, header: http.Header{"Authorization": {"Bearer callers"}}}
	client := &http.Client{}
	if err := process.Poll(ctx, 10*time.Second, proxy.Done(),
		func() error { return call(ctx, client, p, "/version") }); err != nil {
		return err
	}
	requests, err := upstreamRequests(ctx, client, metrics)
	if err != nil {
		return err
	}
	received := r.Received()
	begin := time.Now()
	if err := call(ctx, client, p, "/api/agent/status"); err != nil {
		return err
	}
	first := time.Since(begin)
	received = r.Received() - received
	after, err := upstreamRequests(ctx, client, metrics)
	if err != nil {
		return err
	}
	const again = 1000
	begin = time.Now()
	for range again {
		if err := call(ctx, client, p, "/api/agent/status"); err != nil {
			return err
		}
	}
	shared := time.Since(begin) / again
	peak, err := memory(proxy.Pid(), "VmHWM")
	if err != nil {
		return err
	}
	fmt.Printf("| %d | %d | %d | %d | %d | %d | %.0f |\n", pods, nodes, after-requests, received>>10,
		first.Milliseconds(), shared.Microseconds(), peak)
	return nil
}

// upstreamRequests returns how many requests the proxy has sent to the API server.
func upstreamRequests(ctx context.Context, client *http.Client, addr string) (int, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+"/metrics", nil)
	if err != nil {
		return 0, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return 0, err
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, err
	}
	count := regexp.MustCompile(`(?m)^pipeops_agent_kubernetes_upstream_duration_seconds_count\{lane="own"\} (\d+)$`)
	found := count.FindSubmatch(text)
	if found == nil {
		return 0, errors.New("/metrics does not count the requests to the API server")
	}
	return strconv.Atoi(string(found[1]))
}

// fill adds pods and nodes up to the given numbers. A node is as large as one with fifty images.
func fill(ctx context.Context, config *rest.Config, pods, morePods, nodes, moreNodes int) error {
	config = rest.CopyConfig(config)
	config.ContentType = "application/vnd.kubernetes.protobuf"
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	var images []corev1.ContainerImage
	for i := range 50 {
		name := fmt.Sprintf("registry.example/a/rather/long/name-%d@sha256:%064d", i, i)
		images = append(images, corev1.ContainerImage{Names: []string{name}, SizeBytes: 1 << 26})
	}
	list := corev1.ResourceList{"cpu": resource.MustParse("4"), "memory": resource.MustParse("16Gi")}
	if err := inParallel(nodes, moreNodes, func(i int) error {
		_, err := client.CoreV1().Nodes().Create(ctx, &corev1.Node{
			ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("node-%d", i)},
			Status: corev1.NodeStatus{
				Capacity: list, Allocatable: list, Images: images, NodeInfo: corev1.NodeSystemInfo{KubeletVersion: "v1.36.0"},
				Conditions: []corev1.NodeCondition{{Type: "Ready", Status: "True"}},
			},
		}, metav1.CreateOptions{})
		return err
	}); err != nil {
		return err
	}
	return inParallel(pods, morePods, func(i int) error {
		_, err := client.CoreV1().Pods("default").Create(ctx, &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("pod-%d", i)},
			Spec: corev1.PodSpec{NodeName: fmt.Sprintf("node-%d", i%moreNodes),
				Containers: []corev1.Container{{Name: "c", Image: "none"}}},
		}, metav1.CreateOptions{})
		return err
	})
}

// inParallel calls do for each number, sixteen at a time, and returns one of the errors.
func inParallel(from, to int, do func(int) error) error {
	var group errgroup.Group
	group.SetLimit(16)
	for i := from; i < to; i++ {
		group.Go(func() error { return do(i) })
	}
	return group.Wait()
}
