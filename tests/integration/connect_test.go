package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/yaml"

	"github.com/pipeops/vm-agent/tests/harness"
	"github.com/pipeops/vm-agent/tests/harness/agent"
)

// standIns replace programs that this machine lacks, and the way into a pod: no cluster here has nodes. Each fails
// unless it is called as its own documentation says.
var standIns = map[string]string{
	"kubectl": `case "$*" in "-n pipeops-system exec deployment/pipeops-agent -c bootstrap -- /bootstrap "*)
		shift 8
		agent=edge-7; case "$*" in *agent-001*) agent=agent-001 ;; esac
		exec env $(cat $agent.env) "$BIN/bootstrap" "$@" ;;
	esac
	exec "$BIN/kubectl" "$@"`,
	"make": `case "$1" in
		images) mkdir -p .build/images && touch .build/images/vm-agent-amd64.tar ;;
		run) exec kubectl get namespaces ;; # TestRunCommandPrintsAWorkingKubeconfig runs it
		*) exit 1 ;;
	esac`,
	"kind": `case "$*" in
		"create cluster") ;;
		"get kubeconfig") cat "$KUBECONFIG" ;;
		"load image-archive "*) [ -f "$3" ] ;;
		*) exit 1 ;;
	esac`,
	"k3d": `case "$*" in
		"cluster create try") ;;
		"image import "*" --cluster try") [ -f "$3" ] ;;
		*) exit 1 ;;
	esac`,
	"helm": `[ "$1 $3 $4" = "--kubeconfig upgrade --install" ] && exec kubectl --kubeconfig "$2" -n default get secrets`,
}

