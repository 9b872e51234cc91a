package e2e

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
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
	"github.com/pipeops/vm-agent/tests/harness/cluster"
	"github.com/pipeops/vm-agent/tests/harness/controlplane"
	"github.com/pipeops/vm-agent/tests/harness/process"
)

const agentID, agentToken = harness.AgentID, harness.AgentToken

// installed is an agent that was installed as the install page says, with the control plane that it dials out to.
type installed struct {
	t      *testing.T
	dir    string // a copy of the manifests, with the files that a user writes
	ns     string // the agent's namespace
	admin  string // kubeconfig that reaches the API server directly
	caller string // kubeconfig that goes through the tunnel
	cp     *controlplane.ControlPlane

	patches string // of the overlay, as YAML
}

// in returns the same installation for a subtest.
func (i *installed) in(t *testing.T) *installed {
	same := *i
	same.t = t
	return &same
}

// kubectl prepares the real kubectl, which finds the manifests in its working directory.
func (i *installed) kubectl(ctx context.Context, kubeconfig string, env []string, args ...string) *exec.Cmd {
	i.t.Helper()
	cmd := harness.Kubectl(ctx, i.t, filepath.Dir(i.dir), kubeconfig, env, args...)
	cmd.Dir = filepath.Dir(i.dir)
	return cmd
}

// run runs kubectl to its end and returns what it prints.
func (i *installed) run(kubeconfig, stdin string, env []string, args ...string) (string, error) {
	i.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute) // t.Context has ended when the cleanup runs
	defer cancel()
	result, err := harness.Run(i.kubectl(ctx, kubeconfig, env, args...), stdin)
	return result.Stdout, err
}

func (i *installed) mustKubectl(kubeconfig string, args ...string) string {
	i.t.Helper()
	out, err := i.run(kubeconfig, "", nil, args...)
	if err != nil {
		i.t.Fatal(err)
	}
	return out
}

// install applies an overlay with some components, and waits for the rollout.
func install(t *testing.T, components ...string) *installed {
	t.Helper()
	i := prepare(t)
	i.components(components...)
	i.apply()
	return i
}

// prepare imports the images into the node, starts a control plane for the test, and writes the files that belong
// beside an overlay. When the test ends, it deletes what was installed.
func prepare(t *testing.T, options ...func(*controlplane.Options)) *installed {
	t.Helper()
	return prepareIn(t, home, options...)
}

// prepareBeside does the same for an agent that may run beside others, in a parallel test: in a namespace of the test,
// and without any cluster-scoped object, such as its rights.
func prepareBeside(t *testing.T, options ...func(*controlplane.Options)) *installed {
	t.Helper()
	return prepareIn(t, namespace(t), options...)
}

