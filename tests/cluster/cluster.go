// Package cluster runs a real etcd and kube-apiserver as processes on loopback, without root.
package cluster

import (
	"context"
	"crypto/rand"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
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

	"github.com/pipeops/vm-agent/tests/process"
)

// Cluster is a running API server.
type Cluster struct {
	Config *rest.Config // as an administrator
	Client kubernetes.Interface

	Etcd, APIServer *process.Process
}

// Start starts etcd and the API server in the group and waits until they are ready.
func Start(ctx context.Context, group *process.Group) (*Cluster, error) {
	dir, err := group.Mkdir("cluster")
	if err != nil {
		return nil, err
	}
	etcd, etcdURL, err := startEtcd(group, dir)
	if err != nil {
		return nil, err
	}
	c, err := startAPIServer(ctx, group, dir, etcdURL)
	if err != nil {
		return nil, err
	}
	c.Etcd = etcd
	return c, nil
}

func startEtcd(group *process.Group, dir string) (*process.Process, string, error) {
	binary, err := process.Binary("etcd")
	if err != nil {
		return nil, "", err
	}
	clientURL, err := freeURL("http")
	if err != nil {
		return nil, "", err
	}
	peerURL, err := freeURL("http")
	if err != nil {
		return nil, "", err
	}
	etcd, err := group.Start("etcd", nil, binary,
		"--data-dir", filepath.Join(dir, "etcd"),
		"--listen-client-urls", clientURL, "--advertise-client-urls", clientURL,
		"--listen-peer-urls", peerURL, "--initial-advertise-peer-urls", peerURL, "--initial-cluster", "default="+peerURL,
		"--unsafe-no-fsync", "--log-level", "warn")
	return etcd, clientURL, err
}

func startAPIServer(ctx context.Context, group *process.Group, dir, etcdURL string) (*Cluster, error) {
	binary, err := process.Binary("kube-apiserver")
	if err != nil {
		return nil, err
	}
	serverURL, err := freeURL("https")
	if err != nil {
		return nil, err
	}
	_, port, _ := net.SplitHostPort(serverURL[len("https://"):])
	key := filepath.Join(dir, "service-account.key")
	if err := writeKey(key); err != nil {
		return nil, err
	}
	token := rand.Text()
	tokens := filepath.Join(dir, "tokens.csv")
	if err := os.WriteFile(tokens, []byte(token+",admin,admin,system:masters\n"), 0o600); err != nil {
		return nil, err
	}
	server, err := group.Start("kube-apiserver", nil, binary,
		"--etcd-servers", etcdURL,
		"--bind-address", "127.0.0.1", "--advertise-address", "127.0.0.1", "--secure-port", port,
		"--cert-dir", filepath.Join(dir, "certs"),
		"--token-auth-file", tokens, "--authorization-mode", "Node,RBAC",
		"--service-account-issuer", "https://kubernetes.default.svc",
		"--service-account-key-file", key, "--service-account-signing-key-file", key,
		"--service-cluster-ip-range", "10.96.0.0/16", "--allow-privileged",
		"--endpoint-reconciler-type", "none", // there is no Service to keep for a server on loopback
		// No controller makes ServiceAccounts for namespaces: pods must do without.
		"--disable-admission-plugins", "ServiceAccount",
		"--kubelet-preferred-address-types", "InternalIP")
	if err != nil {
		return nil, err
	}
	c := &Cluster{APIServer: server, Config: &rest.Config{Host: serverURL, BearerToken: token, QPS: -1}}
	certificate := filepath.Join(dir, "certs", "apiserver.crt")
	err = process.Poll(ctx, time.Minute, server.Done(), func() (err error) {
		// Read anew each time: the API server makes it while it starts, and it may not be whole yet.
		if c.Config.CAData, err = os.ReadFile(certificate); err != nil {
			return err
		}
		if c.Client, err = kubernetes.NewForConfig(c.Config); err != nil {
			return err
		}
		return c.Client.Discovery().RESTClient().Get().AbsPath("/readyz").Do(ctx).Error()
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

// ServiceAccount makes a ServiceAccount with a cluster role and returns a configuration that acts as it, by
// a token of the API server's own.
func (c *Cluster) ServiceAccount(ctx context.Context, namespace, name, clusterRole string) (*rest.Config, error) {
	_, err := c.Client.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return nil, err
	}
	account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: name}}
	if _, err := c.Client.CoreV1().ServiceAccounts(namespace).Create(ctx, account, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		return nil, err
	}
	binding := &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: namespace + "-" + name},
		Subjects:   []rbacv1.Subject{{Kind: "ServiceAccount", Namespace: namespace, Name: name}},
		RoleRef:    rbacv1.RoleRef{APIGroup: "rbac.authorization.k8s.io", Kind: "ClusterRole", Name: clusterRole},
	}
	if _, err := c.Client.RbacV1().ClusterRoleBindings().Create(ctx, binding, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		return nil, err
	}
	day := int64(24 * 60 * 60)
	request := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{ExpirationSeconds: &day}}
	answer, err := c.Client.CoreV1().ServiceAccounts(namespace).CreateToken(ctx, name, request, metav1.CreateOptions{})
	if err != nil {
		return nil, err
	}
	config := rest.CopyConfig(c.Config)
	config.BearerToken = answer.Status.Token
	return config, nil
}

// WriteKubeconfig writes a kubeconfig that does as config does.
func WriteKubeconfig(path string, config *rest.Config) error {
	k := clientcmdapi.NewConfig()
	k.Clusters["cluster"] = &clientcmdapi.Cluster{Server: config.Host, CertificateAuthorityData: config.CAData, InsecureSkipTLSVerify: config.Insecure}
	k.AuthInfos["user"] = &clientcmdapi.AuthInfo{Token: config.BearerToken}
	k.Contexts["context"] = &clientcmdapi.Context{Cluster: "cluster", AuthInfo: "user"}
	k.CurrentContext = "context"
	return clientcmd.WriteToFile(*k, path)
}

func freeURL(scheme string) (string, error) {
	port, err := process.FreePort()
	return scheme + "://" + net.JoinHostPort("127.0.0.1", strconv.Itoa(port)), err
}
