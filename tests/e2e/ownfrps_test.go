package e2e

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/elazarl/goproxy"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/pipeops/vm-agent/tests/harness"
	"github.com/pipeops/vm-agent/tests/harness/cluster"
)

// ownPage is manifests/frps/README.md, for two agents of one cluster.
type ownPage struct {
	agents *installed
	sh     *shell
	page   *page
}

// replacePods begins the commands of OPERATIONS.md that replace the pods for another group key.
const replacePods = "kubectl apply -k manifests/overlays/edge"

const ownDomain = "k8s.example.test" // in place of the page's k8s.example.com

// TestOwnFrps follows the page about a frps of one's own: the stock frps in podman, by Compose, and two agents of the
// overlay edge, the second with identity own. No part needs a control plane. The first comes to a node of one.
func TestOwnFrps(t *testing.T) {
	o := followOwnPage(t)
	sh, p := o.sh, o.page
	sh.must(strings.ReplaceAll(p.command(t, "perl -pi -e"), "YOUR.DOMAIN", ownDomain))
	p.command(t, "make build") // has been run
	o.do("ssh root@frps.k8s.example.com mkdir")
	o.edit("edge", "components:\n", "components:\n  - ../../components/manage-all-namespaces\n")
	o.edit("edge", "patches:\n", hostAlias)
	restore := taintNode(t)
	o.do("openssl rand -hex 32 > agent-token")
	restore()
	if out := o.do("kubectl -n pipeops-system exec"); strings.Contains(out, "failed") {
		t.Errorf("doctor:\n%s", out)
	}
	if out := o.do("cp agent-token edge-7.token"); !strings.Contains(out, "Ready") {
		t.Errorf("get nodes: %s", out)
	}

	o.outside()

	o.do("mkdir manifests/overlays/edge-8")
	o.edit("edge-8", "namespace: pipeops-system", "namespace: pipeops-second") // because it is the same cluster
	o.edit("edge-8", "  - ../../components/manage-all-namespaces\n", "")
	o.edit("edge-8", "\nlabels:\n", "  - ../../components/suffix\n\nlabels:\n")
	o.second(p.whole(t, "openssl rand -hex 32 > agent-token"))
	o.edit("edge-8", "    literals:\n", "    literals:\n"+o.says("      - PIPEOPS_ACCESS_IDENTITY=own\n"+
		"      - PIPEOPS_PROXY_TLS_CLIENT_CA_FILE=/etc/pipeops/tls/callers.crt\n"))
	o.edit("edge-8", "      - tls.crt\n", "      - tls.crt\n"+o.says("      - callers.crt\n"))
	o.second(p.whole(t, "openssl req -x509 -newkey")) // the new pod joins the tunnel of the old one
	t.Cleanup(func() {
		if _, err := sh.run("kubectl -n default delete serviceaccount/alice clusterrolebinding/alice"); err != nil {
			t.Error(err)
		}
	})
	o.second(p.whole(t, "openssl req -x509 -CA"))
	if out := o.do("KUBECONFIG="); !strings.Contains(out, "kube-system") {
		t.Errorf("get namespaces: %s", out)
	}

	ns := namespace(t)
	sh.must("kubectl -n " + ns + " create rolebinding alice --clusterrole edit --serviceaccount default:alice")
	o.uses(ns, "edge-7")
	o.uses(ns, "edge-8")
	answers := func() {
		t.Helper()
		for _, id := range []string{"edge-7", "edge-8"} {
			harness.Eventually(t, 2*time.Minute, func() error { // the kubelet may wait before it restarts a container again
				_, err := o.by(id).run(o.by(id).caller, "", sh.env, "-n", ns, "get", "pods")
				return err
			})
		}
	}
	// Not frpc: the new token restarts it, and the kubelet would wait ten seconds more before the second time.
	for name, want := range map[string]int{"frps": 1, "bootstrap": 2, "proxy": 2} {
		running := func() []string {
			out, _ := node.Command(t.Context(), "pgrep", "-x", name).Output() // fails where there is none
			return strings.Fields(string(out))
		}
		before := running()
		if out, err := node.Command(t.Context(), "pkill", "-KILL", "-x", name).CombinedOutput(); err != nil {
			t.Fatalf("kill %s: %v: %s", name, err, out)
		}
		eventually(t, func() error {
			now := running()
			old := func(pid string) bool { return slices.Contains(before, pid) }
			if len(now) < want || slices.ContainsFunc(now, old) {
				return fmt.Errorf("%s: processes %s, before %s", name, now, before)
			}
			return nil
		})
		answers()
	}
	var agent, frps string
	serials := func() (err error) {
		if agent, err = o.serial("edge-7", 443); err == nil {
			frps, err = o.serial("frps", 7000)
		}
		return err
	}
	eventually(t, serials)
	oldAgent, oldFrps := agent, frps
	o.do("cp ../../frps/ca.key .")
	o.do("scp token tls.crt")
	block, _ := p.find(t, "scp token tls.crt")
	o.second("cd manifests/frps\n" + strings.Join(block[len(block)-2:], "\n"))
	answers()
	eventually(t, func() error {
		err := serials()
		if err == nil && (agent == oldAgent || frps == oldFrps) {
			err = errors.New("one still has the old certificate")
		}
		return err
	})
	answers()
	o.agents.write("overlays/edge/group-key", "another-group-key\n")
	sh.must(readPage(t, "OPERATIONS.md").block(t, replacePods))
	o.agents.rollout()
	answers()
	out, err := node.Command(t.Context(), "busybox", "wget", "-q", "-O", "-", "http://127.0.0.1:7500/metrics").Output()
	if err != nil || !strings.Contains(string(out), "frp_server_client_counts ") {
		t.Errorf("metrics: %v: %s", err, out)
	}
	p.allRan(t)
}

