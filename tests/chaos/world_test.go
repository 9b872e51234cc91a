package chaos

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/rest"

	"github.com/pipeops/vm-agent/tests/harness"
	"github.com/pipeops/vm-agent/tests/harness/agent"
	"github.com/pipeops/vm-agent/tests/harness/cluster"
	"github.com/pipeops/vm-agent/tests/harness/controlplane"
	"github.com/pipeops/vm-agent/tests/harness/kubelet"
	"github.com/pipeops/vm-agent/tests/harness/link"
	"github.com/pipeops/vm-agent/tests/harness/process"
	"github.com/pipeops/vm-agent/tests/harness/relay"
)

// replicas is the number of the agent's replicas. Faults of its containers hit all of them at once: a fault of one
// alone costs callers less (see TestHighAvailabilityLosesNoCall).
const replicas = 2

// leaseLife is so short that every long fault meets a renewal.
const leaseLife = 2 * time.Minute

// tokenOverlap is how long the proxy accepts the agent's previous token. A request with it may be frozen on the way.
const tokenOverlap = 3 * time.Minute

// controlPlaneName is the name by which the agent finds control plane and frps.
const controlPlaneName = "controlplane.test"

// namespace holds what the callers write, and the pod.
const namespace = "chaos"

// world is the whole path. The agent's replicas are in a network namespace of their own, from which one way leads to
// the control plane and frps, and another to the API server.
type world struct {
	t       *testing.T
	group   *process.Group
	cluster *cluster.Cluster
	cp      *controlplane.ControlPlane
	tunnel  *link.Link   // between frpc and frps
	api     *relay.Relay // between the agent and the API server
	agents  []*agent.Agent
	memory  map[*process.Cgroup]int // limits, by container

	accountToken sync.Mutex             // held while its file is replaced
	agentToken   atomic.Pointer[string] // that callers show

	bootstrap, frpc, proxy, etcd, apiServer []*process.Supervised
}

