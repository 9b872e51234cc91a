// Package integration tests the agent's binaries with real parts on loopback: etcd and kube-apiserver, stock
// frps and frpc, kubectl, and the development control plane.
package integration

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/rest"

	"github.com/pipeops/vm-agent/tests/harness"
	"github.com/pipeops/vm-agent/tests/harness/agent"
	"github.com/pipeops/vm-agent/tests/harness/cluster"
	"github.com/pipeops/vm-agent/tests/harness/controlplane"
	"github.com/pipeops/vm-agent/tests/harness/process"
)

// api is the API server that all tests share. Each test has a namespace of its own.
var api struct {
	*cluster.Cluster

	agent      *rest.Config // the credential of the agents: a ServiceAccount with cluster-admin
	kubeconfig string       // the same in a file
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
	// Tests that call an agent's tunnel listener directly do not verify its certificate, because each agent has its own.
	// Callers through the gateway or frps do verify it.
	http.DefaultTransport.(*http.Transport).TLSClientConfig = &tls.Config{InsecureSkipVerify: true}
	if api.Cluster, err = cluster.Start(ctx, group); err == nil {
		api.kubeconfig = filepath.Join(group.Dir(), "agent.kubeconfig")
		api.agent, err = api.WriteAgentKubeconfig(ctx, api.kubeconfig)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

const agentID, agentToken = harness.AgentID, harness.AgentToken

// world is a control plane and one agent.
type world struct {
	t     *testing.T
	group *process.Group
	cp    *controlplane.ControlPlane
	agent *agent.Agent
	token string // the caller's, for ask and openStream

	env    []string // of kubectl, beside the kubeconfig
	direct string   // kubeconfig with the agent's credential for the API server
	caller string   // kubeconfig with the agent's token for the gateway
}

// newWorld starts a control plane and prepares an agent, which is not started.
func newWorld(t *testing.T, options ...func(*controlplane.Options)) *world {
	t.Helper()
	h := harness.NewWorld(t, api.kubeconfig, options...)
	w := &world{
		t: t, group: h.Group, cp: h.ControlPlane, agent: h.Agent, token: agentToken,
		direct: api.kubeconfig, caller: filepath.Join(h.Group.Dir(), "caller.kubeconfig"),
	}
	if err := agent.WriteCaller(w.caller, w.cp, agentID, agentToken); err != nil {
		t.Fatal(err)
	}
	return w
}

// connected returns a world whose agent is ready.
func connected(t *testing.T) *world {
	t.Helper()
	w := newWorld(t)
	w.startAgent()
	return w
}

// startAgent starts the agent and waits until it is ready.
func (w *world) startAgent() {
	w.t.Helper()
	harness.StartAgent(w.t, w.agent)
}

// waitReady waits until the agent, which runs already, is ready.
func (w *world) waitReady() {
	w.t.Helper()
	if err := w.agent.WaitReady(w.t.Context()); err != nil {
		w.t.Fatal(err)
	}
}

// bootstrapOnce runs bootstrap --once, which writes frpc's files, and expects success.
func (w *world) bootstrapOnce() {
	w.t.Helper()
	bootstrap, err := w.agent.Once()
	if err != nil {
		w.t.Fatal(err)
	}
	if bootstrap.ExitCode() != 0 {
		w.t.Fatal(bootstrap.Failed())
	}
}

// kubectl runs the real kubectl to its end.
func (w *world) kubectl(kubeconfig, stdin string, args ...string) harness.Result {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), time.Minute)
	defer cancel()
	result, _ := harness.Run(harness.Kubectl(ctx, w.t, w.group.Dir(), kubeconfig, w.env, args...), stdin)
	return result
}

// startKubectl starts kubectl as a caller of the tunnel. It ends with the test at the latest.
func (w *world) startKubectl(name string, args ...string) *process.Process {
	w.t.Helper()
	p, err := w.group.Start(name, append(w.env, "KUBECONFIG="+w.caller), harness.Binary(w.t, "kubectl"), args...)
	if err != nil {
		w.t.Fatal(err)
	}
	return p
}

// mustKubectl runs kubectl through the tunnel and expects success.
func (w *world) mustKubectl(args ...string) string {
	w.t.Helper()
	r := w.kubectl(w.caller, "", args...)
	if r.Code != 0 {
		w.t.Fatalf("kubectl %s: exit code %d: %s", strings.Join(args, " "), r.Code, r.Stderr)
	}
	return r.Stdout
}

// namespace makes a namespace for the test. No controller runs that could remove it: the API server ends with the
// tests.
func (w *world) namespace() string {
	w.t.Helper()
	name := "test-" + strings.ToLower(strings.NewReplacer("/", "-", "_", "-").Replace(w.t.Name()))
	name = fmt.Sprintf("%s-%d", name[:min(len(name), 50)], time.Now().UnixNano()%1e6)
	if r := w.kubectl(w.direct, "", "create", "namespace", name); r.Code != 0 {
		w.t.Fatal(r.Stderr)
	}
	return name
}

// eventually polls for half a minute until ready returns nil.
func eventually(t *testing.T, ready func() error) {
	t.Helper()
	harness.Eventually(t, 30*time.Second, ready)
}

// rotation bounds how long client-go may use the old token of a file that has changed: it reads the file once a
// minute.
const rotation = 90 * time.Second

// get sends a GET and returns the answer with its body.
func get(t *testing.T, client *http.Client, url string, header http.Header) (*http.Response, string) {
	t.Helper()
	return exchange(t, client, http.MethodGet, url, header, "")
}

// asItIs returns redirects as answers, instead of following them.
var asItIs = &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}

// exchange sends a request and returns the answer with its body.
func exchange(t *testing.T, client *http.Client, method, url string, header http.Header,
	body string) (*http.Response, string) {
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