// TestEveryCommandOfTheConnectPageWorks runs the commands of manifests/CONNECT.md in their order, for agent-001 through
// a gateway and edge-7 straight through a frps of its own, and uses its Secrets and its CI step.
func TestEveryCommandOfTheConnectPageWorks(t *testing.T) {
	t.Parallel()
	w := &accessWorld{world: connected(t)}
	env, callers := ownFrpsFromManifests(t, w)
	_, port, _ := strings.Cut(callers, ":")
	edge, err := agent.New(w.group, w.cp, "edge-7", agentToken, api.kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	certificates := t.TempDir()
	w.command(t, "certificate", "--dir", certificates, "edge-7.k8s.example.com")
	edge.Env = append(append(edge.Env, env...), "PIPEOPS_PROXY_TLS_CERT_FILE="+filepath.Join(certificates, "tls.crt"),
		"PIPEOPS_PROXY_TLS_KEY_FILE="+filepath.Join(certificates, "tls.key"))
	harness.StartAgent(t, edge)

	dir := t.TempDir()
	write := func(name, text string, mode os.FileMode) {
		t.Helper()
		path := filepath.Join(dir, name)
		err := os.MkdirAll(filepath.Dir(path), 0o700)
		if err == nil {
			err = os.WriteFile(path, []byte(text), mode)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for name, script := range standIns {
		write("bin/"+name, "#!/bin/sh\n"+script+"\n", 0o700)
	}
	sh := func(script string, env ...string) string {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), "sh", "-ec", script)
		cmd.Dir = dir
		cmd.Env = append([]string{"HOME=" + dir, "BIN=" + filepath.Dir(harness.Binary(t, "kubectl")),
			"KUBECONFIG=" + api.kubeconfig, "PATH=" + filepath.Join(dir, "bin") + ":" + os.Getenv("PATH")}, env...)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v: %s", script, err, out)
		}
		return string(out)
	}
	// local is in place of DNS and port 443. The name stays the one that frps and the certificate know.
	server := "https://127.0.0.1:" + port + "/api/k8s"
	local := func(kubeconfig string) string {
		return regexp.MustCompile(`(?m)^( *)server: "?https://edge-7\.k8s\.example\.com/api/k8s"?$`).
			ReplaceAllString(kubeconfig, "${1}server: "+server+"\n${1}tls-server-name: edge-7.k8s.example.com")
	}
	printed, err := edge.Command("kubeconfig")
	if err != nil {
		t.Fatal(err)
	}
	if printed.ExitCode() != 0 {
		t.Fatal(printed.Failed())
	}
	for name, text := range map[string]string{
		"edge-7.kubeconfig": local(printed.Log()), "edge-7.token": agentToken, "agent-001.token": agentToken,
		"edge-7.env": strings.Join(edge.Env, "\n"), "agent-001.env": strings.Join(w.agent.Env, "\n"),
		"gateway-ca.crt": string(w.cp.CA),
	} {
		write(name, text, 0o600)
	}
	for name, secret := range map[string]string{"flux-system": "edge-7-kubeconfig", "argocd": "edge-7"} {
		sh("kubectl create namespace " + name + " --dry-run=client -o yaml | kubectl apply -f -") // may be there
		t.Cleanup(func() {
			_ = api.Client.CoreV1().Secrets(name).Delete(context.Background(), secret, metav1.DeleteOptions{})
		})
	}

	page, err := os.ReadFile(filepath.Join(harness.Root(t), "manifests", "CONNECT.md"))
	if err != nil {
		t.Fatal(err)
	}
	blocks := regexp.MustCompile(`(?m)(?:^    .+\n)+`).FindAllString(fenced.ReplaceAllString(string(page), ""), -1)
	for _, block := range blocks {
		out := sh(strings.ReplaceAll(block, "https://gateway.example.com", w.cp.GatewayURL))
		if strings.Contains(block, "doctor") && !strings.Contains(out, "edge-7") {
			t.Errorf("doctor:\n%s", out)
		}
		if strings.Contains(block, "get-contexts") &&
			(!strings.Contains(out, "agent-001") || !strings.Contains(out, "edge-7")) {
			t.Errorf("contexts:\n%s", out)
		}
		secret := filepath.Join(dir, "edge-7.secret.kubeconfig")
		if info, err := os.Stat(secret); err == nil && info.Mode().Perm() != 0o600 {
			t.Errorf("%s: others may read it: %s", block, info.Mode())
		}
		if data, err := os.ReadFile(secret); err == nil {
			write("edge-7.secret.kubeconfig", local(string(data)), 0o600)
		}
	}
	if len(blocks) < 10 {
		t.Errorf("the page has %d blocks of commands", len(blocks))
	}

	secretKubeconfig, err := os.ReadFile(filepath.Join(dir, "edge-7.secret.kubeconfig"))
	if err != nil {
		t.Fatal(err)
	}
	reaches := func(what string, config *rest.Config) {
		t.Helper()
		client, err := kubernetes.NewForConfig(config)
		if err == nil {
			_, err = client.CoreV1().Namespaces().Get(t.Context(), "default", metav1.GetOptions{})
		}
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	flux, err := api.Client.CoreV1().Secrets("flux-system").Get(t.Context(), "edge-7-kubeconfig", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	fluxConfig, err := clientcmd.RESTConfigFromKubeConfig(flux.Data["value"])
	if err != nil {
		t.Fatal(err)
	}
	reaches("Flux", fluxConfig)

	var argo corev1.Secret
	var steps []struct{ Run string }
	for _, match := range fenced.FindAllStringSubmatch(string(page), -1) {
		switch text := match[1]; {
		case strings.Contains(text, "argocd.argoproj.io"):
			err = yaml.UnmarshalStrict([]byte(text), &argo)
		case strings.Contains(text, "KUBECONFIG_SECRET"):
			err = yaml.Unmarshal([]byte(text), &steps)
		}
		if err != nil {
			t.Fatalf("%v: %s", err, match[1])
		}
	}
	var cluster struct { // Argo CD's ClusterConfig, as far as the page uses it
		BearerToken     string
		TLSClientConfig rest.TLSClientConfig
	}
	if argo.StringData["server"] != "https://edge-7.k8s.example.com/api/k8s" {
		t.Fatalf("Argo CD: %+v", argo)
	}
	config := strings.NewReplacer(`"TOKEN"`, `"`+agentToken+`"`,
		`"CA"`, `"`+regexp.MustCompile(`authority-data: (\S+)`).FindStringSubmatch(string(secretKubeconfig))[1]+`"`)
	if err := json.Unmarshal([]byte(config.Replace(argo.StringData["config"])), &cluster); err != nil {
		t.Fatal(err)
	}
	cluster.TLSClientConfig.ServerName = "edge-7.k8s.example.com"
	reaches("Argo CD", &rest.Config{
		Host: server, BearerToken: cluster.BearerToken, TLSClientConfig: cluster.TLSClientConfig,
	})
	if _, err := api.Client.CoreV1().Secrets("argocd").Create(t.Context(), &argo, metav1.CreateOptions{}); err != nil {
		t.Error(err)
	}

	if len(steps) != 1 {
		t.Fatalf("the page has %d steps for CI", len(steps))
	}
	ns, runner := w.namespace(), t.TempDir()
	thing := strings.Replace(fmt.Sprintf(configMap, "1"), `"name"`, `"namespace":"`+ns+`","name"`, 1)
	write("deploy/thing.yaml", thing, 0o600)
	out := sh(steps[0].Run, "RUNNER_TEMP="+runner, "KUBECONFIG_SECRET="+string(secretKubeconfig))
	if out != "configmap/thing created\n" {
		t.Errorf("CI: %s", out)
	}
	if info, err := os.Stat(filepath.Join(runner, "kubeconfig")); err != nil || info.Mode() != 0o600 {
		t.Errorf("CI leaves the kubeconfig open: %v, %v", info, err)
	}
}

// fenced matches blocks of code that are no commands.
var fenced = regexp.MustCompile("(?s)```[a-z]+\n(.*?)```\n")
