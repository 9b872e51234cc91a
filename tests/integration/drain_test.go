package integration

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"

	"github.com/pipeops/vm-agent/tests/harness"
	"github.com/pipeops/vm-agent/tests/harness/agent"
)

// informer follows the ConfigMaps of a namespace through the tunnel.
type informer struct {
	mu     sync.Mutex
	seen   map[string]bool
	errors []error
}

func (i *informer) failed(err error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.errors = append(i.errors, err)
}

// body reports a watch that breaks, because an informer calls its handler only for a watch that does not begin.
type body struct {
	io.ReadCloser
	ctx    context.Context
	failed func(error)
}

func (b *body) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err != nil && err != io.EOF && b.ctx.Err() == nil {
		b.failed(err)
	}
	return n, err
}

func newInformer(t *testing.T, w *world, ns string) *informer {
	t.Helper()
	i := &informer{seen: map[string]bool{}}
	config := agent.Caller(w.cp, agentID, agentToken)
	agent.Observe(config, func(r *http.Request, resp *http.Response, err error) {
		if err == nil {
			resp.Body = &body{resp.Body, r.Context(), i.failed}
		}
	})
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	factory := informers.NewSharedInformerFactoryWithOptions(client, 0, informers.WithNamespace(ns))
	configMaps := factory.Core().V1().ConfigMaps().Informer()
	if err := configMaps.SetWatchErrorHandler(func(_ *cache.Reflector, err error) { i.failed(err) }); err != nil {
		t.Fatal(err)
	}
	if _, err := configMaps.AddEventHandler(cache.ResourceEventHandlerFuncs{AddFunc: func(object any) {
		i.mu.Lock()
		defer i.mu.Unlock()
		i.seen[object.(*corev1.ConfigMap).Name] = true
	}}); err != nil {
		t.Fatal(err)
	}
	factory.Start(t.Context().Done())
	t.Cleanup(factory.Shutdown)
	factory.WaitForCacheSync(t.Context().Done())
	return i
}

// create makes n ConfigMaps, directly at the API server, and returns their names.
func create(t *testing.T, ns, prefix string, n int) []string {
	t.Helper()
	var names []string
	for i := range n {
		names = append(names, fmt.Sprintf("%s-%d", prefix, i))
		object := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: names[i]}}
		if _, err := api.Client.CoreV1().ConfigMaps(ns).Create(t.Context(), object, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	return names
}

// waitSeen waits until the informer has seen all names.
func (i *informer) waitSeen(t *testing.T, names []string) {
	t.Helper()
	eventually(t, func() error {
		i.mu.Lock()
		defer i.mu.Unlock()
		for _, name := range names {
			if !i.seen[name] {
				return fmt.Errorf("the informer has not seen %s; errors: %v", name, i.errors)
			}
		}
		return nil
	})
}

// TestInformerSeesNoErrorDuringADrain stops the proxy gracefully and starts it again. The informer misses nothing and
// logs no error.
func TestInformerSeesNoErrorDuringADrain(t *testing.T) {
	t.Parallel()
	w := connected(t)
	ns := w.namespace()
	i := newInformer(t, w, ns)
	i.waitSeen(t, create(t, ns, "before", 10))
	if err := syscall.Kill(w.agent.Proxy.Pid(), syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	names := create(t, ns, "while", 10)
	if code := w.agent.Proxy.ExitCode(); code != 0 {
		t.Errorf("the proxy's exit code is %d:\n%s", code, w.agent.Proxy.Log())
	}
	if err := w.agent.StartProxy(); err != nil {
		t.Fatal(err)
	}
	i.waitSeen(t, append(names, create(t, ns, "after", 10)...))
	i.mu.Lock()
	defer i.mu.Unlock()
	if len(i.errors) > 0 {
		t.Errorf("the informer had errors: %v", i.errors)
	}
}

// TestNoCallFailsWhileAReplicaStops checks that callers who do not retry see no error, however often they call.
func TestNoCallFailsWhileAReplicaStops(t *testing.T) {
	t.Parallel()
	w := connected(t)
	second, err := agent.New(w.group, w.cp, agentID, agentToken, api.kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	second.Env = append(second.Env, "PIPEOPS_INSTANCE=second")
	if err := errors.Join(second.Start(), second.WaitReady(t.Context())); err != nil {
		t.Fatal(err)
	}
	client, base := w.client()
	var leaving *agent.Agent // whom the gateway has chosen
	stopped := make(chan struct{})
	var callers sync.WaitGroup
	call := func(pause time.Duration) {
		for i := 0; t.Context().Err() == nil; i++ {
			req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, base+"/api/k8s/api/v1/namespaces", nil)
			if err != nil {
				t.Error(err)
				return
			}
			resp, err := client.Do(req)
			if err != nil {
				t.Errorf("call %d, every %s: %v", i, pause, err)
				continue
			}
			if body, err := io.ReadAll(resp.Body); err != nil || resp.StatusCode != http.StatusOK {
				t.Errorf("call %d, every %s: %s %.200s %v", i, pause, resp.Status, body, err)
			}
			_ = resp.Body.Close()
			select {
			case <-stopped:
				return
			case <-time.After(pause):
			}
		}
	}
	for _, ms := range []time.Duration{5, 20, 700, 3000} {
		callers.Go(func() { call(ms * time.Millisecond) })
	}
	eventually(t, func() error {
		for _, replica := range []*agent.Agent{w.agent, second} {
			if strings.Contains(replica.Proxy.Log(), `"resource":"namespaces"`) {
				leaving = replica
				return nil
			}
		}
		return errors.New("no replica has answered a call")
	})
	leaving.Proxy.Stop()
	close(stopped)
	callers.Wait()
}

// TestInformerMissesNoEvent kills each hop in turn.
func TestInformerMissesNoEvent(t *testing.T) {
	t.Parallel()
	w := connected(t)
	ns := w.namespace()
	i := newInformer(t, w, ns)
	for hop, kill := range map[string]func() error{
		"frpc":  func() error { w.agent.Frpc.Kill(); return w.agent.StartFrpc() },
		"proxy": func() error { w.agent.Proxy.Kill(); return w.agent.StartProxy() },
		"frps":  func() error { w.cp.StopFrps(); return w.cp.StartFrps(t.Context()) },
	} {
		i.waitSeen(t, create(t, ns, hop+"-before", 5))
		if err := kill(); err != nil {
			t.Fatal(err)
		}
		i.waitSeen(t, create(t, ns, hop+"-after", 5))
	}
}

// session is a running kubectl exec that waits for a line.
type session struct {
	cmd   *exec.Cmd
	stdin io.WriteCloser
	out   *bufio.Reader
}

func startSession(t *testing.T, w *world, ns string) *session {
	t.Helper()
	s := &session{cmd: harness.Kubectl(t.Context(), t, w.group.Dir(), w.caller, nil,
		"exec", "-i", "pod", "-n", ns, "--", "sh", "-c", "echo started; read line && echo got $line")}
	var err error
	if s.stdin, err = s.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	s.out = bufio.NewReader(out)
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.cmd.Process.Kill(); _ = s.cmd.Wait() })
	if line, err := s.out.ReadString('\n'); err != nil || line != "started\n" {
		t.Fatalf("exec: got %q, %v", line, err)
	}
	return s
}

