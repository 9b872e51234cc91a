// Package cluster runs a real Kubernetes: etcd and kube-apiserver as processes on loopback, without root; or a whole
// node in namespaces of its own, with root.
package cluster

import (
	"context"
	"crypto/rand"
	_ "embed"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	"k8s.io/client-go/util/keyutil"

	"github.com/pipeops/vm-agent/tests/harness/process"
)

// serviceRange is the range of Service addresses. The first is the API server's own.
const serviceRange = "10.96.0.0/16"

// Files in the directory of a cluster.
const (
	serviceAccountKey = "service-account.key"
	serverCertificate = "certs/apiserver.crt" // the API server makes it
)

// PrometheusOperatorKinds are manifests of the custom resources that manifests/components/monitoring uses.
//
//go:embed prometheus-operator.yaml
var PrometheusOperatorKinds string

// RestrictedV2 are admission policies that do to pods in the agent's namespace what OpenShift does.
//
//go:embed openshift.yaml
var RestrictedV2 string

// OpenShiftUser is the user that RestrictedV2 gives to pods.
const OpenShiftUser = 1000660000

// Cluster is a running API server.
type Cluster struct {
	Config *rest.Config // as an administrator
	Client kubernetes.Interface

	Etcd, APIServer *process.Process

	auditLog string // path
	minor    int    // of the API server's version, 1.minor
}

// needs maps what needs a newer Kubernetes than the agent itself to the minor version that it needs. Only `make matrix`
// has older ones.
var needs = map[string]int{
	"WebSocket":         30, // exec and attach by kubectl, with SPDY before
	"guard":             30, // ValidatingAdmissionPolicy
	"named-constrained": 36, // constrained impersonation
	"RestrictedV2":      36, // MutatingAdmissionPolicy
}

// Supports reports whether the API server is new enough for what needs lists; all else is supported. It panics rather
// than let a test of the pinned version be left out.
func (c *Cluster) Supports(name string) bool {
	if c.minor >= needs[name] {
		return true
	}
	if os.Getenv(process.PartsDir) == "" {
		panic(fmt.Sprintf("%s needs Kubernetes 1.%d, the tests run 1.%d", name, needs[name], c.minor))
	}
	return false
}

// Start starts etcd and the API server in the group and waits until they are ready.
func Start(ctx context.Context, group *process.Group) (*Cluster, error) {
	dir, err := group.Mkdir("cluster")
	if err != nil {
		return nil, err
	}
	serverURL, err := freeURL("https")
	if err != nil {
		return nil, err
	}
	policy, auditLog := filepath.Join(dir, "audit.yaml"), filepath.Join(dir, "audit.jsonl")
	if err := os.WriteFile(policy, []byte(auditPolicy), 0o600); err != nil {
		return nil, err
	}
	s := &site{group: group, dir: dir, serverURL: serverURL}
	c, err := s.startCluster(ctx,
		"--endpoint-reconciler-type", "none", // there is no Service to keep for a server on loopback
		"--audit-policy-file", policy, "--audit-log-path", auditLog,
		// No controller makes ServiceAccounts for namespaces: pods must do without.
		"--disable-admission-plugins", "ServiceAccount")
	if err == nil {
		c.auditLog = auditLog
	}
	return c, err
}

// site is the place where the processes of a cluster run.
type site struct {
	group     *process.Group
	dir       string
	prefix    string   // of the names of its processes
	serverURL string   // of the API server
	enter     []string // the command that leads there, unless it is here
	tokens    []string // the lines of the API server's token file
	parts     []part   // all that was started
}

type part struct {
	name string
	*process.Process
}

// start starts a program that make has built.
func (s *site) start(name string, args ...string) (*process.Process, error) {
	binary, err := process.Binary(name)
	if err != nil {
		return nil, err
	}
	return s.run(name, binary, args...)
}

// run starts any program.
func (s *site) run(name, binary string, args ...string) (*process.Process, error) {
	command := slices.Concat(s.enter, []string{binary}, args)
	p, err := s.group.Start(s.prefix+name, nil, command[0], command[1:]...)
	if err == nil {
		s.parts = append(s.parts, part{s.prefix + name, p})
	}
	return p, err
}

// user adds a user, before the API server starts, and returns its token.
func (s *site) user(name string, group ...string) string {
	token := rand.Text()
	s.tokens = append(s.tokens, strings.Join(append([]string{token, name, name}, group...), ","))
	return token
}

