package e2e

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/pipeops/vm-agent/tests/harness"
	"github.com/pipeops/vm-agent/tests/harness/agent"
	"github.com/pipeops/vm-agent/tests/harness/cluster"
	"github.com/pipeops/vm-agent/tests/harness/controlplane"
	"github.com/pipeops/vm-agent/tests/harness/process"
)

const (
	home   = "pipeops-system"
	alice  = "pipeops:alice@example.com"
	domain = "agent.example.test" // at the operator's frps; the agent's certificate must name all of it
)

// person is a caller who works in one namespace.
type person struct {
	*installed

	config *rest.Config // through the tunnel, as is the kubeconfig
	ns     string
	frps   *ownFrps
	table  *strings.Builder // how long each end of access took
}

// TestAccess installs the agent with each identity: named behind the gateway, own and agent behind an operator's own
// frps with client certificates. It uses the node as each, and measures how long it takes until access ends.
func TestAccess(t *testing.T) {
	t.Parallel() // beside tests that use prepareBeside
	ca, next := harness.NewAuthority(t), harness.NewAuthority(t)
	i := prepare(t, func(o *controlplane.Options) {
		o.Identity = "named"
		o.Users = map[string]controlplane.User{"token-of-alice": {Name: "alice@example.com", Groups: []string{"developers"}}}
	})
	i.setting("PIPEOPS_AGENT_TOKEN_OVERLAP=0s")
	i.components("access", "guard", "named")
	i.apply()
	p := &person{installed: i, config: agent.Caller(i.cp, agentID, "token-of-alice"), table: &strings.Builder{}}
	fmt.Fprintf(p.table, "%-22s %8s %16s", "ended by", "kubelet", "new requests")
	for _, s := range running {
		fmt.Fprintf(p.table, " %12s", s.name)
	}
	defer func() {
		t.Logf("seconds until access has ended; those of the agent count from the kubelet's\n%s", p.table)
	}()
	drained := p.named()
	p.frps = startFrps(t, harness.NewGroup(t))
	p.own(ca, next)
	drained()
	p.guarded(next)
}

// named is a user of the gateway, with a RoleBinding in two namespaces. It returns what waits for the pod's end.
func (p *person) named() (drained func()) {
	t := p.t
	first, second := p.workplace("--user", alice), p.workplace("--user", alice)
	p.become(p.config, second)
	p.allow("all", "")
	p.isSeenAs(alice, `["pipeops:developers","pipeops:tunnel","system:authenticated"]`)

	// While the rights in one namespace end, those in the other do not.
	streams := p.streams()
	ended := p.ends("RoleBinding deleted", 35*time.Second, streams, func() {
		p.mustKubectl(p.admin, "-n", second, "delete", "rolebinding", "person")
	}, "", "")
	p.become(p.config, first)
	p.uses()
	others := p.streams()
	ended()
	p.goOn(others)

	const reason = "ticket OPS-7"
	p.ends("allow: none", 3*time.Second, others, func() { p.allow("none", reason) }, "", "")()
	if out, err := p.run(p.caller, "", nil, "-n", p.ns, "get", "pods"); err == nil ||
		!strings.Contains(err.Error(), "Forbidden") || !strings.Contains(err.Error(), reason) ||
		!strings.Contains(err.Error(), home+"/pipeops-agent-access") {
		t.Errorf("after allow: none: %s, %v", out, err)
	}
	p.allow("all", "")

	// A new token ends no stream: it is the gateway's, not the person's.
	streams = p.streams()
	const rotated = "another-agents-token"
	p.ends("agent's token rotated", 5*time.Second, nil, func() {
		p.mustKubectl(p.admin, "-n", home, "patch", "secret", "pipeops-agent", "-p",
			`{"data":{"token":"`+base64.StdEncoding.EncodeToString([]byte(rotated))+`"}}`)
	}, "/etc/pipeops/secret/token", rotated)()
	p.cp.SetAgent(agentID, rotated)
	p.answers()
	p.goOn(streams)
	return p.ends("pod deleted", 40*time.Second, streams, func() { // its grace period, and the kubelet's work
		p.mustKubectl(p.admin, "-n", home, "scale", "deployment/pipeops-agent", "--replicas", "0")
	}, "", "")
}