// newWorld starts the whole path, and waits until a caller has an answer. All of it ends with the test.
func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, group: harness.NewGroup(t), memory: map[*process.Cgroup]int{}}
	if err := w.start(t.Context()); err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *world) start(ctx context.Context) (err error) {
	if w.cluster, err = cluster.Start(ctx, w.group); err != nil {
		return err
	}
	config, err := w.cluster.WriteAgentKubeconfig(ctx, filepath.Join(w.group.Dir(), "direct.kubeconfig"))
	if err != nil {
		return err
	}
	if w.tunnel, err = link.Here(link.Options{}); err != nil {
		return err
	}
	w.t.Cleanup(w.tunnel.Close)
	const lanAgent, lanServer = "198.19.0.1", "198.19.0.2"
	if err := w.tunnel.A.Do(func() error {
		return sh(`ip link add lan type veth peer name lan netns "$1"; ip address add "$2/30" dev lan; ip link set lan up`,
			strconv.Itoa(os.Getpid()), lanAgent)
	}); err != nil {
		return err
	}
	// Its namespace may live for minutes: the kernel keeps connections whose peers are silent.
	w.t.Cleanup(func() { _ = sh("ip link delete lan") })
	if err := sh(`ip address add "$1/30" dev lan; ip link set lan up`, lanServer); err != nil {
		return err
	}
	server, err := url.Parse(config.Host)
	if err != nil {
		return err
	}
	if w.api, err = relay.Start(ctx, lanServer, server.Host, 0); err != nil {
		return err
	}
	w.t.Cleanup(w.api.Close)
	w.api.Silent.Store(false)
	config.Host, config.ServerName = "https://"+w.api.Addr, server.Hostname()
	config.BearerToken, config.BearerTokenFile = "", w.accountTokenFile()
	if err := w.writeAccountToken(ctx, false); err != nil {
		return err
	}
	kubeconfig := filepath.Join(w.group.Dir(), "agent.kubeconfig")
	if err := cluster.WriteKubeconfig(kubeconfig, config); err != nil {
		return err
	}
	log, err := os.Create(filepath.Join(w.group.Dir(), "controlplane.log"))
	if err != nil {
		return err
	}
	w.t.Cleanup(func() { _ = log.Close() })
	if w.cp, err = controlplane.Start(ctx, controlplane.Options{
		Group: w.group, IP: w.tunnel.B.IP, Host: controlPlaneName,
		Agents: map[string]string{harness.AgentID: harness.AgentToken},
		Log:    slog.New(slog.NewTextHandler(log, nil)),
	}); err != nil {
		return err
	}
	w.t.Cleanup(w.cp.Close)
	w.cp.SetTerms(controlplane.Terms{Life: leaseLife})
	if err := w.setAgentToken(ctx, harness.AgentToken); err != nil {
		return err
	}
	hosts := filepath.Join(w.group.Dir(), "hosts")
	if err := os.WriteFile(hosts, nil, 0o644); err != nil {
		return err
	}
	if err := unix.Mount(hosts, hostsFile, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("replace %s: %w", hostsFile, err)
	}
	w.t.Cleanup(func() { _ = unix.Unmount(hostsFile, unix.MNT_DETACH) })
	if err := w.writeHosts(); err != nil {
		return err
	}
	running, stop := context.WithCancel(ctx)
	var supervisors sync.WaitGroup
	w.t.Cleanup(func() { stop(); supervisors.Wait() })
	supervisors.Go(func() { w.rotateAccountToken(running) })
	add := func(to *[]*process.Supervised, p *process.Process, where func(func() error) error,
		probe process.Probe) {
		c := p.Supervised(probe)
		*to = append(*to, c)
		supervisors.Go(func() { c.Run(running, where) })
	}
	for i := range replicas {
		a, err := w.startAgent(i, kubeconfig)
		if err != nil {
			return err
		}
		add(&w.bootstrap, a.Bootstrap, w.tunnel.A.Do, process.Probe{})
		add(&w.frpc, a.Frpc, w.tunnel.A.Do, a.FrpcProbe())
		probes := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
			DialContext: w.inside}}
		add(&w.proxy, a.Proxy, w.tunnel.A.Do, process.Probe{Period: 10 * time.Second, Threshold: 3, Alive: func() bool {
			resp, err := probes.Get(a.Operations + "/health")
			if err == nil {
				_ = resp.Body.Close()
			}
			return err == nil && resp.StatusCode == http.StatusOK
		}})
	}
	add(&w.etcd, w.cluster.Etcd, process.Here, process.Probe{})
	add(&w.apiServer, w.cluster.APIServer, process.Here, process.Probe{})
	_, err = w.cluster.Client.CoreV1().Namespaces().Create(ctx,
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}, metav1.CreateOptions{})
	if err != nil {
		return err
	}
	stopPod, err := (&kubelet.Kubelet{Follow: count}).RunPod(ctx, w.cluster.Client, namespace)
	if err == nil {
		w.t.Cleanup(stopPod)
	}
	return err
}

// tokenLife is the life of the agent's token for the API server: the shortest that there is.
const tokenLife = 10 * time.Minute

func (w *world) accountTokenFile() string { return filepath.Join(w.group.Dir(), "account-token") }

// writeAccountToken writes a new token of the agent's ServiceAccount to its file, and revokes all previous ones if
// revoke is true. Each is bound to a Secret.
func (w *world) writeAccountToken(ctx context.Context, revoke bool) error {
	w.accountToken.Lock()
	defer w.accountToken.Unlock()
	secrets := w.cluster.Client.CoreV1().Secrets(cluster.AgentNamespace)
	secret, err := secrets.Create(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{GenerateName: "token-"}},
		metav1.CreateOptions{})
	if err != nil {
		return err
	}
	token, err := w.cluster.Token(ctx, cluster.AgentNamespace, cluster.AgentAccount, tokenLife,
		&authenticationv1.BoundObjectReference{Kind: "Secret", APIVersion: "v1", Name: secret.Name})
	if err == nil {
		err = process.ReplaceFile(w.accountTokenFile(), token)
	}
	if err == nil && revoke {
		err = secrets.DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{
			FieldSelector: fields.OneTermNotEqualSelector("metadata.name", secret.Name).String()})
	}
	return err
}

// rotateAccountToken does the kubelet's work of replacing the agent's token in time, until ctx ends.
func (w *world) rotateAccountToken(ctx context.Context) {
	for wait := tokenLife / 2; ; {
		pause(ctx, wait)
		if ctx.Err() != nil {
			return
		}
		if wait = tokenLife / 2; w.writeAccountToken(ctx, false) != nil {
			wait = 10 * time.Second // the API server is away
		}
	}
}

func (w *world) agentTokenFile() string { return filepath.Join(w.group.Dir(), "agent-token") }

