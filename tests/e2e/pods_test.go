package e2e

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/utils/ptr"

	"github.com/pipeops/vm-agent/tests/harness"
	"github.com/pipeops/vm-agent/tests/harness/cluster"
	"github.com/pipeops/vm-agent/tests/harness/process"
)

func TestNodeRunsAPod(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	made := create(t, ns, pod("talks", "while echo talking; do sleep 0.1; done"), corev1.PodRunning)
	pods := node.Client.CoreV1().Pods(ns)

	logs, err := pods.GetLogs(made.Name, &corev1.PodLogOptions{Follow: true}).Stream(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = logs.Close() }()
	lines := bufio.NewScanner(logs)
	for i := range 5 {
		if !lines.Scan() || lines.Text() != "talking" {
			t.Fatalf("line %d of the log is %q (%v)", i, lines.Text(), lines.Err())
		}
	}

	url := node.Client.CoreV1().RESTClient().Post().Namespace(ns).Resource("pods").Name(made.Name).SubResource("exec").
		VersionedParams(&corev1.PodExecOptions{Command: []string{"/bin/busybox", "cat"}, Stdin: true, Stdout: true},
			scheme.ParameterCodec).URL()
	exec, err := remotecommand.NewWebSocketExecutor(node.Config, "GET", url.String())
	if !node.Supports("WebSocket") {
		exec, err = remotecommand.NewSPDYExecutor(node.Config, "POST", url)
	}
	if err != nil {
		t.Fatal(err)
	}
	var stdout bytes.Buffer
	if err := exec.StreamWithContext(t.Context(), remotecommand.StreamOptions{Stdin: strings.NewReader("there and back"),
		Stdout: &stdout}); err != nil {
		t.Fatal(err)
	}
	if stdout.String() != "there and back" {
		t.Errorf("cat answers %q", stdout.String())
	}

	uid := string(made.UID)
	if findPodLeftovers(t, uid) == nil {
		t.Error("findPodLeftovers does not find the running pod")
	}
	if err := pods.Delete(t.Context(), made.Name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	for lines.Scan() {
		continue
	}
	if err := lines.Err(); err != nil {
		t.Errorf("the log does not end well: %v", err)
	}
	eventually(t, func() error {
		switch _, err := pods.Get(t.Context(), made.Name, metav1.GetOptions{}); {
		case err == nil:
			return errors.New("the pod is still there")
		case !apierrors.IsNotFound(err):
			return err
		}
		return findPodLeftovers(t, uid)
	})
}

// findPodLeftovers returns an error that names what a running pod has on the node. (Records of ended containers stay
// for a minute.)
func findPodLeftovers(t *testing.T, uid string) error {
	t.Helper()
	for _, look := range []string{
		`! grep "$1" /proc/self/mountinfo`,
		`find /sys/fs/cgroup -name "*$1*"`,
	} {
		out, err := node.Command(t.Context(), "sh", "-c", look, "sh", uid).CombinedOutput()
		if len(out) > 0 {
			return fmt.Errorf("the node has of the pod: %s", out)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// TestNodePodReachesTheAPIServer runs a pod of an imported image under the strictest Pod Security Standard. It
// reaches the API server as its ServiceAccount, at the address in its environment, and verifies the certificate.
func TestNodePodReachesTheAPIServer(t *testing.T) {
	t.Parallel()
	binary := harness.Binary(t, "kubectl")
	const image = "localhost/kubectl:test"
	archive := filepath.Join(t.TempDir(), "kubectl.tar")
	if err := cluster.WriteImage(archive, image, binary, "/kubectl"); err != nil {
		t.Fatal(err)
	}
	if err := node.ImportImage(t.Context(), archive); err != nil {
		t.Fatal(err)
	}
	ns := namespace(t)
	p := pod("asks", "")
	p.Spec.SecurityContext = &corev1.PodSecurityContext{
		RunAsNonRoot: ptr.To(true), RunAsUser: ptr.To(int64(65532)),
		SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
	}
	p.Spec.Containers = []corev1.Container{{
		Name: "kubectl", Image: image, Args: []string{"auth", "whoami", "-o",
			"jsonpath={.status.userInfo.username} at $(KUBERNETES_SERVICE_HOST)"},
		SecurityContext: &corev1.SecurityContext{
			AllowPrivilegeEscalation: ptr.To(false), ReadOnlyRootFilesystem: ptr.To(true),
			Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
		},
	}}
	create(t, ns, p, corev1.PodSucceeded)
	if got, want := logsOf(t, ns, p.Name, "kubectl"), "system:serviceaccount:"+ns+":default at 10.96.0.1"; got != want {
		t.Errorf("the pod is %q, want %q", got, want)
	}
}

func TestNodeServesADeployment(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	labels := map[string]string{"app": "web"}
	web := pod("web", `mkdir /www && echo "from $HOSTNAME" >/www/index.html && exec httpd -f -p 8080 -h /www`)
	web.Spec.RestartPolicy = corev1.RestartPolicyAlways
	web.Spec.Containers[0].ReadinessProbe = &corev1.Probe{
		PeriodSeconds: 1, ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Port: intstr.FromInt32(8080)}},
	}
	deployment := &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Name: "web"},
		Spec: appsv1.DeploymentSpec{
			Replicas: ptr.To(int32(2)), Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels}, Spec: web.Spec},
		},
	}
	if _, err := node.Client.AppsV1().Deployments(ns).Create(t.Context(), deployment, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	service := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: "web"},
		Spec: corev1.ServiceSpec{Selector: labels,
			Ports: []corev1.ServicePort{{Port: 80, TargetPort: intstr.FromInt32(8080)}}},
	}
	service, err := node.Client.CoreV1().Services(ns).Create(t.Context(), service, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		d, err := node.Client.AppsV1().Deployments(ns).Get(t.Context(), "web", metav1.GetOptions{})
		if err == nil && d.Status.ReadyReplicas != 2 {
			err = fmt.Errorf("%d of 2 replicas are ready", d.Status.ReadyReplicas)
		}
		return err
	})
	// Another pod reaches both through the Service as soon as kube-proxy knows both.
	client := create(t, ns, pod("client", `
		touch /heard
		until [ "$(sort -u /heard | wc -l)" = 2 ]; do sleep 0.1; wget -q -O - "http://$0" >>/heard 2>/dev/null; done
		for i in $(seq 40); do wget -q -O - "http://$0" || exit 1; done`, service.Spec.ClusterIP), corev1.PodSucceeded)
	answers := map[string]int{}
	for line := range strings.Lines(logsOf(t, ns, client.Name, "main")) {
		answers[line]++
	}
	if len(answers) != 2 {
		t.Errorf("the Service leads to %v, want 2 pods", answers)
	}
}

