package integration

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	clientauthenticationv1 "k8s.io/client-go/pkg/apis/clientauthentication/v1"
	"k8s.io/client-go/rest"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/pipeops/vm-agent/frpc"
	"github.com/pipeops/vm-agent/tests/harness"
	"github.com/pipeops/vm-agent/tests/harness/agent"
	"github.com/pipeops/vm-agent/tests/harness/cluster"
	"github.com/pipeops/vm-agent/tests/harness/controlplane"
)

// The cluster roles of these tests.
const (
	agentRole   = "access-agent"   // of agents, everywhere
	homeRole    = "access-home"    // of agents, in their own namespace
	callerRole  = "access-caller"  // of callers, in the namespace of the test
	watchedRole = "access-watched" // of those who watch ServiceAccounts in that namespace
)

// accessRoles makes the roles once.
var accessRoles = sync.OnceValue(func() error {
	rule := func(resources string, verbs ...string) rbacv1.PolicyRule {
		return rbacv1.PolicyRule{APIGroups: []string{""}, Resources: strings.Fields(resources), Verbs: verbs}
	}
	for name, rules := range map[string][]rbacv1.PolicyRule{
		agentRole: {rule("users groups", "impersonate"),
			rule("configmaps namespaces pods pods/log pods/exec pods/portforward services services/proxy", "*")},
		homeRole: {rule("secrets", "*")},
		callerRole: {rule("configmaps", "*"),
			rule("pods pods/log pods/exec pods/portforward", "get", "create")},
		watchedRole: {rule("serviceaccounts", "list", "watch")},
	} {
		role := &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: name}, Rules: rules}
		if _, err := api.Client.RbacV1().ClusterRoles().Create(context.Background(), role,
			metav1.CreateOptions{}); err != nil {
			return err
		}
	}
	return nil
})

// accessWorld is a world with an agent that has a namespace and a ServiceAccount of its own, and two users: alice of
// the group staff, who has callerRole in ns, and bob, who has no rights. For identity named they are users of the
// gateway, for own they are ServiceAccounts in ns.
type accessWorld struct {
	*world

	identity string
	home, ns string            // the agent's namespace, and that of the callers' objects
	tokens   map[string]string // of the users, for the gateway
}

// newAccessWorld prepares such a world. Its agent is not started.
func newAccessWorld(t *testing.T, identity string, env ...string) *accessWorld {
	t.Helper()
	if err := accessRoles(); err != nil {
		t.Fatal(err)
	}
	w := &accessWorld{identity: identity, tokens: map[string]string{"alice": agentToken, "bob": agentToken}}
	if identity == "named" {
		w.tokens = map[string]string{"alice": "token-of-alice", "bob": "token-of-bob"}
	}
	w.world = newWorld(t, func(o *controlplane.Options) {
		o.Identity = identity
		o.Users = map[string]controlplane.User{"token-of-alice": {Name: "alice", Groups: []string{"staff"}},
			"token-of-bob": {Name: "bob"}}
	})
	w.home, w.ns = w.namespace(), w.namespace()
	credential := w.account(w.home, "agent")
	for ns, role := range map[string]string{"": agentRole, w.home: homeRole} {
		w.bind(ns, role, w.subject("agent"))
	}
	w.bind(w.ns, callerRole, w.subject("alice"))
	if identity == "own" {
		for user := range w.tokens {
			w.tokens[user] = w.account(w.ns, user).BearerToken
		}
	}
	w.token = w.tokens["alice"]
	if err := agent.WriteCaller(w.caller, w.cp, agentID, w.token); err != nil {
		t.Fatal(err)
	}
	w.agent.Env = append(w.agent.Env, "KUBECONFIG="+w.kubeconfigOf(credential), "PIPEOPS_NAMESPACE="+w.home,
		"PIPEOPS_ACCESS_IDENTITY="+identity)
	w.agent.Env = append(w.agent.Env, env...)
	return w
}

// connectedAs returns an accessWorld whose agent is ready.
func connectedAs(t *testing.T, identity string, env ...string) *accessWorld {
	t.Helper()
	w := newAccessWorld(t, identity, env...)
	w.startAgent()
	return w
}

func (w *accessWorld) account(namespace, name string) *rest.Config {
	w.t.Helper()
	config, err := api.Account(w.t.Context(), namespace, name)
	if err != nil {
		w.t.Fatal(err)
	}
	return config
}