// own is a ServiceAccount, with its token and a client certificate.
func (p *person) own(ca, next *harness.Authority) {
	p.configure("own", ca, "access", "guard")
	ns := p.workplace("--serviceaccount", "default:carol")
	account, err := node.Account(p.t.Context(), "default", "carol")
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() {
		if _, err := p.run(p.admin, "", nil, "-n", "default", "delete", "serviceaccount", "carol"); err != nil {
			p.t.Error(err)
		}
	})
	p.become(p.direct(account.BearerToken, ca), ns)
	p.answers()
	p.isSeenAs("system:serviceaccount:default:carol",
		`["system:serviceaccounts","system:serviceaccounts:default","system:authenticated"]`)
	p.uses()
	name := p.mustKubectl(p.admin, "-n", home, "get", "deployment", "pipeops-agent", "-o",
		`jsonpath={.spec.template.spec.volumes[?(@.name=="tls")].secret.secretName}`)
	p.ends("client CA replaced", 5*time.Second, p.streams(), func() {
		p.mustKubectl(p.admin, "-n", home, "patch", "secret", name, "-p",
			`{"data":{"callers.crt":"`+base64.StdEncoding.EncodeToString(next.PEM)+`"}}`)
	}, "/etc/pipeops/tls/callers.crt", string(next.PEM))()
	p.become(p.direct(account.BearerToken, next), ns)
	p.answers()
}

// guarded is a caller with the agent's token, and the agent has ClusterRole edit everywhere.
func (p *person) guarded(ca *harness.Authority) {
	// frps gives the tunnel to the new pod when the old one has ended.
	p.mustKubectl(p.admin, "-n", home, "scale", "deployment/pipeops-agent", "--replicas", "0")
	p.mustKubectl(p.admin, "-n", home, "wait", "--for", "delete", "pod", "--all", "--timeout", "1m")
	p.configure("agent", ca, "access", "guard", "manage-all-namespaces")
	p.become(p.direct(agentToken, ca), p.ns)
	p.answers()
	const own, path, admission = "the agent's own namespace", "does not forward this path", "ValidatingAdmissionPolicy"
	for _, test := range []struct {
		refused string
		args    []string
	}{
		{own, []string{"-n", home, "exec", p.agentPod().Name, "-c", "frpc", "--", "/bin/busybox", "true"}},
		{own, []string{"-n", home, "create", "secret", "generic", "new", "--from-literal", "a=b"}},
		{own, []string{"-n", home, "get", "secret", "pipeops-agent"}},
		{own, []string{"-n", home, "create", "token", "pipeops-agent"}},
		{path, []string{"-n", "kube-system", "create", "token", "default"}},
		{admission, []string{"-n", "kube-system", "create", "secret", "generic", "new", "--from-literal", "a=b"}},
		{admission, []string{"create", "-f", "/dev/null", "--raw",
			"/api/v1/namespaces/kube-system/pods/none/exec?command=true&stdout=true"}},
	} {
		if test.refused == admission && !node.Supports("guard") {
			continue
		}
		if out, err := p.run(p.caller, "", nil, test.args...); err == nil || !strings.Contains(err.Error(), test.refused) {
			p.t.Errorf("kubectl %s: %s, %v, want %q", strings.Join(test.args, " "), out, err, test.refused)
		}
	}
	p.uses()
}

// isSeenAs checks who the API server takes the caller for.
func (p *person) isSeenAs(user, groups string) {
	p.t.Helper()
	if out := p.mustKubectl(p.caller, "auth", "whoami", "-o",
		"jsonpath={.status.userInfo.username} {.status.userInfo.groups}"); out != user+" "+groups {
		p.t.Errorf("the API server sees %s", out)
	}
}

// configure installs the agent with its frps's token, so that it needs no control plane.
func (p *person) configure(identity string, ca *harness.Authority, components ...string) {
	p.t.Helper()
	p.write("overlays/test/agent.env", "PIPEOPS_AGENT_ID="+agentID+"\nPIPEOPS_ACCESS_IDENTITY="+identity+
		"\nPIPEOPS_PROXY_TLS_CLIENT_CA_FILE=/etc/pipeops/tls/callers.crt\nPIPEOPS_FRP_TUNNEL_CUSTOM_DOMAINS="+domain+"\n"+
		strings.Replace(p.frps.settings, "TUNNEL_TYPE=http\n", "TUNNEL_TYPE=https\n", 1))
	p.patches = `{target: {kind: Secret, name: pipeops-agent-tls}, patch: '[
		{"op": "add", "path": "/data/callers.crt", "value": "` + base64.StdEncoding.EncodeToString(ca.PEM) + `"}]'}`
	p.components(components...)
	p.apply()
}