func (s *site) startCluster(ctx context.Context, serverArgs ...string) (*Cluster, error) {
	etcd, etcdURL, err := s.startEtcd()
	if err == nil && s.enter == nil { // on a busy machine, it may take longer than the 20 s that the API server waits
		listening := func() error { return process.Listening(strings.TrimPrefix(etcdURL, "http://")) }
		err = process.Poll(ctx, 2*time.Minute, etcd.Done(), listening)
	}
	if err != nil {
		return nil, err
	}
	c, err := s.startAPIServer(ctx, append(serverArgs, "--etcd-servers", etcdURL))
	if err != nil {
		return nil, err
	}
	c.Etcd = etcd
	return c, nil
}

func (s *site) startEtcd() (*process.Process, string, error) {
	clientURL, err := freeURL("http")
	if err != nil {
		return nil, "", err
	}
	peerURL, err := freeURL("http")
	if err != nil {
		return nil, "", err
	}
	etcd, err := s.start("etcd",
		"--data-dir", filepath.Join(s.dir, "etcd"),
		"--listen-client-urls", clientURL, "--advertise-client-urls", clientURL,
		"--listen-peer-urls", peerURL, "--initial-advertise-peer-urls", peerURL, "--initial-cluster", "default="+peerURL,
		"--unsafe-no-fsync", "--log-level", "warn")
	return etcd, clientURL, err
}

func (s *site) startAPIServer(ctx context.Context, args []string) (*Cluster, error) {
	host, port, err := net.SplitHostPort(strings.TrimPrefix(s.serverURL, "https://"))
	if err != nil {
		return nil, err
	}
	key := filepath.Join(s.dir, serviceAccountKey)
	if _, _, err := keyutil.LoadOrGenerateKeyFile(key); err != nil {
		return nil, err
	}
	token := s.user("admin", "system:masters")
	tokens := filepath.Join(s.dir, "tokens.csv")
	if err := os.WriteFile(tokens, []byte(strings.Join(s.tokens, "\n")), 0o600); err != nil {
		return nil, err
	}
	certificate := filepath.Join(s.dir, serverCertificate)
	server, err := s.start("kube-apiserver", append(args,
		"--bind-address", host, "--advertise-address", host, "--secure-port", port,
		"--cert-dir", filepath.Dir(certificate),
		"--token-auth-file", tokens, "--authorization-mode", "Node,RBAC",
		"--service-account-issuer", "https://kubernetes.default.svc",
		"--service-account-key-file", key, "--service-account-signing-key-file", key,
		"--service-cluster-ip-range", serviceRange, "--allow-privileged",
		"--kubelet-preferred-address-types", "InternalIP")...)
	if err != nil {
		return nil, err
	}
	c := &Cluster{APIServer: server, Config: &rest.Config{Host: s.serverURL, BearerToken: token, QPS: -1}}
	err = process.Poll(ctx, 2*time.Minute, server.Done(), func() (err error) {
		// Read anew each time: the API server makes it while it starts, and it may not be whole yet.
		if c.Config.CAData, err = os.ReadFile(certificate); err != nil {
			return err
		}
		if c.Client, err = kubernetes.NewForConfig(c.Config); err != nil {
			return err
		}
		if err = c.Client.Discovery().RESTClient().Get().AbsPath("/readyz").Do(ctx).Error(); err != nil {
			return err
		}
		version, err := c.Client.Discovery().ServerVersion()
		if err != nil {
			return err
		}
		c.minor, err = strconv.Atoi(version.Minor)
		return err
	})
	if err != nil {
		select {
		case <-server.Done():
			return nil, server.Failed()
		default:
			return nil, fmt.Errorf("kube-apiserver is not ready: %w", err)
		}
	}
	return c, nil
}

// Account makes a ServiceAccount without rights, and its namespace if there is none. It returns a configuration that
// acts as it, with a token from the API server.
func (c *Cluster) Account(ctx context.Context, namespace, name string) (*rest.Config, error) {
	_, err := c.Client.CoreV1().Namespaces().Create(ctx,
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return nil, err
	}
	account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: name}}
	if _, err := c.Client.CoreV1().ServiceAccounts(namespace).Create(ctx, account, metav1.CreateOptions{}); err != nil &&
		!apierrors.IsAlreadyExists(err) {
		return nil, err
	}
	config := rest.CopyConfig(c.Config)
	config.BearerToken, err = c.Token(ctx, namespace, name, 24*time.Hour, nil)
	return config, err
}