// subject returns the agent or a user as RBAC names it.
func (w *accessWorld) subject(name string) rbacv1.Subject {
	switch {
	case name == "agent" || w.identity == "agent":
		return rbacv1.Subject{Kind: "ServiceAccount", Namespace: w.home, Name: "agent"}
	case w.identity == "named":
		return rbacv1.Subject{Kind: "User", Name: "pipeops:" + name}
	}
	return rbacv1.Subject{Kind: "ServiceAccount", Namespace: w.ns, Name: name}
}

// username returns the name by which the API server knows a user.
func (w *accessWorld) username(name string) string {
	if s := w.subject(name); s.Kind == "ServiceAccount" {
		return "system:serviceaccount:" + s.Namespace + ":" + s.Name
	}
	return "pipeops:" + name
}

func (w *accessWorld) bind(namespace, role string, subjects ...rbacv1.Subject) {
	w.t.Helper()
	if err := api.Bind(w.t.Context(), namespace, role, subjects...); err != nil {
		w.t.Fatal(err)
	}
}

// clientOf returns a client of a user, through the gateway.
func (w *accessWorld) clientOf(user string) *kubernetes.Clientset {
	w.t.Helper()
	config := agent.Caller(w.cp, agentID, w.tokens[user])
	config.QPS = -1
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		w.t.Fatal(err)
	}
	return client
}

// header returns what a gateway sends for a user.
func (w *accessWorld) header(user string) http.Header {
	gate := "Bearer " + agentToken
	switch w.identity {
	case "named":
		return http.Header{"Authorization": {gate}, "Impersonate-User": {user}, "Impersonate-Group": {"staff"}}
	case "own":
		return http.Header{"Authorization": {"Bearer " + w.tokens[user]}, "Pipeops-Agent-Authorization": {gate}}
	}
	return http.Header{"Authorization": {gate}}
}

// call sends a request of alice to the tunnel listener, as a gateway does. It returns the status and the body.
func (w *accessWorld) call(method, path, body string) (int, string) {
	w.t.Helper()
	header := w.header("alice")
	header.Set("Content-Type", "application/json")
	resp, answer := exchange(w.t, asItIs, method, w.agent.Tunnel+path, header, body)
	return resp.StatusCode, answer
}

// writeSwitch writes the owner's ConfigMap, key=value each.
func writeSwitch(t *testing.T, client kubernetes.Interface, namespace string, data ...string) {
	t.Helper()
	object := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "access"}, Data: map[string]string{}}
	for _, pair := range data {
		key, value, _ := strings.Cut(pair, "=")
		object.Data[key] = value
	}
	_, err := client.CoreV1().ConfigMaps(namespace).Create(t.Context(), object, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		_, err = client.CoreV1().ConfigMaps(namespace).Update(t.Context(), object, metav1.UpdateOptions{})
	}
	if err != nil {
		t.Fatal(err)
	}
}

// wantSwitch writes the owner's ConfigMap and waits until the agent reports the level.
func (w *accessWorld) wantSwitch(level string, data ...string) {
	w.t.Helper()
	writeSwitch(w.t, api.Client, w.home, data...)
	w.wantLevel(level)
}

// wantLevel waits until the agent reports the level.
func (w *accessWorld) wantLevel(level string) {
	w.t.Helper()
	wantMetric(w.t, w.agent, fmt.Sprintf("pipeops_agent_access_allow{level=%q} 1", level))
}

// reached returns what the API server's audit log says about a request with this id.
func reached(t *testing.T, id string) []cluster.AuditEvent {
	t.Helper()
	events, err := api.Audit(func(e cluster.AuditEvent) bool { return e.AuditID == id })
	if err != nil {
		t.Fatal(err)
	}
	return events
}

const whoAmI = "/api/k8s/apis/authentication.k8s.io/v1/selfsubjectreviews"

// whoIs asks the API server who a caller is.
func whoIs(t *testing.T, client *http.Client, base string, header http.Header) (authenticationv1.UserInfo, string) {
	t.Helper()
	header = header.Clone()
	header.Set("Content-Type", "application/json")
	_, body := exchange(t, client, http.MethodPost, base+whoAmI, header,
		`{"apiVersion":"authentication.k8s.io/v1","kind":"SelfSubjectReview"}`)
	var review authenticationv1.SelfSubjectReview
	_ = json.Unmarshal([]byte(body), &review) // the caller compares
	return review.Status.UserInfo, body
}

