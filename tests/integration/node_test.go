package integration

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	utilexec "k8s.io/utils/exec"
)

// kubelet stands in for a node: a kubelet needs root. Its streaming is the kubelet's own code
// (k8s.io/cri-streaming); only the container is a process of this machine. The e2e tests have a real node.
type kubelet struct{ lines chan string }

func (k *kubelet) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch parts := strings.Split(strings.Trim(r.URL.Path, "/"), "/"); parts[0] {
	case "containerLogs":
		_, _ = io.WriteString(w, "first line\n")
		_ = http.NewResponseController(w).Flush()
		if r.URL.Query().Get("follow") != "true" {
			return
		}
		for {
			select {
			case line, open := <-k.lines:
				if !open {
					return
				}
				_, _ = io.WriteString(w, line+"\n")
				_ = http.NewResponseController(w).Flush()
			case <-r.Context().Done():
				return
			}
		}
	case "exec":
		options, err := remotecommand.NewOptions(r)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		remotecommand.ServeExec(w, r, k, parts[2], "", parts[3], r.URL.Query()["command"], options,
			time.Minute, 10*time.Second, []string{remotecommand.StreamProtocolV4Name})
	default:
		http.NotFound(w, r)
	}
}

// ExecInContainer implements remotecommand.Executor.
func (k *kubelet) ExecInContainer(ctx context.Context, _, _, _ string, command []string, in io.Reader, out, errOut io.WriteCloser, _ bool, _ <-chan remotecommand.TerminalSize, _ time.Duration) error {
	cmd := exec.CommandContext(ctx, command[0], command[1:]...)
	if in != nil {
		stdin, err := cmd.StdinPipe()
		if err != nil {
			return err
		}
		go func() {
			_, _ = io.Copy(stdin, in)
			_ = stdin.Close()
		}()
	}
	cmd.Stdout, cmd.Stderr = out, errOut
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return &utilexec.CodeExitError{Err: err, Code: exit.ExitCode()}
	}
	return err
}

// runningPod registers a node with the kubelet and a running pod on it.
func runningPod(t *testing.T, k *kubelet, ns string) {
	t.Helper()
	server := httptest.NewTLSServer(k)
	t.Cleanup(server.Close)
	_, port, err := net.SplitHostPort(server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(port)
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node-" + ns}}
	if _, err := api.Client.CoreV1().Nodes().Create(ctx, node, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	status := fmt.Sprintf(`{"status":{"addresses":[{"type":"InternalIP","address":"127.0.0.1"}],"daemonEndpoints":{"kubeletEndpoint":{"Port":%d}}}}`, n)
	if _, err := api.Client.CoreV1().Nodes().Patch(ctx, node.Name, types.StrategicMergePatchType, []byte(status), metav1.PatchOptions{}, "status"); err != nil {
		t.Fatal(err)
	}
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "pod"},
		Spec:       corev1.PodSpec{NodeName: node.Name, Containers: []corev1.Container{{Name: "c", Image: "none"}}},
	}
	if _, err := api.Client.CoreV1().Pods(ns).Create(ctx, pod, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // no kubelet that would
		now := int64(0)
		_ = api.Client.CoreV1().Pods(ns).Delete(context.Background(), pod.Name, metav1.DeleteOptions{GracePeriodSeconds: &now})
		_ = api.Client.CoreV1().Nodes().Delete(context.Background(), node.Name, metav1.DeleteOptions{})
	})
	status = `{"status":{"phase":"Running","containerStatuses":[{"name":"c","image":"none","imageID":"","ready":true,"restartCount":0,"state":{"running":{}}}]}}`
	if _, err := api.Client.CoreV1().Pods(ns).Patch(ctx, pod.Name, types.StrategicMergePatchType, []byte(status), metav1.PatchOptions{}, "status"); err != nil {
		t.Fatal(err)
	}
}

func TestLogs(t *testing.T) {
	w := connected(t)
	ns := w.namespace()
	k := &kubelet{lines: make(chan string)}
	runningPod(t, k, ns)
	if got := w.must("logs", "pod", "-n", ns); got != "first line\n" {
		t.Errorf("logs: got %q", got)
	}
	follow, err := w.group.Start("follow", []string{"KUBECONFIG=" + w.caller}, w.binary("kubectl"), "logs", "-f", "pod", "-n", ns)
	if err != nil {
		t.Fatal(err)
	}
	// Each line must arrive before the next is written: nothing on the way may hold it back.
	want := "first line\n"
	for i := range 3 {
		eventually(t, func() error {
			if got := follow.Log(); got != want {
				return fmt.Errorf("logs -f: got %q, want %q", got, want)
			}
			return nil
		})
		line := fmt.Sprintf("line %d", i)
		k.lines <- line
		want += line + "\n"
	}
	close(k.lines)
	if code := follow.ExitCode(); code != 0 || follow.Log() != want {
		t.Errorf("logs -f: exit code %d, got %q, want %q", code, follow.Log(), want)
	}
}

func TestExec(t *testing.T) {
	w := connected(t)
	ns := w.namespace()
	runningPod(t, &kubelet{}, ns)
	for _, protocol := range []struct{ name, websockets string }{{"websocket", "true"}, {"SPDY", "false"}} {
		t.Run(protocol.name, func(t *testing.T) {
			t.Setenv("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", protocol.websockets)
			big := strings.Repeat("0123456789abcdef", 1<<16) // 1 MiB, both ways
			r := w.kubectl(w.caller, big, "exec", "-i", "pod", "-n", ns, "--", "sh", "-c", "cat; echo error >&2; exit 7")
			if r.Stdout != big || !strings.HasPrefix(r.Stderr, "error\n") || r.Code != 7 {
				t.Errorf("exec: %d bytes of %d came back, stderr %q, exit code %d", len(r.Stdout), len(big), r.Stderr, r.Code)
			}
		})
	}
}