// workplace makes a namespace with a pod, and a RoleBinding for a subject.
func (p *person) workplace(subject ...string) string {
	p.t.Helper()
	ns := namespace(p.t)
	p.mustKubectl(p.admin, "-n", ns, "create", "role", "person", "--verb", "get,list,watch,create", "--resource",
		"pods,pods/log,pods/exec,pods/portforward")
	p.mustKubectl(p.admin, append([]string{"-n", ns, "create", "rolebinding", "person", "--role", "person"},
		subject...)...)
	create(p.t, ns, pod("talks", "mkdir /www; echo page >/www/index.html; httpd -p 8080 -h /www; "+
		"while echo talking; do sleep 0.2; done"), corev1.PodRunning)
	return ns
}

// become sets who calls, and where.
func (p *person) become(config *rest.Config, ns string) {
	p.t.Helper()
	p.config, p.ns = config, ns
	if err := cluster.WriteKubeconfig(p.caller, config); err != nil {
		p.t.Fatal(err)
	}
}

// allow sets the owner's switch. It waits until what it allows is allowed.
func (p *person) allow(level, reason string) {
	p.t.Helper()
	p.mustKubectl(p.admin, "-n", home, "patch", "configmap", "pipeops-agent-access", "-p",
		`{"data":{"allow":"`+level+`","reason":"`+reason+`"}}`)
	if level != "none" {
		p.answers()
	}
}

// uses runs the commands that the role allows, with both streaming protocols, and one that it does not.
func (p *person) uses() {
	p.t.Helper()
	p.mustKubectl(p.caller, "-n", p.ns, "get", "pods")
	for _, env := range [][]string{nil, spdy} {
		if out, err := p.run(p.caller, "there and back", env, "-n", p.ns, "exec", "-i", "talks", "--", "/bin/busybox",
			"cat"); err != nil || out != "there and back" {
			p.t.Errorf("exec with %v: %q, %v", env, out, err)
		}
		p.portForward(p.ns, "pod/talks", env)
	}
	if out, err := p.run(p.caller, "", nil, "get", "secrets", "-n", home); err == nil {
		p.t.Errorf("a caller reads Secrets: %s", out)
	}
}

var spdy = []string{"KUBECTL_REMOTE_COMMAND_WEBSOCKETS=false", "KUBECTL_PORT_FORWARD_WEBSOCKETS=false"}

// running are commands that run until they are ended, each after a first line of output.
var running = []struct {
	name string
	env  []string
	args string
}{
	{"exec", nil, "exec talks -- /bin/busybox tail -n +1 -f /www/index.html"},
	{"exec by SPDY", spdy, "exec talks -- /bin/busybox tail -n +1 -f /www/index.html"},
	{"port-forward", nil, "port-forward pod/talks :8080"},
	{"logs -f", nil, "logs -f talks"},
	{"watch", nil, "get pods -w"},
}

// stream is a kubectl that runs.
type stream struct {
	ended chan struct{}
	at    time.Time    // when it ended
	said  bytes.Buffer // then, to stderr
}

// goOn checks that no stream has ended.
func (p *person) goOn(streams []*stream) {
	p.t.Helper()
	for n, s := range streams {
		select {
		case <-s.ended:
			p.t.Errorf("%s has ended: %s", running[n].name, s.said.String())
		default:
		}
	}
}

// streams starts all that can run.
func (p *person) streams() (all []*stream) {
	p.t.Helper()
	for _, r := range running {
		s := &stream{ended: make(chan struct{})}
		cmd := p.kubectl(p.t.Context(), p.caller, r.env, append([]string{"-n", p.ns}, strings.Fields(r.args)...)...)
		cmd.Stderr = &s.said
		stdout, err := cmd.StdoutPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			p.t.Fatal(err)
		}
		out := bufio.NewReader(stdout)
		_, err = out.ReadString('\n')
		go func() {
			_, _ = io.Copy(io.Discard, out)
			_ = cmd.Wait()
			s.at = time.Now()
			close(s.ended)
		}()
		p.t.Cleanup(func() { <-s.ended }) // the test's context has ended it
		if err != nil {
			<-s.ended
			p.t.Fatalf("%s: %v: %s", r.name, err, s.said.String())
		}
		all = append(all, s)
	}
	return all
}