// TestTheAPIServerSeesWhoCalls makes the same requests for each identity, through each type of tunnel, with the agent's
// token and with a client certificate for a gate. A request without the gate does not reach the API server.
func TestTheAPIServerSeesWhoCalls(t *testing.T) {
	t.Parallel()
	ca := harness.NewAuthority(t)
	for _, identity := range []string{"agent", "named", "own"} {
		for _, way := range []string{"http", "https", "tcp", "https with a certificate"} {
			t.Run(identity+" by "+way, func(t *testing.T) {
				t.Parallel()
				tunnel, _, certified := strings.Cut(way, " ")
				w := newAccessWorld(t, identity)
				s := newOwnServer(t, w.world, true, "")
				w.agent.Env = append(w.agent.Env, "PIPEOPS_FRP_TOKEN=the-right-token", "PIPEOPS_FRP_TUNNEL_TYPE="+tunnel,
					fmt.Sprintf("PIPEOPS_FRP_SERVER_PORT=%d", s.bind))
				port, base, transport := s.http, "http://"+agentID+".example.internal", &http.Transport{}
				switch tunnel {
				case "tcp":
					port = s.tcp
					w.agent.Env = append(w.agent.Env, fmt.Sprintf("PIPEOPS_FRP_TUNNEL_REMOTE_PORT=%d", s.tcp))
				case "https":
					port, base = s.https, "https://agent.example.test"
					w.agent.Env = append(w.agent.Env, "PIPEOPS_FRP_TUNNEL_CUSTOM_DOMAINS=agent.example.test")
				}
				if certified {
					w.agent.Env = append(w.agent.Env, "PIPEOPS_PROXY_TLS_CLIENT_CA_FILE="+writeFile(t, "ca.crt", ca.PEM))
				}
				w.startAgent()
				if tunnel == "https" {
					transport.TLSClientConfig = w.trusting(certified, ca)
				}
				transport.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
					return (&net.Dialer{}).DialContext(ctx, "tcp", fmt.Sprintf("127.0.0.1:%d", port))
				}
				t.Cleanup(transport.CloseIdleConnections)
				w.seesWhoCalls(t, &http.Client{Transport: transport}, base, certified)
			})
		}
	}
}

// trusting returns a configuration of TLS with the agent, with a certificate of ca if it is wanted.
func (w *accessWorld) trusting(certified bool, ca *harness.Authority) *tls.Config {
	w.t.Helper()
	config := &tls.Config{RootCAs: x509.NewCertPool(), MinVersion: tls.VersionTLS12}
	config.RootCAs.AppendCertsFromPEM([]byte(w.file(frpc.CertFile)))
	if certified {
		config.Certificates = []tls.Certificate{ca.Pair(w.t, "gateway")}
	}
	return config
}

func (w *accessWorld) seesWhoCalls(t *testing.T, client *http.Client, base string, certified bool) {
	t.Helper()
	header := w.header("alice")
	if certified {
		header.Del("Pipeops-Agent-Authorization") // the certificate is the gate
	}
	user, body := whoIs(t, client, base, header)
	groups := map[string][]string{"agent": {"system:serviceaccounts:" + w.home},
		"named": {"pipeops:staff", "pipeops:tunnel"}, "own": {"system:serviceaccounts:" + w.ns}}[w.identity]
	if user.Username != w.username("alice") || slices.ContainsFunc(groups, func(g string) bool {
		return !slices.Contains(user.Groups, g)
	}) {
		t.Errorf("the API server sees %+v, want %s of %v: %s", user, w.username("alice"), groups, body)
	}
	inNamespace := base + "/api/k8s/api/v1/namespaces/" + w.ns
	if resp, body := get(t, client, inNamespace+"/configmaps", header); resp.StatusCode != http.StatusOK {
		t.Errorf("what RBAC allows: %s: %s", resp.Status, body)
	}
	if resp, body := get(t, client, inNamespace+"/secrets", header); resp.StatusCode != http.StatusForbidden ||
		!strings.Contains(body, w.username("alice")) || len(reached(t, resp.Header.Get("X-Request-Id"))) == 0 {
		t.Errorf("what RBAC forbids: %s: %s", resp.Status, body)
	}
	wrong, none := header.Clone(), header.Clone()
	gate := "Authorization" // a certificate alone does not stand for the agent's token or the caller's credential
	if w.identity == "own" && !certified {
		gate = "Pipeops-Agent-Authorization"
	}
	none.Del(gate)
	refused := map[string]http.Header{"without a credential": none}
	if w.identity != "own" || !certified {
		wrong.Set(gate, "Bearer wrong")
		refused["with a wrong token"] = wrong
	}
	for what, header := range refused {
		resp, body := get(t, client, inNamespace+"/configmaps", header)
		if resp.StatusCode != http.StatusUnauthorized || !strings.Contains(body, "the agent refuses the request: ") ||
			len(reached(t, resp.Header.Get("X-Request-Id"))) > 0 {
			t.Errorf("%s: %s: %s, audit: %v", what, resp.Status, body, reached(t, resp.Header.Get("X-Request-Id")))
		}
	}
}

