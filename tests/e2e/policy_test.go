package e2e

import (
	"fmt"
	"net"
	"net/url"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/pipeops/vm-agent/tests/harness/cluster"
)

// openPorts returns a patch that allows the control plane's ports, which are not the usual ones.
func (i *installed) openPorts() string {
	return fmt.Sprintf(`{target: {kind: NetworkPolicy}, patch: '[
		{"op": "add", "path": "/spec/egress/1/ports/-", "value": {"port": %s}},
		{"op": "add", "path": "/spec/egress/1/ports/-", "value": {"port": %d}}]'}`, port(i.t, i.cp.APIURL), i.cp.FrpsPort)
}

func port(t *testing.T, address string) string {
	t.Helper()
	u, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	return u.Port()
}

// TestNetworkPolicyAllowsOnlyWhatIsNeeded checks that the agent works with the component network-policy on a node
// that enforces it, that only Prometheus can connect to the pod, and that the pod can connect only to what the agent
// needs.
func TestNetworkPolicyAllowsOnlyWhatIsNeeded(t *testing.T) {
	t.Parallel()
	i := prepareBeside(t)
	api, gateway := port(t, i.cp.APIURL), port(t, i.cp.GatewayURL)
	i.patches = i.openPorts()
	i.components("network-policy")
	i.apply()
	i.mustKubectl(i.caller, "get", "--raw", "/version")
	agents, err := node.Client.CoreV1().Pods(i.ns).List(t.Context(),
		metav1.ListOptions{LabelSelector: "app.kubernetes.io/name=pipeops-agent"})
	if err != nil || len(agents.Items) != 1 {
		t.Fatalf("%d pods, %v", len(agents.Items), err)
	}

	ns := namespace(t)
	pod := func(ns, name, label, value string) corev1.Pod {
		yes, no, user := true, false, int64(65532)
		if _, err := node.Client.CoreV1().Pods(ns).Create(t.Context(), &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{label: value}},
			Spec: corev1.PodSpec{
				Containers: []corev1.Container{{
					Name: "busybox", Image: cluster.Busybox, Command: []string{"/bin/busybox", "sh", "-c",
						"cd /tmp; echo page >index.html; exec /bin/busybox httpd -f -p 8443"},
					SecurityContext: &corev1.SecurityContext{AllowPrivilegeEscalation: &no,
						Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}}},
					VolumeMounts: []corev1.VolumeMount{{Name: "tmp", MountPath: "/tmp"}},
				}},
				Volumes: []corev1.Volume{{Name: "tmp",
					VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}}},
				SecurityContext: &corev1.PodSecurityContext{RunAsNonRoot: &yes, RunAsUser: &user,
					SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault}},
				TerminationGracePeriodSeconds: new(int64),
			},
		}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		i.mustKubectl(i.admin, "-n", ns, "wait", "--for", "condition=Ready", "pod/"+name, "--timeout", "1m")
		made, err := node.Client.CoreV1().Pods(ns).Get(t.Context(), name, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return *made
	}
	const name = "app.kubernetes.io/name"
	prometheus, stranger := pod(ns, "prometheus", name, "prometheus"), pod(ns, "stranger", name, "stranger")
	runner := pod(ns, "runner", "pipeops.io/runner", "true")
	likeAgent := pod(i.ns, "like-the-agent", name, "pipeops-agent")

	for _, test := range []struct {
		from     corev1.Pod
		address  string
		port     string
		may      bool
		sentence string
	}{
		{prometheus, agents.Items[0].Status.PodIP, "9090", true, "Prometheus to the agent's metrics"},
		{stranger, agents.Items[0].Status.PodIP, "9090", false, "a stranger to the agent's metrics"},
		{likeAgent, likeAgent.Status.PodIP, "8443", true, "that port answers"},
		{prometheus, likeAgent.Status.PodIP, "8443", false, "Prometheus to another port of the agent"},
		{stranger, runner.Status.PodIP, "8443", true, "a stranger to a runner"},
		{likeAgent, runner.Status.PodIP, "8443", true, "the agent to a runner"},
		{prometheus, stranger.Status.PodIP, "8443", true, "Prometheus to a stranger"},
		{likeAgent, stranger.Status.PodIP, "8443", false, "the agent to a stranger"},
		{likeAgent, node.IP, "6443", true, "the agent to the API server"},
		{likeAgent, "10.96.0.1", "443", true, "the agent to the API server's Service"},
		{stranger, node.IP, "10250", true, "a stranger to the kubelet"},
		{likeAgent, node.IP, "10250", false, "the agent to the kubelet"},
		{likeAgent, node.HostIP, api, true, "the agent to the control plane"},
		{likeAgent, node.HostIP, fmt.Sprint(i.cp.FrpsPort), true, "the agent to frps"},
		{stranger, node.HostIP, gateway, true, "a stranger to another port of the control plane"},
		{likeAgent, node.HostIP, gateway, false, "the agent to another port of the control plane"},
	} {
		reaches := func() error {
			out, err := i.run(i.admin, "", nil, "-n", test.from.Namespace, "exec", test.from.Name, "--", "/bin/busybox", "nc",
				"-w", "3", test.address, test.port, "-e", "/bin/busybox", "true")
			if err != nil && !strings.Contains(err.Error(), "command terminated with exit code 1") {
				t.Fatal(out, err)
			}
			return err
		}
		// The rules of a new pod apply a moment after its start. Each address that is refused has answered another pod
		// before.
		eventually(t, func() error {
			if err := reaches(); (err == nil) != test.may {
				return fmt.Errorf("%s: %s, answered: %t", test.sentence, net.JoinHostPort(test.address, test.port), err == nil)
			}
			return nil
		})
	}
}