// ends ends access by change. If the kubelet brings the change to the agent, it gives the file this content, and the
// agent's time counts from then on. Within bound, new requests are refused, and the streams end: ends waits for
// the first, and what it returns for the second.
func (p *person) ends(how string, bound time.Duration, streams []*stream, change func(), file, content string) func() {
	t := p.t
	t.Helper()
	kubelet := "-"
	if file != "" {
		file = fmt.Sprintf("/proc/%d/root%s", pidOf(t, "proxy", p.agentPod()), file)
	}
	change()
	begin := time.Now()
	if file != "" {
		harness.Eventually(t, 2*time.Minute, func() error {
			if data, err := os.ReadFile(file); err != nil || string(data) != content {
				return fmt.Errorf("the kubelet has not written it: %w", err)
			}
			return nil
		})
		kubelet = fmt.Sprintf("%.1f", time.Since(begin).Seconds())
		begin = time.Now()
	}
	var answer string
	err := process.Poll(t.Context(), 2*bound, nil, func() error {
		if answer = p.request(); answer == "200" {
			return errors.New("requests are still answered")
		}
		return nil
	})
	refused := time.Since(begin)
	if err != nil || refused > bound {
		t.Errorf("%s: %s after %s, %v", how, answer, refused, err)
	}
	return func() {
		t.Helper()
		row := fmt.Sprintf("\n%-22s %8s %16s", how, kubelet, fmt.Sprintf("%.1f (%s)", refused.Seconds(), answer))
		late := time.After(time.Until(begin.Add(2 * bound)))
		for n, s := range streams {
			select {
			case <-s.ended:
			case <-late:
				t.Fatalf("%s: %s has not ended after %s", how, running[n].name, time.Since(begin))
			}
			took := s.at.Sub(begin)
			if took > bound {
				t.Errorf("%s: %s ended after %s: %s", how, running[n].name, took, s.said.String())
			}
			row += fmt.Sprintf(" %12.1f", took.Seconds())
		}
		for range len(running) - len(streams) {
			row += fmt.Sprintf(" %12s", "runs on")
		}
		p.table.WriteString(row)
	}
}

// request makes one request, without the retries of kubectl, and returns the status, or what else came of it.
func (p *person) request() string {
	p.t.Helper()
	client, err := rest.HTTPClientFor(p.config)
	if err != nil {
		p.t.Fatal(err)
	}
	client.Timeout = 5 * time.Second
	req, err := http.NewRequestWithContext(p.t.Context(), http.MethodGet, p.config.Host+"/api/v1/namespaces/"+p.ns+"/pods",
		nil)
	if err != nil {
		p.t.Fatal(err)
	}
	resp, err := client.Do(req)
	if err != nil {
		return "no answer"
	}
	_ = resp.Body.Close()
	return fmt.Sprint(resp.StatusCode)
}

// answers waits until the caller is answered.
func (p *person) answers() {
	p.t.Helper()
	eventually(p.t, func() error {
		if answer := p.request(); answer != "200" {
			return errors.New(answer)
		}
		return nil
	})
}

// agentPod returns the agent's pod that is not about to end.
func (p *person) agentPod() *corev1.Pod {
	p.t.Helper()
	pods, err := node.Client.CoreV1().Pods(home).List(p.t.Context(),
		metav1.ListOptions{LabelSelector: "app.kubernetes.io/name=pipeops-agent"})
	if err != nil {
		p.t.Fatal(err)
	}
	n := slices.IndexFunc(pods.Items, func(pod corev1.Pod) bool { return pod.DeletionTimestamp == nil })
	if n < 0 {
		p.t.Fatal("the agent has no pod")
	}
	return &pods.Items[n]
}

// direct returns a configuration that speaks TLS with the agent itself, and trusts the certificate in its pod.
func (p *person) direct(token string, ca *harness.Authority) *rest.Config {
	p.t.Helper()
	trusted, err := os.ReadFile(fmt.Sprintf("/proc/%d/root/var/run/pipeops/tls.crt", pidOf(p.t, "proxy", p.agentPod())))
	if err != nil {
		p.t.Fatal(err)
	}
	config := &rest.Config{Host: p.frps.tlsCallers + "/api/k8s", BearerToken: token,
		TLSClientConfig: rest.TLSClientConfig{ServerName: domain, CAData: trusted}}
	config.CertData, config.KeyData = ca.Client(p.t, "carol")
	return config
}
