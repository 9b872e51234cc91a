// Package agent runs the agent's own binaries and the stock frpc as a pod does: bootstrap first, then frpc and the
// proxy.
package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync/atomic"
	"time"

	"k8s.io/client-go/rest"

	"github.com/pipeops/vm-agent/bootstrap/kubeconfig"
	"github.com/pipeops/vm-agent/frpc"
	"github.com/pipeops/vm-agent/tests/harness/controlplane"
	"github.com/pipeops/vm-agent/tests/harness/process"
)

// Agent is the three processes of one agent.
type Agent struct {
	Env        []string            // of bootstrap and the proxy, as KEY=value
	Enter      map[string][]string // by the name of a program: the beginning of its command, where to run it
	RunDir     string
	Operations string // URL of the operations listener
	Tunnel     string // URL of the tunnel listener
	Bootstrap  *process.Process
	Frpc       *process.Process
	Proxy      *process.Process

	group      *process.Group
	name       string
	starts     *atomic.Int32 // of processes
	supervised *process.Supervised
}

// New prepares an agent: its files, ports and environment. It reaches the API server by the kubeconfig.
func New(group *process.Group, cp *controlplane.ControlPlane, id, token, kubeconfig string) (*Agent, error) {
	name := id
	for n := 2; ; n++ { // replicas have directories and logs of their own
		if _, err := os.Stat(filepath.Join(group.Dir(), "agent-"+name)); errors.Is(err, os.ErrNotExist) {
			break
		}
		name = fmt.Sprintf("%s-%d", id, n)
	}
	dir, err := group.Mkdir("agent-" + name)
	if err != nil {
		return nil, err
	}
	var ports [3]int
	for i := range ports {
		if ports[i], err = process.FreePort(); err != nil {
			return nil, err
		}
	}
	listen, metrics := loopback(ports[0]), loopback(ports[1])
	return &Agent{
		group: group, name: name, RunDir: dir, starts: &atomic.Int32{},
		Tunnel: "https://" + listen, Operations: "http://" + metrics,
		Env: []string{
			"PIPEOPS_AGENT_ID=" + id, "PIPEOPS_AGENT_TOKEN=" + token,
			"PIPEOPS_API_URL=" + cp.APIURL, "PIPEOPS_API_CA_FILE=" + cp.CAFile, "PIPEOPS_FRP_TLS_CA_FILE=" + cp.CAFile,
			"PIPEOPS_FRP_SERVER_ADDR=127.0.0.1", // a lease may name a loopback address only if it is set here
			"PIPEOPS_FRP_ADMIN_PORT=" + strconv.Itoa(ports[2]),
			"PIPEOPS_LISTEN_ADDR=" + listen, "PIPEOPS_METRICS_ADDR=" + metrics,
			"PIPEOPS_RUN_DIR=" + dir, "KUBECONFIG=" + kubeconfig,
		},
	}, nil
}

// Start starts bootstrap, waits until it is ready, and starts frpc and the proxy.
func (a *Agent) Start() error {
	if err := a.StartBootstrap(); err != nil {
		return err
	}
	if err := a.StartFrpc(); err != nil {
		return err
	}
	return a.StartProxy()
}

// StartBootstrap starts bootstrap and waits until its files exist, as the startup probe does.
func (a *Agent) StartBootstrap() (err error) {
	if a.Bootstrap, err = a.start("bootstrap", a.Env); err != nil {
		return err
	}
	err = process.Poll(context.Background(), 30*time.Second, a.Bootstrap.Done(), func() error {
		probe, err := a.Command("ready")
		if err == nil && probe.ExitCode() != 0 {
			err = errors.New(probe.Log())
		}
		return err
	})
	select {
	case <-a.Bootstrap.Done():
		return a.Bootstrap.Failed()
	default:
		return err
	}
}

// Once starts bootstrap --once with further arguments.
func (a *Agent) Once(args ...string) (*process.Process, error) {
	return a.Command(append([]string{"--once"}, args...)...)
}

// Command starts bootstrap with the given arguments.
func (a *Agent) Command(args ...string) (*process.Process, error) {
	return a.start("bootstrap", a.Env, args...)
}

// FrpcProbe returns frpc's liveness probe in the manifests.
func (a *Agent) FrpcProbe() process.Probe {
	return process.Probe{
		Delay: 20 * time.Second, Period: 5 * time.Second, Threshold: 3,
		Alive: func() bool { _, err := os.Stat(filepath.Join(a.RunDir, frpc.StuckFile)); return err != nil },
	}
}