// TestNodeOrdersNativeSidecars checks that a native sidecar starts before the main container and ends after it.
func TestNodeOrdersNativeSidecars(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	p := pod("main", "ls /shared; echo bye >/shared/main")
	shared := []corev1.VolumeMount{{Name: "shared", MountPath: "/shared"}}
	p.Spec.Volumes = []corev1.Volume{{Name: "shared",
		VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{Medium: corev1.StorageMediumMemory}}}}
	p.Spec.Containers[0].VolumeMounts = shared
	const script = "trap 'cat /shared/main; exit' TERM; sleep 0.5; touch /shared/sidecar; while :; do sleep 0.1; done"
	sidecar := pod("sidecar", script).Spec.Containers[0]
	sidecar.Name, sidecar.VolumeMounts = "sidecar", shared
	sidecar.RestartPolicy = ptr.To(corev1.ContainerRestartPolicyAlways)
	sidecar.StartupProbe = &corev1.Probe{
		PeriodSeconds: 1, ProbeHandler: corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{"/bin/busybox",
			"test", "-f", "/shared/sidecar"}}},
	}
	p.Spec.InitContainers = []corev1.Container{sidecar}
	create(t, ns, p, corev1.PodSucceeded)
	if got := logsOf(t, ns, "main", "main"); got != "sidecar\n" {
		t.Errorf("the main container finds %q, want what the sidecar wrote before", got)
	}
	if got := logsOf(t, ns, "main", "sidecar"); got != "bye\n" {
		t.Errorf("the sidecar finds at its end %q, want what the main container wrote before", got)
	}
}

// pod returns a pod that runs a busybox shell script, once.
func pod(name, script string, args ...string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: corev1.PodSpec{
			RestartPolicy:                 corev1.RestartPolicyNever,
			TerminationGracePeriodSeconds: ptr.To(int64(1)), // a shell as the first process of its container ignores SIGTERM
			Containers: []corev1.Container{{
				Name: "main", Image: cluster.Busybox, Command: append([]string{"/bin/busybox", "sh", "-c", script}, args...),
			}},
		},
	}
}

// create makes a pod and waits until it is in the phase.
func create(t *testing.T, namespace string, pod *corev1.Pod, phase corev1.PodPhase) *corev1.Pod {
	t.Helper()
	made, err := createPod(t.Context(), namespace, pod, phase)
	if err != nil {
		t.Fatal(err)
	}
	return made
}

func createPod(ctx context.Context, namespace string, pod *corev1.Pod, phase corev1.PodPhase) (*corev1.Pod, error) {
	pods := node.Client.CoreV1().Pods(namespace)
	made, err := pods.Create(ctx, pod, metav1.CreateOptions{})
	if err != nil {
		return nil, err
	}
	err = process.Poll(ctx, time.Minute, nil, func() (err error) {
		made, err = pods.Get(ctx, pod.Name, metav1.GetOptions{})
		if err == nil && made.Status.Phase != phase {
			err = fmt.Errorf("pod %s is %s, want %s", pod.Name, made.Status.Phase, phase)
		}
		return err
	})
	return made, err
}

func logsOf(t *testing.T, namespace, pod, container string) string {
	t.Helper()
	log, err := node.Client.CoreV1().Pods(namespace).GetLogs(pod,
		&corev1.PodLogOptions{Container: container}).DoRaw(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return string(log)
}