func prepareIn(t *testing.T, ns string, options ...func(*controlplane.Options)) *installed {
	t.Helper()
	group := harness.NewGroup(t)
	root := harness.Root(t)
	importImages(t, node.Machine)
	i := &installed{t: t, dir: filepath.Join(group.Dir(), "manifests"), ns: ns, admin: node.Kubeconfig,
		caller: filepath.Join(group.Dir(), "caller.kubeconfig")}
	o := controlplane.Options{
		Group: group, Agents: map[string]string{agentID: agentToken}, Log: slog.New(slog.DiscardHandler), IP: node.HostIP,
	}
	for _, option := range options {
		option(&o)
	}
	var err error
	if i.cp, err = controlplane.Start(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(i.cp.Close)
	if err := agent.WriteCaller(i.caller, i.cp, agentID, agentToken); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(i.dir, os.DirFS(filepath.Join(root, "manifests"))); err != nil {
		t.Fatal(err)
	}
	unpin(t, filepath.Join(i.dir, "base", "kustomization.yaml"))
	i.write("overlays/test/agent.env", "PIPEOPS_AGENT_ID="+agentID+"\nPIPEOPS_API_URL="+i.cp.APIURL+
		"\nPIPEOPS_API_CA_FILE=/etc/pipeops/tls/ca.crt\nPIPEOPS_FRP_TLS_CA_FILE=/etc/pipeops/tls/ca.crt\n")
	i.write("overlays/test/agent-token", agentToken+"\n")
	i.write("overlays/test/ca.crt", string(i.cp.CA))
	t.Cleanup(func() {
		if t.Failed() {
			report(context.Background(), t, ns)
			for _, container := range []string{"bootstrap", "frpc", "proxy"} {
				out, err := i.run(i.admin, "", nil, "-n", ns, "logs", "deployment/pipeops-agent", "-c", container,
					"--tail", "20")
				t.Logf("log of %s: %v\n%s", container, err, out)
			}
		}
		if ns != home { // namespace deletes it
			return
		}
		if _, err := i.run(i.admin, "", nil, "delete", clusterKinds(), "-l", "app.kubernetes.io/name=pipeops-agent",
			"--ignore-not-found"); err != nil {
			t.Error(err)
		}
	})
	return i
}

// clusterKinds are the cluster-scoped kinds that the components have, as far as the node supports them.
func clusterKinds() string {
	kinds := "namespaces,clusterroles,clusterrolebindings,priorityclasses"
	if node.Supports("guard") {
		kinds += ",validatingadmissionpolicies,validatingadmissionpolicybindings"
	}
	return kinds
}

// unpin removes the digest of Docker Hub's frpc image, because the tests build their own image.
func unpin(t *testing.T, path string) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err == nil {
		err = os.WriteFile(path, regexp.MustCompile(`@sha256:[0-9a-f]+|\n +digest: .*`).ReplaceAll(data, nil), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// imported holds the machines that have the agent's images.
var imported = struct {
	sync.Mutex
	by map[*cluster.Machine]bool
}{by: map[*cluster.Machine]bool{}}

// importImages imports the agent's images into a node, once.
func importImages(t *testing.T, m *cluster.Machine) {
	t.Helper()
	imported.Lock()
	defer imported.Unlock()
	if imported.by[m] {
		return
	}
	for _, archive := range archives(t) {
		if err := m.ImportImage(t.Context(), archive); err != nil {
			t.Fatalf("%v: make test-images builds them", err)
		}
	}
	imported.by[m] = true
}

// startWorker starts a second node with the agent's images, which is stopped when the test ends.
func startWorker(t *testing.T) *cluster.Machine {
	t.Helper()
	worker, err := node.StartWorker(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := node.StopWorker(context.Background()); err != nil {
			t.Error(err)
		}
	})
	importImages(t, worker)
	return worker
}

// archives returns the paths of the images of the agent and of frpc.
func archives(t *testing.T) []string {
	t.Helper()
	dir := filepath.Join(harness.Root(t), ".build", "images")
	return []string{filepath.Join(dir, "vm-agent-"+runtime.GOARCH+".tar"), filepath.Join(dir, "frpc.tar")}
}

// components writes the overlay with the given components.
func (i *installed) components(names ...string) {
	i.t.Helper()
	paths := []string{"../../components/" + map[bool]string{true: "namespace", false: "namespaced"}[i.ns == home]}
	for _, name := range names {
		if node.Supports(name) {
			paths = append(paths, "../../components/"+name)
		}
	}
	i.write("overlays/test/kustomization.yaml", `
namespace: `+i.ns+`
resources: [../../base]
components: [`+strings.Join(paths, ", ")+`]
configMapGenerator: [{name: pipeops-agent, behavior: merge, envs: [agent.env]}]
secretGenerator:
  - name: pipeops-agent
    files: [token=agent-token]
    options: {disableNameSuffixHash: true, labels: {app.kubernetes.io/part-of: pipeops}}
  - {name: pipeops-agent-tls, files: [ca.crt]}
patches: [`+i.patches+`]
`)
}

func (i *installed) apply() {
	i.t.Helper()
	i.mustKubectl(i.admin, "apply", "-k", "manifests/overlays/test")
	i.rollout()
}

// rollout waits until the rollout is complete.
func (i *installed) rollout() {
	i.t.Helper()
	i.mustKubectl(i.admin, "-n", i.ns, "rollout", "status", "deployment/pipeops-agent", "--timeout", "2m")
}

func (i *installed) write(name, content string) {
	i.t.Helper()
	path := filepath.Join(i.dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		i.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		i.t.Fatal(err)
	}
}

// TestAgentWorksOnARealNode uses the node through the tunnel: with the rights of each component, and while the
// agent's containers are killed.
func TestAgentWorksOnARealNode(t *testing.T) {
	i := prepare(t)
	i.rights()
	t.Run("kubectl", i.useKubectl)
	t.Run("restarts", i.restarts)
}

// rights checks through the tunnel what the base and each component grant.
func (i *installed) rights() {
	i.t.Helper()
	// Each line is a resource, or none for URLs; URLs; names; verbs.
	row := regexp.MustCompile(`(?m)^(\S+)\s+\[\S*\]\s+\[(\S*)\]\s+\[(.*)\]$`)
	list := func() map[string][]string {
		i.t.Helper()
		verbs := map[string][]string{}
		for _, match := range row.FindAllStringSubmatch(i.mustKubectl(i.caller, "auth", "can-i", "--list", "-n",
			"pipeops-system"), -1) {
			resource, name := match[1], match[2]
			if name != "" {
				resource += ":" + name
			}
			verbs[resource] = append(verbs[resource], strings.Fields(match[3])...)
		}
		return verbs
	}
	for _, step := range []struct {
		components []string
		may, not   string // verb and resource, and so on
	}{
		{nil, "list pods list nodes watch namespaces get pods/log list deployments.apps",
			"get secrets create pods create pods/exec delete nodes create clusterroles.rbac.authorization.k8s.io * *.* " +
				"get secrets:pipeops-agent-runners"},
		{[]string{"runners"}, "list pods get secrets:pipeops-agent-runners update secrets:pipeops-agent-runners",
			"get secrets create secrets list secrets:pipeops-agent-runners get secrets:pipeops-agent * *.*"},
		{[]string{"manage-all-namespaces"}, "get secrets create pods create pods/exec delete deployments.apps",
			"delete nodes create clusterroles.rbac.authorization.k8s.io * *.*"},
		{[]string{"cluster-admin"}, "* *.*", ""},
	} {
		i.components(step.components...)
		i.apply()
		granted := list()
		for want, list := range map[bool][]string{true: strings.Fields(step.may), false: strings.Fields(step.not)} {
			for n := 0; n < len(list); n += 2 {
				if slices.Contains(granted[list[n+1]], list[n]) != want {
					i.t.Errorf("with %v, %s %s: %v", step.components, list[n], list[n+1], !want)
				}
			}
		}
		for _, never := range []string{"nodes/proxy", "users", "groups", "nodes/*", "*"} {
			if granted[never] != nil {
				i.t.Errorf("with %v, %v %s", step.components, granted[never], never)
			}
		}
		// The agent refuses nodes/proxy whatever RBAC says.
		if out, err := i.run(i.caller, "", nil, "get", "--raw",
			"/api/v1/nodes/"+cluster.NodeName+"/proxy/pods"); err == nil ||
			!strings.Contains(err.Error(), "nodes/proxy reaches every pod") {
			i.t.Errorf("with %v, nodes/proxy answers %q, %v", step.components, out, err)
		}
	}
	i.mustKubectl(i.admin, "delete", "clusterrolebinding", "pipeops-agent-cluster-admin",
		"pipeops-agent-manage-all-namespaces")
	i.components("manage-all-namespaces", "runners")
	i.apply()
}

// useKubectl runs the usual kubectl commands through the tunnel, with real pods and both streaming protocols.
func (i *installed) useKubectl(t *testing.T) {
	i = i.in(t)
	ns := namespace(t)
	i.mustKubectl(i.caller, "get", "nodes,namespaces")
	i.write("web.yaml", `{"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"}, "spec": {
		"selector": {"matchLabels": {"app": "web"}}, "template": {"metadata": {"labels": {"app": "web"}}, "spec": {
			"terminationGracePeriodSeconds": 1, "containers": [{
				"name": "web", "image": "`+cluster.Busybox+`", "command": ["/bin/busybox", "sh", "-c", "`+
		`echo hello; ln -s busybox /bin/tar; mkdir -p /www; echo page >/www/index.html; exec httpd -f -p 8080 -h /www`+
		`"]}]}}}}`)
	i.mustKubectl(i.caller, "-n", ns, "apply", "-f", filepath.Join(i.dir, "web.yaml"))
	i.mustKubectl(i.caller, "-n", ns, "rollout", "status", "deployment/web", "--timeout", "1m")
	for _, name := range []string{"websocket", "spdy"} { // each pod ends with the command attached to it
		i.mustKubectl(i.caller, "-n", ns, "run", "cat-"+name, "--stdin", "--attach=false", "--restart", "Never",
			"--image", cluster.Busybox, "--image-pull-policy", "Never", "--command", "--",
			"/bin/busybox", "sh", "-c", "echo hello; exec cat")
		i.mustKubectl(i.caller, "-n", ns, "wait", "--for", "condition=Ready", "pod/cat-"+name, "--timeout", "1m")
	}
	for name, env := range map[string][]string{"WebSocket": nil, "SPDY": {"KUBECTL_REMOTE_COMMAND_WEBSOCKETS=false",
		"KUBECTL_PORT_FORWARD_WEBSOCKETS=false"}} {
		t.Run(name, func(t *testing.T) {
			i := i.in(t)
			for _, test := range []struct {
				stdin, want string
				args        []string
			}{
				{"", "hello\n", []string{"logs", "deployment/web"}},
				{"there and back", "there and back", []string{"exec", "-i", "deployment/web", "--", "/bin/busybox", "cat"}},
				{"typed\n", "typed\n", []string{"run", strings.ToLower(name), "-i", "--rm", "--quiet", "--restart", "Never",
					"--image", cluster.Busybox, "--image-pull-policy", "Never", "--command", "--",
					"/bin/busybox", "sh", "-c", "read line; echo $line"}},
			} {
				out, err := i.run(i.caller, test.stdin, env, append([]string{"-n", ns}, test.args...)...)
				if err != nil || !strings.Contains(out, test.want) {
					t.Errorf("kubectl %s: %q, want %q (%v)", strings.Join(test.args, " "), out, test.want, err)
				}
			}
			i.attach(ns, "cat-"+strings.ToLower(name), env)
			pod := strings.TrimPrefix(strings.TrimSpace(i.mustKubectl(i.caller, "-n", ns, "get", "pods", "-l", "app=web", "-o",
				"name")), "pod/")
			there, back := filepath.Join(filepath.Dir(i.dir), "there"), filepath.Join(filepath.Dir(i.dir), "back-"+name)
			content := strings.Repeat("0123456789abcdef", 1<<16)
			if err := os.WriteFile(there, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
			for _, args := range [][]string{{there, pod + ":/tmp-" + name}, {pod + ":/tmp-" + name, back}} {
				if out, err := i.run(i.caller, "", env, append([]string{"-n", ns, "cp"}, args...)...); err != nil {
					t.Fatalf("%v: %s", err, out)
				}
			}
			if got, err := os.ReadFile(back); err != nil || string(got) != content {
				t.Errorf("cp: %d bytes came back, %v", len(got), err)
			}
			i.portForward(ns, "deployment/web", env)
		})
	}
}

// attach attaches to a pod that has printed hello, sends it a line and expects it back, while `logs -f` follows all
// of it.
func (i *installed) attach(ns, pod string, env []string) {
	t := i.t
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	follow := i.kubectl(ctx, i.caller, env, "-n", ns, "logs", "-f", pod)
	stdout, err := follow.StdoutPipe()
	if err == nil {
		err = follow.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	log := bufio.NewReader(stdout)
	if line, err := log.ReadString('\n'); err != nil || line != "hello\n" {
		t.Errorf("logs -f: %q, %v", line, err)
	}
	if out, err := i.run(i.caller, "attached\n", env, "-n", ns, "attach", "-i", "--quiet", pod); err != nil ||
		!strings.Contains(out, "attached\n") {
		t.Errorf("attach: %q, %v", out, err)
	}
	rest, err := io.ReadAll(log)
	if err == nil {
		err = follow.Wait()
	}
	if err != nil || string(rest) != "attached\n" {
		t.Errorf("logs -f: %q, %v", rest, err)
	}
}

// portForward reads a page of a pod by a forwarded port.
func (i *installed) portForward(ns, target string, env []string) {
	t := i.t
	t.Helper()
	port, err := process.FreePort()
	if err != nil {
		t.Fatal(err)
	}
	cmd := i.kubectl(t.Context(), i.caller, env, "-n", ns, "port-forward", target, fmt.Sprintf("%d:8080", port))
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	eventually(t, func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		out, err := exec.CommandContext(ctx, "busybox", "wget", "-q", "-O", "-",
			fmt.Sprintf("http://127.0.0.1:%d/", port)).CombinedOutput()
		if err == nil && string(out) != "page\n" {
			err = fmt.Errorf("got %q", out)
		}
		return err
	})
}

// restarts kills each container of the agent in turn. An informer that watches through the tunnel misses no event.
func (i *installed) restarts(t *testing.T) {
	i = i.in(t)
	ns := namespace(t)
	client, err := kubernetes.NewForConfig(agent.Caller(i.cp, agentID, agentToken))
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	seen := map[string]bool{}
	factory := informers.NewSharedInformerFactoryWithOptions(client, 0, informers.WithNamespace(ns))
	handler := cache.ResourceEventHandlerFuncs{AddFunc: func(object any) {
		mu.Lock()
		defer mu.Unlock()
		seen[object.(*corev1.ConfigMap).Name] = true
	}}
	if _, err := factory.Core().V1().ConfigMaps().Informer().AddEventHandler(handler); err != nil {
		t.Fatal(err)
	}
	factory.Start(t.Context().Done())
	t.Cleanup(factory.Shutdown)
	factory.WaitForCacheSync(t.Context().Done())
	for _, name := range []string{"bootstrap", "frpc", "proxy"} {
		if out, err := node.Command(t.Context(), "pkill", "-KILL", "-x", name).CombinedOutput(); err != nil {
			t.Fatalf("kill %s: %v: %s", name, err, out)
		}
		if _, err := node.Client.CoreV1().ConfigMaps(ns).Create(t.Context(),
			&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		eventually(t, func() error {
			mu.Lock()
			defer mu.Unlock()
			if !seen[name] {
				return errors.New("the informer has not seen what was made after " + name + " was killed")
			}
			return nil
		})
		i.rollout()
	}
}

// TestFrpsOutageRestartsNoContainer checks that the pod is not ready while frps is stopped or frozen, that no container
// restarts because of it, least of all frpc, and that the tunnel recovers by itself.
func TestFrpsOutageRestartsNoContainer(t *testing.T) {
	t.Parallel() // it waits most of the time
	i := prepareBeside(t)
	i.components()
	i.apply()
	state := func(ready bool) (restarts string) {
		t.Helper()
		eventually(t, func() error {
			out := i.mustKubectl(i.admin, "-n", i.ns, "get", "pods", "-o", "jsonpath={range .items[*]}"+
				`{.status.conditions[?(@.type=="Ready")].status} bootstrap: {.status.initContainerStatuses[0].restartCount}, `+
				"frpc: {.status.initContainerStatuses[1].restartCount}, proxy: {.status.containerStatuses[0].restartCount}{end}")
			var found bool
			if restarts, found = strings.CutPrefix(out, map[bool]string{true: "True ", false: "False "}[ready]); !found {
				return fmt.Errorf("the pod is %s", out)
			}
			return nil
		})
		return restarts
	}
	before := state(true)
	i.cp.StopFrps()
	state(false)
	if _, err := i.run(i.caller, "", nil, "get", "--raw", "/version"); err == nil {
		t.Error("a request succeeds without frps")
	}
	if err := i.cp.StartFrps(t.Context()); err != nil {
		t.Fatal(err)
	}
	state(true)
	pid := i.cp.FrpsPid()
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Kill(pid, syscall.SIGCONT) })
	state(false)
	time.Sleep(45 * time.Second) // longer than bootstrap waits before it checks the login and requests a lease
	if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if after := state(true); after != before {
		t.Errorf("restarts: %s, before %s", after, before)
	}
	eventually(t, func() error {
		_, err := i.run(i.caller, "", nil, "get", "--raw", "/version")
		return err
	})
}
