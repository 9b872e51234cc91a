// Package kubelet stands in for a node in tests that have no root.
package kubelet

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
	"time"

	"github.com/creack/pty"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	utilexec "k8s.io/utils/exec"
)

// Pod is the name of the pod.
const Pod = "pod"

// Kubelet stands in for a real node, because a kubelet needs root. Its streaming is the kubelet's own code
// (k8s.io/cri-streaming). Only the container is a process of this machine. The e2e tests have a real node.
type Kubelet struct {
	// Follow writes what the container logs after its first line, until ctx ends. Each write is sent at once.
	Follow func(ctx context.Context, log io.Writer)
}

type flushing struct{ http.ResponseWriter }

func (f flushing) Write(p []byte) (int, error) {
	n, err := f.ResponseWriter.Write(p)
	if err == nil {
		err = http.NewResponseController(f.ResponseWriter).Flush()
	}
	return n, err
}

func (k *Kubelet) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch parts := strings.Split(strings.Trim(r.URL.Path, "/"), "/"); parts[0] {
	case "containerLogs":
		_, _ = io.WriteString(flushing{w}, "first line\n")
		if k.Follow != nil && r.URL.Query().Get("follow") == "true" {
			k.Follow(r.Context(), flushing{w})
		}
	case "exec", "attach":
		options, err := remotecommand.NewOptions(r)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		protocols := []string{remotecommand.StreamProtocolV4Name}
		if parts[0] == "attach" {
			remotecommand.ServeAttach(w, r, k, parts[2], "", parts[3], options, time.Minute, 10*time.Second, protocols)
			return
		}
		remotecommand.ServeExec(w, r, k, parts[2], "", parts[3], r.URL.Query()["command"], options, time.Minute,
			10*time.Second, protocols)
	case "portForward":
		options, err := portforward.NewV4Options(r)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		portforward.ServePortForward(w, r, k, parts[2], "", options, time.Minute, 10*time.Second,
			portforward.SupportedProtocols)
	default:
		http.NotFound(w, r)
	}
}

// ExecInContainer implements remotecommand.Executor.
func (k *Kubelet) ExecInContainer(ctx context.Context, _, _, _ string, command []string, in io.Reader,
	out, errOut io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize, _ time.Duration) error {
	cmd := exec.CommandContext(ctx, command[0], command[1:]...)
	if tty {
		return inTerminal(cmd, in, out, resize)
	}
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
	return exitCode(cmd.Run())
}

// inTerminal does the work of a container runtime: the process gets a terminal of its own, which follows the size of
// the caller's.
func inTerminal(cmd *exec.Cmd, in io.Reader, out io.Writer, resize <-chan remotecommand.TerminalSize) error {
	terminal, err := pty.Start(cmd)
	if err != nil {
		return err
	}
	defer func() { _ = terminal.Close() }()
	go func() {
		for size := range resize {
			_ = pty.Setsize(terminal, &pty.Winsize{Rows: size.Height, Cols: size.Width})
		}
	}()
	go func() { _, _ = io.Copy(terminal, in) }()
	_, _ = io.Copy(out, terminal) // returns an error when the process has closed its end
	return exitCode(cmd.Wait())
}

// exitCode converts a process's exit code to the error that the kubelet expects.
func exitCode(err error) error {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return &utilexec.CodeExitError{Err: err, Code: exit.ExitCode()}
	}
	return err
}

// AttachContainer implements remotecommand.Attacher. The container is a running cat.
func (k *Kubelet) AttachContainer(ctx context.Context, _, _, _ string, in io.Reader,
	out, errOut io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize) error {
	return k.ExecInContainer(ctx, "", "", "", []string{"cat"}, in, out, errOut, tty, resize, 0)
}

// PortForward implements portforward.PortForwarder. The pod's ports are this machine's.
func (k *Kubelet) PortForward(ctx context.Context, _, _ string, port int32, stream io.ReadWriteCloser) error {
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(int(port))))
	if err != nil {
		return err
	}
	go func() {
		_, _ = io.Copy(conn, stream)
		_ = conn.(*net.TCPConn).CloseWrite()
	}()
	_, err = io.Copy(stream, conn)
	_ = conn.Close()
	return err
}

// RunPod registers a node with the kubelet, and a pod of this namespace that runs on it, until stop.
func (k *Kubelet) RunPod(ctx context.Context, client kubernetes.Interface, namespace string) (stop func(), err error) {
	server := httptest.NewTLSServer(k)
	stop = func() {
		now := int64(0)
		ctx := context.WithoutCancel(ctx)
		_ = client.CoreV1().Pods(namespace).Delete(ctx, Pod, metav1.DeleteOptions{GracePeriodSeconds: &now})
		_ = client.CoreV1().Nodes().Delete(ctx, "node-"+namespace, metav1.DeleteOptions{})
		server.CloseClientConnections()
		server.Close()
	}
	defer func() {
		if err != nil {
			stop()
		}
	}()
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node-" + namespace}}
	if _, err := client.CoreV1().Nodes().Create(ctx, node, metav1.CreateOptions{}); err != nil {
		return nil, err
	}
	status := fmt.Sprintf(`{"status":{"addresses":[{"type":"InternalIP","address":"127.0.0.1"}],`+
		`"daemonEndpoints":{"kubeletEndpoint":{"Port":%d}}}}`, server.Listener.Addr().(*net.TCPAddr).Port)
	if _, err := client.CoreV1().Nodes().Patch(ctx, node.Name, types.StrategicMergePatchType, []byte(status),
		metav1.PatchOptions{}, "status"); err != nil {
		return nil, err
	}
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: Pod},
		Spec:       corev1.PodSpec{NodeName: node.Name, Containers: []corev1.Container{{Name: "c", Image: "none"}}},
	}
	if _, err := client.CoreV1().Pods(namespace).Create(ctx, pod, metav1.CreateOptions{}); err != nil {
		return nil, err
	}
	status = `{"status":{"phase":"Running","containerStatuses":[{"name":"c","image":"none","imageID":"",` +
		`"ready":true,"restartCount":0,"state":{"running":{}}}]}}`
	_, err = client.CoreV1().Pods(namespace).Patch(ctx, pod.Name, types.StrategicMergePatchType, []byte(status),
		metav1.PatchOptions{}, "status")
	return stop, err
}
