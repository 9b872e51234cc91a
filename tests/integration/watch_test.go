package integration

import (
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/pipeops/vm-agent/tests/harness/agent"
)

// TestSilentWatchIsNotCut keeps a watch silent for longer than the longest timeout on the way, 120 s (frps's wait for
// headers, and the proxy's for idle connections). The watch then gets its next event. The proxy's unit tests cover a
// day of silence.
func TestSilentWatchIsNotCut(t *testing.T) {
	t.Parallel()
	w := connected(t)
	ns := w.namespace()
	client, err := kubernetes.NewForConfig(agent.Caller(w.cp, agentID, agentToken))
	if err != nil {
		t.Fatal(err)
	}
	watch, err := client.CoreV1().ConfigMaps(ns).Watch(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer watch.Stop()
	select {
	case event, open := <-watch.ResultChan():
		t.Fatalf("not silent: %+v, open: %v", event, open)
	case <-time.After(125 * time.Second):
	}
	create(t, ns, "after", 1)
	select {
	case event, open := <-watch.ResultChan():
		if !open || event.Type != "ADDED" {
			t.Fatalf("got %+v, open: %v", event, open)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("no event")
	}
}