// wasCut waits for kubectl's end, and reports whether kubectl says that the session was cut. By SPDY it never does: it
// takes the end of the connection for the end of the command.
func (s *session) wasCut() bool { return s.cmd.Wait() != nil || !api.Supports("WebSocket") }

// startDraining tells the proxy to stop, and waits until /ready reports that it drains.
func startDraining(t *testing.T, w *world) {
	t.Helper()
	if err := syscall.Kill(w.agent.Proxy.Pid(), syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		_, answer, err := w.agent.Ready(t.Context())
		if err == nil && answer.Checks["shutdown"].OK {
			err = errors.New("the proxy does not drain")
		}
		return err
	})
}

// TestExecFinishesDuringADrain checks that running streams go on, that calls are answered, and that new streams are
// told to retry once the tunnel is withdrawn.
func TestExecFinishesDuringADrain(t *testing.T) {
	t.Parallel()
	w := connected(t)
	ns := w.namespace()
	runningPod(t, ns)
	s := startSession(t, w, ns)
	startDraining(t, w)
	token := http.Header{"Authorization": {"Bearer " + agentToken}}
	log := w.agent.Tunnel + "/api/k8s/api/v1/namespaces/" + ns + "/pods/pod/log"
	eventually(t, func() error {
		resp, body := get(t, http.DefaultClient, log, token)
		if resp.StatusCode != http.StatusServiceUnavailable || resp.Header.Get("Retry-After") == "" {
			return fmt.Errorf("a new stream: %s %v %s", resp.Status, resp.Header, body)
		}
		return nil
	})
	resp, body := get(t, http.DefaultClient, w.agent.Tunnel+"/api/k8s/version", token)
	if resp.StatusCode != http.StatusOK {
		t.Errorf("a call: %s %s", resp.Status, body)
	}
	if _, err := io.WriteString(s.stdin, "hello\n"); err != nil {
		t.Fatal(err)
	}
	if line, err := s.out.ReadString('\n'); err != nil || line != "got hello\n" {
		t.Errorf("exec: got %q, %v", line, err)
	}
	if err := s.cmd.Wait(); err != nil {
		t.Errorf("exec: %v", err)
	}
	if code := w.agent.Proxy.ExitCode(); code != 0 {
		t.Errorf("the proxy's exit code is %d:\n%s", code, w.agent.Proxy.Log())
	}
}

// TestDrainTimeoutCutsStreams checks that a stream that does not end is cut when the drain timeout expires.
func TestDrainTimeoutCutsStreams(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.agent.Env = append(w.agent.Env, "PIPEOPS_DRAIN_TIMEOUT=100ms")
	w.startAgent()
	ns := w.namespace()
	runningPod(t, ns)
	s := startSession(t, w, ns)
	if err := syscall.Kill(w.agent.Proxy.Pid(), syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if !s.wasCut() {
		t.Error("exec succeeded")
	}
	if !strings.Contains(w.agent.Proxy.Log(), "drain timeout reached") {
		t.Error("the proxy did not cut the stream")
	}
	if code := w.agent.Proxy.ExitCode(); code != 0 {
		t.Errorf("the proxy's exit code is %d:\n%s", code, w.agent.Proxy.Log())
	}
}

// TestSecondSignalSkipsTheDrain checks that a second SIGTERM ends the proxy at once.
func TestSecondSignalSkipsTheDrain(t *testing.T) {
	t.Parallel()
	w := connected(t)
	ns := w.namespace()
	runningPod(t, ns)
	startSession(t, w, ns)
	startDraining(t, w)
	if err := syscall.Kill(w.agent.Proxy.Pid(), syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if code := w.agent.Proxy.ExitCode(); code != 143 {
		t.Errorf("exit code %d, want 143", code)
	}
}