// RestartFrpc does the kubelet's work for frpc until ctx ends.
func (a *Agent) RestartFrpc(ctx context.Context) {
	a.supervised = a.Frpc.Supervised(a.FrpcProbe())
	go a.supervised.Run(ctx, process.Here)
}

// FrpcPid returns the id of the process that RestartFrpc restarts.
func (a *Agent) FrpcPid() int { return a.supervised.Pid() }

// FrpcRestarts returns how often RestartFrpc has restarted frpc.
func (a *Agent) FrpcRestarts() int { return a.supervised.Restarts() }

// StartFrpc starts the stock frpc, with the environment that the manifests set.
func (a *Agent) StartFrpc() (err error) {
	a.Frpc, err = a.start("frpc", []string{"GOMEMLIMIT=409MiB"}, "-c", filepath.Join(a.RunDir, frpc.ConfigFile))
	return err
}

// StartProxy starts the proxy.
func (a *Agent) StartProxy() (err error) {
	a.Proxy, err = a.start("proxy", a.Env)
	return err
}

func (a *Agent) start(name string, env []string, args ...string) (*process.Process, error) {
	binary, err := process.Binary(name)
	if err != nil {
		return nil, err
	}
	run := a.starts.Add(1) // each process has a log of its own
	command := slices.Concat(a.Enter[name], []string{binary}, args)
	return a.group.Start(fmt.Sprintf("%s-%s-%d", name, a.name, run), env, command[0], command[1:]...)
}

// Readiness is the answer of GET /ready.
type Readiness struct {
	Status string `json:"status"`
	Checks map[string]struct {
		OK     bool   `json:"ok"`
		Detail string `json:"detail"`
	} `json:"checks"`
}

// Ready calls GET /ready on the operations listener.
func (a *Agent) Ready(ctx context.Context) (int, Readiness, error) {
	var answer Readiness
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, a.Operations+"/ready", nil)
	if err != nil {
		return 0, answer, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, answer, err
	}
	defer func() { _ = resp.Body.Close() }()
	data, err := io.ReadAll(resp.Body)
	if err == nil {
		err = json.Unmarshal(data, &answer)
	}
	return resp.StatusCode, answer, err
}

// WaitReady waits until /ready answers 200. It gives up when frpc or the proxy ends.
func (a *Agent) WaitReady(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ended := make(chan struct{})
	proxy, frpc := a.Proxy, a.Frpc // the fields may change before the goroutine has ended
	go func() {
		defer close(ended)
		select {
		case <-proxy.Done():
		case <-frpc.Done():
		case <-ctx.Done():
		}
	}()
	err := process.Poll(ctx, 30*time.Second, ended, func() error {
		code, answer, err := a.Ready(ctx)
		if err == nil && code != http.StatusOK {
			err = errors.New("the agent is not ready")
			for name, check := range answer.Checks {
				if !check.OK {
					err = fmt.Errorf("%w; %s: %s", err, name, check.Detail)
				}
			}
		}
		return err
	})
	select {
	case <-a.Proxy.Done():
		return a.Proxy.Failed()
	case <-a.Frpc.Done():
		return a.Frpc.Failed()
	default:
		return err
	}
}

// Caller returns a client configuration that reaches the agent's Kubernetes API through the control plane's gateway.
func Caller(cp *controlplane.ControlPlane, id, token string) *rest.Config {
	return &rest.Config{
		Host: cp.GatewayURL + "/agents/" + id + "/api/k8s", BearerToken: token,
		TLSClientConfig: rest.TLSClientConfig{CAData: cp.CA},
	}
}

// Observe calls observe for every answer, or error, that a client of config gets, including those that client-go
// retries and does not report.
func Observe(config *rest.Config, observe func(*http.Request, *http.Response, error)) {
	config.Wrap(func(next http.RoundTripper) http.RoundTripper {
		return roundTripper(func(r *http.Request) (*http.Response, error) {
			resp, err := next.RoundTrip(r)
			observe(r, resp, err)
			return resp, err
		})
	})
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// WriteCaller writes the configuration of Caller as a kubeconfig, as `bootstrap kubeconfig` does.
func WriteCaller(path string, cp *controlplane.ControlPlane, id, token string) error {
	access := kubeconfig.Access{ID: id, Server: cp.GatewayURL + "/agents/" + id + "/api/k8s", CA: cp.CA,
		Who: "For this control plane's callers.", User: map[string]string{"token": token}}
	return os.WriteFile(path, access.YAML(), 0o600)
}

func loopback(port int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) }