// hostAlias begins the patches of an overlay, because the node has no DNS.
const hostAlias = `patches:
  - target: {kind: Deployment}
    patch: |-
      - op: add
        path: /spec/template/spec/hostAliases
        value: [{ip: IP, hostnames: [frps.` + ownDomain + `]}]
`

// followOwnPage prepares a workstation, and on the node, beside Kubernetes, the host of frps.
func followOwnPage(t *testing.T) *ownPage {
	t.Helper()
	o := &ownPage{agents: prepare(t), page: readPage(t, "frps/README.md")}
	d := startDocker(t)
	root := harness.Root(t)
	d.must("mkdir srv; docker load --quiet --input " + filepath.Join(root, ".build", "images", "frps.tar"))
	d.program("ssh", `[ "$1" = root@frps.`+ownDomain+` ] && shift
exec sh -ec "$(echo "$*" | sed "s|/srv/frps|$HOME/srv|")"`)
	d.program("scp", `for last; do :; done
[ "$last" = root@frps.`+ownDomain+`:/srv/frps ] || exit
for file; do [ "$file" = "$last" ] || cp "$file" "$HOME/srv"; done`)
	// In place of DNS for callers: any name is the host of frps.
	proxy := goproxy.NewProxyHttpServer()
	proxy.ConnectDial = func(network, address string) (net.Conn, error) {
		_, port, err := net.SplitHostPort(address)
		if err != nil {
			return nil, err
		}
		return (&net.Dialer{}).DialContext(t.Context(), network, net.JoinHostPort(node.IP, port))
	}
	server := httptest.NewServer(proxy)
	t.Cleanup(server.Close)
	o.sh = d.shell
	o.sh.env = append(o.sh.env, "HTTPS_PROXY="+server.URL, "NO_PROXY="+node.IP)
	o.sh.dir = filepath.Dir(o.agents.dir)
	o.sh.must("ln -s " + filepath.Join(root, ".build") + " .")
	return o
}

// do runs the block of the page with the command that begins with words.
func (o *ownPage) do(words string) string {
	o.sh.t.Helper()
	return o.sh.must(strings.ReplaceAll(o.page.whole(o.sh.t, words), "k8s.example.com", ownDomain))
}

// second runs commands of the page for the second agent.
func (o *ownPage) second(commands string) {
	o.sh.t.Helper()
	o.sh.must(strings.NewReplacer("k8s.example.com", ownDomain, "overlays/edge-8", "overlays/edge-8",
		"overlays/edge", "overlays/edge-8", "edge-7", "edge-8", "-n pipeops-system", "-n pipeops-second").Replace(commands))
}

// outside runs an agent by Compose, on the host of frps.
func (o *ownPage) outside() {
	t := o.sh.t
	t.Helper()
	o.agents.write("docker/compose.override.yaml", fmt.Sprintf(`x-dns: &dns {extra_hosts: ["frps.%s:%s"]}
services: {bootstrap: *dns, frpc: *dns}
`, ownDomain, node.IP))
	unpin(t, filepath.Join(o.agents.dir, "docker", "compose.yaml"))
	o.sh.must("install -o 65532 -m 400 $KUBECONFIG manifests/docker/kubeconfig")
	defer o.sh.checkHealth("pipeops-agent-bootstrap-1")()
	out := o.do("cat > agent.env <<END")
	if !strings.Contains(out, "running at edge-9."+ownDomain+":8443") || !strings.Contains(out, "kube-system") {
		t.Errorf("the agent outside: %s", out)
	}
	o.sh.must("cd manifests/docker; docker compose down --volumes")
}

// says returns lines that the page says to add.
func (o *ownPage) says(lines string) string {
	o.sh.t.Helper()
	data, err := os.ReadFile(filepath.Join(o.agents.dir, "frps", "README.md"))
	if err != nil || !strings.Contains(string(data), "```yaml\n"+lines+"```\n") {
		o.sh.t.Errorf("the page does not say %s (%v)", lines, err)
	}
	return lines
}

