// Package integration tests the agent's binaries with real parts on loopback: etcd and kube-apiserver, stock
// frps and frpc, kubectl, and the development control plane.
package integration

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/rest"

	"github.com/pipeops/vm-agent/tests/harness/agent"
	"github.com/pipeops/vm-agent/tests/harness/cluster"
	"github.com/pipeops/vm-agent/tests/harness/controlplane"
	"github.com/pipeops/vm-agent/tests/harness/process"
)

// api is the API server that all tests share. They keep apart by the names of their namespaces.
var api struct {
	*cluster.Cluster

	agent      *rest.Config // the credential of the agents: a ServiceAccount with cluster-admin
	kubeconfig string       // the same as a file
}

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
	defer group.Close()
	// For tests of an agent's tunnel listener itself: each has another certificate. Whoever goes through the gateway
	// or frps verifies it.
	http.DefaultTransport.(*http.Transport).TLSClientConfig = &tls.Config{InsecureSkipVerify: true}
	if api.Cluster, err = cluster.Start(ctx, group); err == nil {
		api.agent, err = api.ServiceAccount(ctx, "pipeops-system", "pipeops-agent", "cluster-admin")
	}
	if err == nil {
		api.kubeconfig = filepath.Join(group.Dir(), "agent.kubeconfig")
		err = cluster.WriteKubeconfig(api.kubeconfig, api.agent)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

const (
	agentID    = "agent-001"
	agentToken = "the-agents-token"
)

// world is a control plane and one agent.
type world struct {
	t     *testing.T
	group *process.Group
	cp    *controlplane.ControlPlane
	agent *agent.Agent
	token string // of the caller of ask and begin

	env    []string // of kubectl, beside the kubeconfig
	direct string   // kubeconfig: the agent's credential, straight to the API server
	caller string   // kubeconfig: the agent's token, through the gateway, frps, frpc and the proxy
}

// newWorld starts a control plane and prepares an agent, which is not started.
func newWorld(t *testing.T, options ...func(*controlplane.Options)) *world {
	t.Helper()
	group, err := process.NewGroup()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(group.Close)
	log, err := os.Create(filepath.Join(group.Dir(), "controlplane.log"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = log.Close() })
	w := &world{t: t, group: group, token: agentToken, direct: api.kubeconfig, caller: filepath.Join(group.Dir(), "caller.kubeconfig")}
	o := controlplane.Options{Group: group, Agents: map[string]string{agentID: agentToken}, Log: slog.New(slog.NewTextHandler(log, nil))}
	for _, option := range options {
		option(&o)
	}
	w.cp, err = controlplane.Start(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.cp.Close)
	if w.agent, err = agent.New(group, w.cp, agentID, agentToken, api.kubeconfig); err != nil {
		t.Fatal(err)
	}
	if err := agent.WriteCaller(w.caller, w.cp, agentID, agentToken); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if !t.Failed() {
			return
		}
		logs, _ := filepath.Glob(filepath.Join(group.Dir(), "*.log"))
		for _, name := range logs {
			data, _ := os.ReadFile(name)
			lines := strings.Split(string(data), "\n")
			t.Logf("%s:\n%s", filepath.Base(name), strings.Join(lines[max(0, len(lines)-15):], "\n"))
		}
	})
	return w
}

// connected is a world whose agent is ready.
func connected(t *testing.T) *world {
	t.Helper()
	w := newWorld(t)
	if err := w.agent.Start(); err != nil {
		t.Fatal(err)
	}
	if err := w.agent.WaitReady(t.Context()); err != nil {
		t.Fatal(err)
	}
	return w
}

// result is what a person sees of a command.
type result struct {
	Stdout, Stderr string
	Code           int
}

// kubectl runs the real one.
func (w *world) kubectl(kubeconfig, stdin string, args ...string) result {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, w.binary("kubectl"), args...)
	cmd.Env = append([]string{"HOME=" + w.group.Dir(), "KUBECONFIG=" + kubeconfig, "PATH=" + os.Getenv("PATH")}, w.env...)
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &stdout, &stderr
	_ = cmd.Run() // the exit code tells
	return result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// must runs kubectl through the tunnel and expects success.
func (w *world) must(args ...string) string {
	w.t.Helper()
	r := w.kubectl(w.caller, "", args...)
	if r.Code != 0 {
		w.t.Fatalf("kubectl %s: exit code %d: %s", strings.Join(args, " "), r.Code, r.Stderr)
	}
	return r.Stdout
}

func (w *world) binary(name string) string {
	w.t.Helper()
	path, err := process.Binary(name)
	if err != nil {
		w.t.Fatal(err)
	}
	return path
}

// namespace makes a namespace of the test's own. No controller runs that could remove it; the API server
// ends with the tests.
func (w *world) namespace() string {
	w.t.Helper()
	name := "test-" + strings.ToLower(strings.NewReplacer("/", "-", "_", "-").Replace(w.t.Name())) + fmt.Sprintf("-%d", time.Now().UnixNano()%1e6)
	if r := w.kubectl(w.direct, "", "create", "namespace", name); r.Code != 0 {
		w.t.Fatal(r.Stderr)
	}
	return name
}

// eventually polls until ready returns nil.
func eventually(t *testing.T, ready func() error) {
	t.Helper()
	eventuallyWithin(t, 30*time.Second, ready)
}

// rotation is how long client-go may go on with a token from a file that has changed: it looks once a minute.
const rotation = 90 * time.Second

func eventuallyWithin(t *testing.T, timeout time.Duration, ready func() error) {
	t.Helper()
	if err := process.Poll(t.Context(), timeout, nil, ready); err != nil {
		t.Fatal(err)
	}
}

// get sends a GET and returns the answer with its body.
func get(t *testing.T, client *http.Client, url string, header http.Header) (*http.Response, string) {
	t.Helper()
	return exchange(t, client, http.MethodGet, url, header, "")
}

// asItIs takes redirects for answers.
var asItIs = &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}

// exchange sends a request and returns the answer with its body.
func exchange(t *testing.T, client *http.Client, method, url string, header http.Header, body string) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header = header
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(answer)
}
