package integration

import (
	"errors"
	"flag"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/rest"

	"github.com/pipeops/vm-agent/tests/harness"
	"github.com/pipeops/vm-agent/tests/harness/agent"
	"github.com/pipeops/vm-agent/tests/harness/cluster"
)

var update = flag.Bool("update", false, "rewrite testdata/errors.txt, to be reviewed")

// TestKubectlShowsWhatWentWrong records kubectl's output for each kind of error in testdata/errors.txt, for review.
func TestKubectlShowsWhatWentWrong(t *testing.T) {
	t.Parallel()
	w := connected(t)
	ns := w.namespace()
	view := viewer(t)
	wrongToken, noPrefix := filepath.Join(w.group.Dir(), "wrong-token"), filepath.Join(w.group.Dir(), "no-prefix")
	if err := agent.WriteCaller(wrongToken, w.cp, agentID, "wrong"); err != nil {
		t.Fatal(err)
	}
	caller := agent.Caller(w.cp, agentID, agentToken)
	caller.Host = strings.TrimSuffix(caller.Host, "/api/k8s")
	if err := cluster.WriteKubeconfig(noPrefix, caller); err != nil {
		t.Fatal(err)
	}
	caller.Host += "/api/k8"
	wrongPath := filepath.Join(w.group.Dir(), "wrong-path")
	if err := cluster.WriteKubeconfig(wrongPath, caller); err != nil {
		t.Fatal(err)
	}
	protectedPod(t, w, ns)
	away := newWorld(t) // its agent has never started
	refused := startedWithAPIServer(t, func(config *rest.Config) { config.BearerToken = "not-a-token" })
	unreachable := startedWithAPIServer(t, func(config *rest.Config) { config.Host = "https://" + harness.FreeAddr(t) })
	silent := startedWithAPIServer(t, func(config *rest.Config) { config.Host = "https://" + harness.SilentAddr(t) })
	for _, other := range []*world{refused, unreachable, silent} {
		wantTunnel(t, other)
	}
	leaving := newWorld(t)
	leaving.agent.Env = append(leaving.agent.Env, "PIPEOPS_DRAIN_TIMEOUT=10m")
	if err := leaving.agent.Start(); err != nil {
		t.Fatal(err)
	}
	wantTunnel(t, leaving)
	startSession(t, leaving, ns)
	startDraining(t, leaving)
	eventually(t, func() error { // until frpc withdraws the tunnel, the agent itself answers
		if resp, _ := leaving.ask(http.MethodGet, "/health"); resp.StatusCode != http.StatusServiceUnavailable {
			return errors.New("the tunnel is still up")
		}
		return nil
	})

	big := `{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"big"},` +
		`"data":{"a":"` + strings.Repeat("x", 4<<20) + `"}}`
	eviction := `{"apiVersion":"policy/v1","kind":"Eviction","metadata":{"name":"pod","namespace":"` + ns + `"}}`
	named, own, narrowed := accessErrors(t)
	cases := []struct {
		what  string
		w     *world
		other string // kubeconfig, if not the world's own
		stdin string
		args  string
	}{
		{"401, the caller's token is wrong", w, wrongToken, "", "get pods"},
		{"401, the caller's token is wrong, no discovery", w, wrongToken, "", "get --raw /api/v1/pods"},
		{"403, the agent may not, says the API server", view, "", "", "get secrets"},
		{"403, impersonation", w, "", "", "get pods --as admin"},
		{"403, a closed path", w, "", "", "get --raw /api/v1/nodes/n/proxy/pods"},
		{"403, the API server's own", w, "", "", "get --raw /metrics"},
		{"400, the gateway names no user", named.world, direct(named), "", "get pods"},
		{"400, the gateway names no user, no discovery", named.world, direct(named), "", "get --raw /api/v1/pods"},
		{"400, the gateway names a user with an invisible character, no discovery", named.world, direct(named), "",
			"get --raw /api/v1/pods --as ali\u200bce"},
		{"401, the kubeconfig holds a client certificate and no token, no discovery", own.world, certificateAlone(own), "",
			"get --raw /api/v1/pods"},
		{"401, the gateway does not show the agent's token, no discovery", own.world, direct(own), "", "get --raw /api/v1/pods"},
		{"401, the API server refuses the caller's own token", own.world, stale(own), "", "get pods"},
		{"401, the API server refuses the caller's own token, no discovery", own.world, stale(own), "", "get --raw /api/v1/pods"},
		{"403, RBAC decides about the user", named.world, "", "", "get secrets"},
		{"403, the owner allows less", narrowed["read"].world, "", "", "create configmap x"},
		{"403, the owner allows nothing", narrowed["none"].world, "", "", "get pods"},
		{"403, the owner allows nothing, no discovery", narrowed["none"].world, "", "", "get --raw /api/v1/pods"},
		{"403, the owner's time has passed", narrowed["until"].world, "", "", "get --raw /api/v1/pods"},
		{"403, the owner's ConfigMap is invalid", narrowed["invalid"].world, "", "", "get --raw /api/v1/pods"},
		{"403, the owner's ConfigMap", narrowed["all"].world, "", "", "delete configmap access -n " + narrowed["all"].home},
		{"403, a Secret in the agent's namespace", narrowed["all"].world, "", "", "get secrets -n " + narrowed["all"].home},
		{"403, a pod in the agent's namespace", narrowed["all"].world, "", "", "exec pod -n " + narrowed["all"].home + " -- ls"},
		{"404, an object that does not exist", w, "", "", "get configmap none"},
		{"404, the server's URL lacks /api/k8s", w, noPrefix, "", "get pods"},
		{"404, the server's URL lacks /api/k8s, no discovery", w, noPrefix, "", "get --raw /api/v1/pods"},
		{"404, the server's URL ends in /api/k8", w, wrongPath, "", "get pods"},
		{"413, too large for the API server", w, "", big, "create -f -"},
		{"429, not now, says the API server", w, "", eviction, "create --raw /api/v1/namespaces/" + ns + "/pods/pod/eviction -f -"},
		{"502, the API server refuses the agent", refused, "", "", "get pods"},
		{"502, the API server refuses the agent, no discovery", refused, "", "", "get --raw /api/v1/pods"},
		{"502, the API server cannot be reached", unreachable, "", "", "get pods"},
		{"502, the API server cannot be reached, no discovery", unreachable, "", "", "get --raw /api/v1/pods"},
		{"503, the agent is away", away, "", "", "get pods"},
		{"503, the agent is away, no discovery", away, "", "", "get --raw /api/v1/pods"},
		{"503, the agent is shutting down", leaving, "", "", "get pods"},
		{"503, the agent is shutting down, no discovery", leaving, "", "", "get --raw /api/v1/pods"},
		{"504, the API server is silent, no discovery", silent, "", "", "get --raw /api/v1/pods"},
	}
	shown := make([]string, len(cases))
	t.Run("kubectl", func(t *testing.T) {
		for i, c := range cases {
			t.Run(c.what, func(t *testing.T) {
				t.Parallel() // kubectl retries ten times, a second apart
				kubeconfig := c.w.caller
				if c.other != "" {
					kubeconfig = c.other
				}
				// Without cached discovery, as in the first call of a user.
				r := c.w.kubectl(kubeconfig, c.stdin, append(strings.Fields(c.args), "--cache-dir", t.TempDir())...)
				if r.Code == 0 || r.Stdout != "" {
					t.Errorf("no error: %+v", r)
				}
				shown[i] = fmt.Sprintf("# %s\n$ kubectl %s\n%s\n", c.what, c.args, r.Stderr)
			})
		}
	})
	got := strings.ReplaceAll(strings.Join(shown, ""), ns, "NAMESPACE")
	got = regexp.MustCompile(`test-testkubectl[a-z0-9-]+`).ReplaceAllString(got, "NAMESPACE")
	got = regexp.MustCompile(`127\.0\.0\.1:\d+`).ReplaceAllString(got, "ADDRESS")
	got = regexp.MustCompile(`(?m)^[EIW]\d{4} .*\n`).ReplaceAllString(got, "") // klog lines of kubectl, dated
	const golden = "testdata/errors.txt"
	if *update {
		if err := os.MkdirAll(filepath.Dir(golden), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(golden, []byte(got), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	data, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	want := string(data)
	if !api.Supports("WebSocket") { // by SPDY, kubectl prints the refusal of an exec as that of any request
		want = strings.ReplaceAll(want, "error: unable to upgrade connection: the agent",
			"Error from server (Forbidden): the agent")
	}
	if got != want {
		t.Errorf("kubectl shows\n%s\nwant\n%s\n(go test ./integration -run %s -update rewrites it)", got, want, t.Name())
	}
}

// accessErrors returns worlds with identity named and own, and by what their owner allows.
func accessErrors(t *testing.T) (named, own *accessWorld, narrowed map[string]*accessWorld) {
	t.Helper()
	named, own, narrowed = connectedAs(t, "named"), connectedAs(t, "own"), map[string]*accessWorld{}
	for what, data := range map[string][]string{
		"none": {"allow=none", "reason=an audit until Friday, ask Jane"}, "read": {"allow=read"}, "all": {"allow=all"},
		"until": {"allow=all", "until=2026-01-02T03:04:05Z"}, "invalid": {"alow=all"},
	} {
		w := newAccessWorld(t, "agent", switchEnv)
		writeSwitch(t, api.Client, w.home, data...)
		if what == "all" {
			runningPod(t, w.home) // kubectl exec looks at the pod first
		}
		w.startAgent()
		eventually(t, func() error { // its first reading
			if _, body := w.call(http.MethodGet, "/api/agent/status", ""); strings.Contains(body, "it is not read yet") {
				return errors.New(body)
			}
			return nil
		})
		narrowed[what] = w
	}
	return named, own, narrowed
}

// kubeconfigWith writes alice's configuration after change has modified it, and returns the file's path.
func (w *accessWorld) kubeconfigWith(change func(*rest.Config)) string {
	w.t.Helper()
	config := agent.Caller(w.cp, agentID, w.token)
	change(config)
	path := filepath.Join(w.t.TempDir(), "kubeconfig")
	if err := cluster.WriteKubeconfig(path, config); err != nil {
		w.t.Fatal(err)
	}
	return path
}

// direct returns a kubeconfig with the agent's token that leads past the gateway, which would say who the caller is.
func direct(w *accessWorld) string {
	w.t.Helper()
	return w.kubeconfigWith(func(c *rest.Config) {
		*c = rest.Config{Host: w.agent.Tunnel + "/api/k8s", BearerToken: agentToken}
		c.Insecure = true
	})
}

// stale returns a kubeconfig with a token that the API server does not know.
func stale(w *accessWorld) string {
	w.t.Helper()
	return w.kubeconfigWith(func(c *rest.Config) { c.BearerToken = "stale" })
}

// certificateAlone returns a kubeconfig of a user whom the cluster knows by a client certificate.
func certificateAlone(w *accessWorld) string {
	w.t.Helper()
	return w.kubeconfigWith(func(c *rest.Config) {
		c.BearerToken = ""
		c.CertData, c.KeyData = harness.NewAuthority(w.t).Client(w.t, "alice")
	})
}

// viewer is a world whose agent may read, but no secrets.
func viewer(t *testing.T) *world {
	t.Helper()
	// No controller runs that would aggregate the rules of "view".
	config, err := api.ServiceAccount(t.Context(), "pipeops-system", "viewer", "system:aggregate-to-view")
	if err != nil {
		t.Fatal(err)
	}
	w := startedWithAPIServer(t, func(c *rest.Config) { *c = *config })
	w.waitReady()
	return w
}

// protectedPod makes a pod that a PodDisruptionBudget keeps from being evicted. No controller runs that would
// count, so its status is written here.
func protectedPod(t *testing.T, w *world, ns string) {
	t.Helper()
	runningPod(t, ns)
	w.mustKubectl("label", "pod", "pod", "-n", ns, "app=protected")
	none := intstr.FromInt32(0)
	budgets := api.Client.PolicyV1().PodDisruptionBudgets(ns)
	budget, err := budgets.Create(t.Context(), &policyv1.PodDisruptionBudget{
		ObjectMeta: metav1.ObjectMeta{Name: "budget"},
		Spec: policyv1.PodDisruptionBudgetSpec{MaxUnavailable: &none,
			Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "protected"}}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	budget.Status.ObservedGeneration = budget.Generation
	if _, err := budgets.UpdateStatus(t.Context(), budget, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
}

// wantTunnel waits until the tunnel is up, whatever other checks fail.
func wantTunnel(t *testing.T, w *world) {
	t.Helper()
	eventually(t, func() error {
		_, answer, err := w.agent.Ready(t.Context())
		if err == nil && !answer.Checks["tunnel"].OK {
			err = fmt.Errorf("no tunnel: %+v", answer)
		}
		return err
	})
}