// edit changes an overlay.
func (o *ownPage) edit(overlay, old, new string) {
	o.sh.t.Helper()
	name := filepath.Join("overlays", overlay, "kustomization.yaml")
	data, err := os.ReadFile(filepath.Join(o.agents.dir, name))
	if err != nil || !strings.Contains(string(data), old) {
		o.sh.t.Fatalf("%s has no %q (%v)", name, old, err)
	}
	o.agents.write(name, strings.Replace(string(data), old, strings.Replace(new, "ip: IP", "ip: "+node.IP, 1), 1))
}

// by returns the same installation for the callers of an agent.
func (o *ownPage) by(id string) *installed {
	i := *o.agents
	i.caller = filepath.Join(i.dir, "overlays", map[string]string{"edge-7": "edge", "edge-8": "edge-8"}[id],
		id+".kubeconfig")
	return &i
}

// serial returns the number of the certificate that the host of frps shows for a name, if the page's authority has
// signed it.
func (o *ownPage) serial(name string, port int) (string, error) {
	ca, err := os.ReadFile(filepath.Join(o.agents.dir, "frps", "ca.crt"))
	if err != nil {
		return "", err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	conn, err := tls.Dial("tcp", fmt.Sprintf("%s:%d", node.IP, port),
		&tls.Config{ServerName: name + "." + ownDomain, RootCAs: roots, MinVersion: tls.VersionTLS12})
	if err != nil {
		return "", err
	}
	defer func() { _ = conn.Close() }()
	return conn.ConnectionState().PeerCertificates[0].SerialNumber.String(), nil
}

// uses works in a namespace as a caller of an agent.
func (o *ownPage) uses(ns, id string) {
	i, env := o.by(id), o.sh.env
	t := i.t
	t.Helper()
	file := filepath.Join(i.dir, id+".yaml")
	i.write(id+".yaml", `{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "`+id+`"}, "spec": {
		"terminationGracePeriodSeconds": 1, "containers": [{"name": "web", "image": "`+cluster.Busybox+`", "command": [
		"/bin/busybox", "sh", "-c", "mkdir /www; echo page >/www/index.html; httpd -p 8080 -h /www; `+
		`while echo talking; do sleep 0.2; done"]}]}}`)
	for _, args := range []string{"apply -f " + file, "wait --for condition=Ready --timeout 1m pod/" + id} {
		if _, err := i.run(i.caller, "", env, append([]string{"-n", ns}, strings.Fields(args)...)...); err != nil {
			t.Fatal(err)
		}
	}
	for _, protocol := range [][]string{nil, spdy} {
		env := append(protocol, env...)
		if out, err := i.run(i.caller, "there and back", env, "-n", ns, "exec", "-i", id, "--", "/bin/busybox",
			"cat"); err != nil || out != "there and back" {
			t.Errorf("exec: %q, %v", out, err)
		}
		i.portForward(ns, "pod/"+id, env)
	}
	follow := i.kubectl(t.Context(), i.caller, env, "-n", ns, "logs", "-f", id)
	stdout, err := follow.StdoutPipe()
	if err == nil {
		err = follow.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = follow.Process.Kill(); _ = follow.Wait() }()
	lines := bufio.NewScanner(stdout)
	for range 5 {
		if !lines.Scan() || lines.Text() != "talking" {
			t.Fatalf("logs -f: %q, %v", lines.Text(), lines.Err())
		}
	}
}

// taintNode gives the node the taint of control-plane nodes, until the function that it returns is called.
func taintNode(t *testing.T) (restore func()) {
	t.Helper()
	taint := func(change string) error {
		out, err := harness.Run(harness.Kubectl(context.Background(), t, t.TempDir(), node.Kubeconfig, nil,
			"taint", "node", cluster.NodeName, "node-role.kubernetes.io/control-plane:NoSchedule"+change), "")
		if err != nil {
			err = fmt.Errorf("%w: %s", err, out.Stdout)
		}
		return err
	}
	restore = sync.OnceFunc(func() {
		if err := taint("-"); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(restore)
	if err := taint(""); err != nil {
		t.Fatal(err)
	}
	other := pod("other", "true")
	ns := namespace(t)
	if _, err := node.Client.CoreV1().Pods(ns).Create(t.Context(), other, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error { // pods without the toleration have to wait
		p, err := node.Client.CoreV1().Pods(ns).Get(t.Context(), other.Name, metav1.GetOptions{})
		if err == nil && !slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
			return c.Reason == corev1.PodReasonUnschedulable
		}) {
			err = fmt.Errorf("pod %s: %+v", p.Name, p.Status)
		}
		return err
	})
	return restore
}