// Token returns a token of a ServiceAccount, which lives for 10 minutes at least. bound may be nil: else the token ends
// with that object.
func (c *Cluster) Token(ctx context.Context, namespace, name string, life time.Duration,
	bound *authenticationv1.BoundObjectReference) (string, error) {
	seconds := int64(life.Seconds())
	request := &authenticationv1.TokenRequest{
		Spec: authenticationv1.TokenRequestSpec{ExpirationSeconds: &seconds, BoundObjectRef: bound}}
	answer, err := c.Client.CoreV1().ServiceAccounts(namespace).CreateToken(ctx, name, request, metav1.CreateOptions{})
	if err != nil {
		return "", err
	}
	return answer.Status.Token, nil
}

// ServiceAccount makes a ServiceAccount with a cluster role, and returns a configuration that acts as it.
func (c *Cluster) ServiceAccount(ctx context.Context, namespace, name, clusterRole string) (*rest.Config, error) {
	config, err := c.Account(ctx, namespace, name)
	if err != nil {
		return nil, err
	}
	return config, c.Bind(ctx, "", clusterRole, rbacv1.Subject{Kind: "ServiceAccount", Namespace: namespace, Name: name})
}

// Bind gives subjects the rights of a cluster role: in a namespace, by a RoleBinding with the role's name, or
// everywhere if namespace is empty.
func (c *Cluster) Bind(ctx context.Context, namespace, clusterRole string, subjects ...rbacv1.Subject) error {
	ref := rbacv1.RoleRef{APIGroup: "rbac.authorization.k8s.io", Kind: "ClusterRole", Name: clusterRole}
	for i := range subjects {
		if subjects[i].Kind != "ServiceAccount" {
			subjects[i].APIGroup = ref.APIGroup
		}
	}
	var err error
	if namespace == "" {
		_, err = c.Client.RbacV1().ClusterRoleBindings().Create(ctx, &rbacv1.ClusterRoleBinding{
			ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("%s-%s-%s", subjects[0].Namespace, subjects[0].Name,
				strings.ReplaceAll(clusterRole, ":", "-"))},
			Subjects: subjects, RoleRef: ref}, metav1.CreateOptions{})
	} else {
		_, err = c.Client.RbacV1().RoleBindings(namespace).Create(ctx, &rbacv1.RoleBinding{
			ObjectMeta: metav1.ObjectMeta{Name: clusterRole}, Subjects: subjects, RoleRef: ref}, metav1.CreateOptions{})
	}
	if apierrors.IsAlreadyExists(err) {
		return nil
	}
	return err
}

// AgentNamespace and AgentAccount name the agent's ServiceAccount.
const AgentNamespace, AgentAccount = "pipeops-system", "pipeops-agent"

// WriteAgentKubeconfig writes the agent's kubeconfig and returns the same as a configuration. The agent acts as a
// ServiceAccount with cluster-admin.
func (c *Cluster) WriteAgentKubeconfig(ctx context.Context, path string) (*rest.Config, error) {
	config, err := c.ServiceAccount(ctx, AgentNamespace, AgentAccount, "cluster-admin")
	if err != nil {
		return nil, err
	}
	return config, WriteKubeconfig(path, config)
}

// WriteKubeconfig writes config as a kubeconfig.
func WriteKubeconfig(path string, config *rest.Config) error {
	k := clientcmdapi.NewConfig()
	k.Clusters["cluster"] = &clientcmdapi.Cluster{Server: config.Host, CertificateAuthorityData: config.CAData,
		InsecureSkipTLSVerify: config.Insecure, TLSServerName: config.ServerName}
	k.AuthInfos["user"] = &clientcmdapi.AuthInfo{Token: config.BearerToken, TokenFile: config.BearerTokenFile,
		Exec: config.ExecProvider, ClientCertificateData: config.CertData, ClientKeyData: config.KeyData}
	k.Contexts["context"] = &clientcmdapi.Context{Cluster: "cluster", AuthInfo: "user"}
	k.CurrentContext = "context"
	return clientcmd.WriteToFile(*k, path)
}

func freeURL(scheme string) (string, error) {
	addr, err := process.FreeAddr()
	return scheme + "://" + addr, err
}
