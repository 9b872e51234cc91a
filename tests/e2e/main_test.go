// Package e2e tests on a whole Kubernetes node of real processes. It needs root; `make e2e` runs it.
package e2e

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/pipeops/vm-agent/tests/harness"
	"github.com/pipeops/vm-agent/tests/harness/cluster"
	"github.com/pipeops/vm-agent/tests/harness/process"
)

// node is shared by all tests. Each test has a namespace of its own.
var node *cluster.Node

func TestMain(m *testing.M) {
	if process.ToCrash() {
		os.Exit(crash())
	}
	os.Exit(run(m))
}

func run(m *testing.M) int {
	ctx := context.Background()
	group, err := process.NewGroup()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	begin := time.Now()
	code := 1
	if node, err = cluster.StartNode(ctx, group); err == nil {
		fmt.Printf("the node is ready after %.1f s\n", time.Since(begin).Seconds())
		code = m.Run()
	}
	group.Close()
	if err == nil {
		err = process.Poll(ctx, 30*time.Second, nil, func() error { return findLeftovers(group.Dir(), node.HostIP) })
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return code
}

// namespace makes a namespace that is deleted when the test ends. If the test fails, it logs the state of the pods.
func namespace(t *testing.T) string {
	t.Helper()
	namespaces := node.Client.CoreV1().Namespaces()
	prefix := strings.ToLower(strings.ReplaceAll(t.Name(), "/", "-")) + "-"
	made, err := namespaces.Create(t.Context(),
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: prefix}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx := context.Background() // t.Context has ended
		if t.Failed() {
			report(ctx, t, made.Name)
		}
		// The test does not wait: the controller takes 5 seconds to begin.
		if err := namespaces.Delete(ctx, made.Name, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
	// The API server admits no pods before the controller has made the default ServiceAccount.
	eventually(t, func() error {
		_, err := node.Client.CoreV1().ServiceAccounts(made.Name).Get(t.Context(), "default", metav1.GetOptions{})
		return err
	})
	return made.Name
}

// report logs the state of a namespace's pods, its events and the node's parts.
func report(ctx context.Context, t *testing.T, namespace string) {
	pods, err := node.Client.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		t.Error(err)
	} else {
		for _, pod := range pods.Items {
			t.Logf("pod %s: %+v", pod.Name, pod.Status)
		}
	}
	events, err := node.Client.CoreV1().Events(namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		t.Error(err)
	} else {
		for _, e := range events.Items {
			t.Logf("event %s %s %s: %s", e.LastTimestamp.Format(time.TimeOnly), e.InvolvedObject.Name, e.Reason, e.Message)
		}
	}
	t.Log(node.Report())
}

// eventually polls for a minute until ready returns nil.
func eventually(t *testing.T, ready func() error) {
	t.Helper()
	harness.Eventually(t, time.Minute, ready)
}