// setAgentToken replaces the agent's token: at the control plane, then in the agent's file, and at the callers as soon
// as all replicas accept it.
func (w *world) setAgentToken(ctx context.Context, token string) error {
	w.cp.SetAgent(harness.AgentID, token)
	if err := process.ReplaceFile(w.agentTokenFile(), token); err != nil {
		return err
	}
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: w.inside, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	for _, a := range w.agents {
		if err := process.Poll(ctx, recovery, nil, func() error {
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, a.Tunnel+"/metrics", nil)
			if err != nil {
				return err
			}
			req.Header.Set("Authorization", "Bearer "+token)
			resp, err := client.Do(req)
			if err == nil && resp.StatusCode != http.StatusOK {
				err = errors.New(resp.Status)
			}
			if resp != nil {
				_ = resp.Body.Close()
			}
			return err
		}); err != nil {
			return err
		}
	}
	w.agentToken.Store(&token)
	return nil
}

// hostsFile is what resolves names: there is no DNS.
const hostsFile = "/etc/hosts"

func (w *world) writeHosts() error {
	names := fmt.Appendf(nil, "127.0.0.1 localhost\n%s %s\n", w.tunnel.B.IP, controlPlaneName)
	return os.WriteFile(hostsFile, names, 0o644)
}

// startAgent starts a replica. Its run directory is a small file system of its own, which a fault can fill.
func (w *world) startAgent(i int, kubeconfig string) (*agent.Agent, error) {
	a, err := agent.New(w.group, w.cp, harness.AgentID, harness.AgentToken, kubeconfig)
	if err != nil {
		return nil, err
	}
	if err := unix.Mount("tmpfs", a.RunDir, "tmpfs", 0, "size=256k,mode=0700"); err != nil {
		return nil, fmt.Errorf("mount a file system on the run directory: %w", err)
	}
	w.t.Cleanup(func() { _ = unix.Unmount(a.RunDir, unix.MNT_DETACH) })
	a.Env = append(a.Env, fmt.Sprintf("PIPEOPS_INSTANCE=replica-%d", i), "PIPEOPS_FRP_SERVER_ADDR="+controlPlaneName,
		"PIPEOPS_API_URL="+strings.Replace(w.cp.APIURL, w.tunnel.B.IP, controlPlaneName, 1),
		"PIPEOPS_AGENT_TOKEN=", "PIPEOPS_AGENT_TOKEN_FILE="+w.agentTokenFile(),
		fmt.Sprintf("PIPEOPS_AGENT_TOKEN_OVERLAP=%s", tokenOverlap))
	a.Enter = map[string][]string{}
	for name, mib := range map[string]int{"bootstrap": 64, "frpc": 512, "proxy": 256} { // as in the manifests
		c, err := w.group.Cgroup(fmt.Sprintf("%s-%d", name, i))
		if err == nil {
			err = c.Limit(mib << 20)
		}
		if err != nil {
			return nil, err
		}
		a.Enter[name], w.memory[c] = c.Enter(), mib<<20
	}
	w.agents = append(w.agents, a)
	return a, w.tunnel.A.Do(a.Start)
}

// caller returns the configuration of a caller through the gateway.
func (w *world) caller() *rest.Config {
	config := agent.Caller(w.cp, harness.AgentID, "")
	config.Wrap(func(next http.RoundTripper) http.RoundTripper { return authorized{next, &w.agentToken} })
	return config
}

// authorized sends each request with the current token.
type authorized struct {
	next  http.RoundTripper
	token *atomic.Pointer[string]
}

func (a authorized) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", "Bearer "+*a.token.Load())
	return a.next.RoundTrip(r)
}

// inside dials from the agent's network namespace.
func (w *world) inside(_ context.Context, network, address string) (conn net.Conn, err error) {
	err = w.tunnel.A.Do(func() error {
		conn, err = net.DialTimeout(network, address, 5*time.Second)
		return err
	})
	return conn, err
}

// count writes a numbered line every tenth of a second.
func count(ctx context.Context, w io.Writer) {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for i := 0; ; i++ {
		if _, err := fmt.Fprintf(w, "line %d\n", i); err != nil {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

func sh(script string, args ...string) error {
	out, err := exec.Command("sh", append([]string{"-ec", script, "sh"}, args...)...).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s: %w: %s", strings.TrimSpace(script), err, out)
	}
	return err
}