// TestClientCertificatesNeedAnHTTPSTunnel checks that an agent does not start where the CA would be without effect.
func TestClientCertificatesNeedAnHTTPSTunnel(t *testing.T) {
	t.Parallel()
	for _, tunnel := range []string{"http", "tcp"} {
		w := newWorld(t)
		w.agent.Env = append(w.agent.Env, "PIPEOPS_FRP_TUNNEL_TYPE="+tunnel,
			"PIPEOPS_PROXY_TLS_CLIENT_CA_FILE="+writeFile(t, "ca.crt", harness.NewAuthority(t).PEM))
		p, err := w.agent.Once()
		if err != nil {
			t.Fatal(err)
		}
		if code := p.ExitCode(); code != 2 || !strings.Contains(p.Log(), "proxy.tls.client_ca_file") {
			t.Errorf("%s: exit code %d:\n%s", tunnel, code, p.Log())
		}
	}
}

// writeFile writes a file that ends with the test, and returns its path.
func writeFile(t *testing.T, name string, data []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestKubectlActsAsTheNamedUser runs kubectl as users of a gateway. RBAC decides by their names, whatever they claim.
func TestKubectlActsAsTheNamedUser(t *testing.T) {
	t.Parallel()
	w := connectedAs(t, "named")
	runningPod(t, w.ns)
	got := w.mustKubectl("auth", "whoami", "-o", "jsonpath={.status.userInfo.username} {.status.userInfo.groups}")
	if got != `pipeops:alice ["pipeops:staff","pipeops:tunnel","system:authenticated"]` {
		t.Errorf("whoami: %s", got)
	}
	if got := w.mustKubectl("auth", "whoami", "--as", "root", "--as-group", "system:masters", "-o",
		"jsonpath={.status.userInfo.username}"); got != "pipeops:alice" {
		t.Errorf("whoami --as root: %s", got)
	}
	eachProtocol(t, w.world, func(t *testing.T) {
		if r := w.kubectl(w.caller, "in", "exec", "-i", "pod", "-n", w.ns, "--", "cat"); r.Stdout != "in" || r.Code != 0 {
			t.Errorf("exec: %+v", r)
		}
	})
	for user, allowed := range map[string]bool{"alice": true, "bob": false} {
		_, err := w.clientOf(user).CoreV1().ConfigMaps(w.ns).List(t.Context(), metav1.ListOptions{})
		if (err == nil) != allowed || err != nil && !strings.Contains(err.Error(), `User "pipeops:`+user+`"`) {
			t.Errorf("%s: %v", user, err)
		}
	}
	stranger := filepath.Join(w.group.Dir(), "stranger")
	if err := agent.WriteCaller(stranger, w.cp, agentID, agentToken); err != nil {
		t.Fatal(err)
	}
	if r := w.kubectl(stranger, "", "get", "--raw", "/api"); r.Code == 0 || !strings.Contains(r.Stderr, "knows no user") {
		t.Errorf("the agent's token is no user's: %+v", r)
	}
	// What knows no user is for those who have the agent's token: the gateway lends it to nobody there.
	config := agent.Caller(w.cp, agentID, "")
	client, err := rest.HTTPClientFor(config)
	if err != nil {
		t.Fatal(err)
	}
	base := strings.TrimSuffix(config.Host, "/api/k8s")
	for path, method := range map[string]string{"/metrics": http.MethodGet, "/api/agent/status": http.MethodGet,
		"/api/control-plane/message": http.MethodPost, "/api/runners/r1/command": http.MethodPost} {
		for token, allowed := range map[string]bool{w.tokens["alice"]: false, agentToken: true} {
			resp, body := exchange(t, client, method, base+path, http.Header{"Authorization": {"Bearer " + token}}, "{}")
			if refused := resp.StatusCode == http.StatusUnauthorized; refused == allowed {
				t.Errorf("%s, with the agent's token: %v: %s: %s", path, allowed, resp.Status, body)
			}
		}
	}
}

// TestKubectlUsesItsOwnCredential runs kubectl with a client certificate for the agent and a token for the API server
// in one kubeconfig, with nothing but frps in between.
func TestKubectlUsesItsOwnCredential(t *testing.T) {
	t.Parallel()
	ca := harness.NewAuthority(t)
	w := connectedAs(t, "own", "PIPEOPS_PROXY_TLS_CLIENT_CA_FILE="+writeFile(t, "ca.crt", ca.PEM))
	runningPod(t, w.ns)
	w.bind("", agentRole, w.subject("alice")) // which lets her impersonate
	addr, _ := w.cp.Direct(agentID)
	config := &rest.Config{Host: "https://" + addr + "/api/k8s", BearerToken: w.tokens["alice"]}
	config.CertData, config.KeyData = ca.Client(t, "alice")
	config.CAData, config.ServerName = []byte(w.file(frpc.CertFile)), agentID+".agents-tls.internal"
	if err := cluster.WriteKubeconfig(w.caller, config); err != nil {
		t.Fatal(err)
	}
	who := []string{"auth", "whoami", "-o", "jsonpath={.status.userInfo.username}"}
	if got := w.mustKubectl(who...); got != w.username("alice") {
		t.Errorf("whoami: %s", got)
	}
	if got := w.mustKubectl(append(who, "--as", "jane")...); got != "jane" {
		t.Errorf("whoami --as jane: %s", got)
	}
	eachProtocol(t, w.world, func(t *testing.T) {
		if r := w.kubectl(w.caller, "in", "exec", "-i", "pod", "-n", w.ns, "--", "cat"); r.Stdout != "in" || r.Code != 0 {
			t.Errorf("exec: %+v", r)
		}
	})

	config.BearerToken = "garbage"
	wantAPIServers401(t, config)
	if err := api.Client.CoreV1().ServiceAccounts(w.ns).Delete(t.Context(), "bob", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	config.BearerToken = w.tokens["bob"]
	wantAPIServers401(t, config)
	if log := w.agent.Proxy.Log(); !strings.Contains(log, `"user":"`+w.username("alice")+`"`) ||
		strings.Contains(log, `"user":"`+w.username("bob")+`"`) {
		t.Error("the log does not name the user whom the API server has accepted, or names the other")
	}

	// The API server lets anonymous callers read its version: the agent does not make a caller anonymous.
	config.BearerToken = ""
	client, err := rest.HTTPClientFor(config)
	if err != nil {
		t.Fatal(err)
	}
	resp, body := get(t, client, config.Host+"/version", nil)
	if resp.StatusCode != http.StatusUnauthorized || !strings.Contains(body, "the agent refuses the request: ") {
		t.Errorf("no credential: %s: %s", resp.Status, body)
	}

	// A plugin's first token is stale. client-go asks for another after the API server's 401. The plugin must give the
	// certificate too: client-go runs no plugin for a user who has one.
	credential := func(token string) string {
		data, err := json.Marshal(clientauthenticationv1.ExecCredential{
			TypeMeta: metav1.TypeMeta{APIVersion: "client.authentication.k8s.io/v1", Kind: "ExecCredential"},
			Status: &clientauthenticationv1.ExecCredentialStatus{Token: token,
				ClientCertificateData: string(config.CertData), ClientKeyData: string(config.KeyData)}})
		if err != nil {
			t.Fatal(err)
		}
		return writeFile(t, "credential", data)
	}
	script := fmt.Sprintf("cat $([ -e %s ] && echo %s || echo %s); touch %[1]s", filepath.Join(t.TempDir(), "called"),
		credential(w.tokens["alice"]), credential("stale"))
	config.CertData, config.KeyData = nil, nil
	config.ExecProvider = &clientcmdapi.ExecConfig{APIVersion: "client.authentication.k8s.io/v1", Command: "sh",
		Args: []string{"-c", script}, InteractiveMode: clientcmdapi.NeverExecInteractiveMode}
	refreshed, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	for i, refused := range []bool{true, false} {
		_, err := refreshed.CoreV1().ConfigMaps(w.ns).List(t.Context(), metav1.ListOptions{})
		if apierrors.IsUnauthorized(err) != refused || !refused && err != nil {
			t.Errorf("request %d with the plugin: %v", i, err)
		}
	}
}

// wantAPIServers401 expects that the API server, not the agent, refuses a credential.
func wantAPIServers401(t *testing.T, config *rest.Config) {
	t.Helper()
	client, err := rest.HTTPClientFor(config)
	if err != nil {
		t.Fatal(err)
	}
	resp, body := get(t, client, config.Host+"/api/v1/namespaces", nil)
	if resp.StatusCode != http.StatusUnauthorized || !strings.Contains(body, `"message":"Unauthorized"`) {
		t.Errorf("%s: %s", resp.Status, body)
	}
	if seen := reached(t, resp.Header.Get("X-Request-Id")); len(seen) != 1 || seen[0].ResponseStatus.Code != 401 {
		t.Errorf("audit: %+v", seen)
	}
}

// TestLogsAreJoinedByID compares the agent's log line of a request with the API server's audit event.
func TestLogsAreJoinedByID(t *testing.T) {
	t.Parallel()
	w := connectedAs(t, "named")
	create(t, w.ns, "joined", 1)
	w.mustKubectl("label", "configmap", "joined-0", "-n", w.ns, "a=b")
	var line struct {
		RequestID                                      string `json:"request_id"`
		Verb, Resource, Namespace, Name, User, Outcome string
		Groups                                         any
	}
	eventually(t, func() error {
		for text := range strings.Lines(w.agent.Proxy.Log()) {
			if strings.Contains(text, `"msg":"request"`) && strings.Contains(text, `"verb":"patch"`) {
				return json.Unmarshal([]byte(text), &line)
			}
		}
		return errors.New("no line")
	})
	seen := reached(t, line.RequestID)
	if len(seen) != 1 {
		t.Fatalf("audit events with the id of %+v: %+v", line, seen)
	}
	event := seen[0]
	audit := []string{event.Verb, event.ObjectRef.Resource, event.ObjectRef.Namespace, event.ObjectRef.Name,
		event.ImpersonatedUser.Username}
	logged := []string{line.Verb, line.Resource, line.Namespace, line.Name, line.User}
	if !slices.Equal(logged, audit) || line.Outcome != "forwarded" ||
		!strings.Contains(fmt.Sprint(line.Groups), "staff") || event.User.Username != w.username("agent") {
		t.Errorf("the agent logs %v (%+v), the API server %v by %s", logged, line, audit, event.User.Username)
	}
}

// running is a stream that a caller reads to its end.
type running struct {
	ended chan struct{}
	read  []byte // to be looked at after the end
	err   error
}

// open opens a stream at the tunnel listener, and waits for the headers of the answer.
func (w *accessWorld) open(path string, header http.Header) *running {
	w.t.Helper()
	return w.through(http.DefaultClient, w.agent.Tunnel, path, header)
}

// through does too, on another way.
func (w *accessWorld) through(client *http.Client, base, path string, header http.Header) *running {
	w.t.Helper()
	req, err := http.NewRequestWithContext(w.t.Context(), http.MethodGet, base+path, nil)
	if err != nil {
		w.t.Fatal(err)
	}
	req.Header = header
	resp, err := (&http.Client{Transport: client.Transport}).Do(req) // without its timeout
	if err != nil {
		w.t.Fatal(err)
	}
	if resp.StatusCode != http.StatusOK {
		body, _ := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		w.t.Fatalf("%s: %s: %s", path, resp.Status, body)
	}
	r := &running{ended: make(chan struct{})}
	go func() {
		defer close(r.ended)
		defer func() { _ = resp.Body.Close() }()
		r.read, r.err = io.ReadAll(resp.Body)
	}()
	return r
}

// wantEnd waits for a stream's end. A clean end has no error.
func (r *running) wantEnd(t *testing.T, what string, clean bool) {
	t.Helper()
	eventually(t, func() error {
		if runs(r.ended) {
			return fmt.Errorf("%s still runs", what)
		}
		return nil
	})
	if clean && r.err != nil {
		t.Errorf("%s: %v after %.300s", what, r.err, r.read)
	}
}
