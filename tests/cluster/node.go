package cluster

import (
	"context"
	"crypto"
	_ "embed"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/util/cert"
	"k8s.io/client-go/util/keyutil"

	"github.com/pipeops/vm-agent/tests/process"
)

// NodeName is the node's name in Kubernetes.
const NodeName = "node"

// Busybox is an image that every node has: a static busybox with all its applets. It sleeps unless told
// otherwise, so it is the pause image too.
const Busybox = "localhost/busybox:static"

// Node is a whole Kubernetes, in namespaces of its own that no packet leaves but to this machine. It ends with
// its process group.
type Node struct {
	*Cluster

	Kubeconfig string // file, as an administrator
	IP         string // the node's, as seen from here
	HostIP     string // this machine's, as the node and its pods see it

	site *site
}

// nodeScript is the first process of a node.
//
//go:embed node.sh
var nodeScript string

// nodeReaper waits for the end of a node's first process, which may come in any way, and removes what the kernel
// leaves of the node: its cgroup, as soon as that is empty.
const nodeReaper = `trap '' INT TERM HUP
tail --pid="$1" -s 0.1 -f /dev/null
for try in $(seq 100); do
	left=$(find /sys/fs/cgroup -maxdepth 2 -name "$2")
	[ -n "$left" ] || exit
	find $left -depth -type d -delete 2>/dev/null
	sleep 0.1
done`

const cniConfig = `{
  "cniVersion": "0.4.0", "name": "pods",
  "plugins": [
    {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true, "hairpinMode": true,
     "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.244.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
    {"type": "portmap", "capabilities": {"portMappings": true}}
  ]
}`

// containerdConfig takes a directory. Not every machine has what the settings do without: overlayfs on its file
// system, AppArmor, and CAP_SYS_RESOURCE. The "opt" plugin would make a directory outside.
const containerdConfig = `version = 2
root = "%[1]s/containerd"
disabled_plugins = ["io.containerd.internal.v1.opt"]
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "` + Busybox + `"
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "native"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "%[1]s"
`

const kubeletFile = "kubelet.yaml"

// kubeletConfig takes a directory and a cgroup. No image is removed and no pod evicted because the disk is full:
// that is the machine's affair, and there is no registry to get the image again from. A Secret that changes is seen
// in pods after seconds, not a minute.
const kubeletConfig = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {x509: {clientCAFile: %[1]s/kubelet-client.crt}}
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
resolvConf: ""
volumePluginDir: %[1]s/volume-plugins
cgroupDriver: cgroupfs
cgroupRoot: /%[2]s
failCgroupV1: false
failSwapOn: false
imageGCHighThresholdPercent: 100
evictionHard: {memory.available: 1Mi}
syncFrequency: 5s
`

// StartNode starts a node in the group and waits until it is ready for pods. It needs root.
func StartNode(ctx context.Context, group *process.Group) (*Node, error) {
	n := &Node{site: &site{group: group}}
	if err := n.start(ctx); err != nil {
		return nil, fmt.Errorf("the node does not start: %w\n%s", err, n.Report())
	}
	return n, nil
}

func (n *Node) start(ctx context.Context) (err error) {
	s := n.site
	if s.dir, err = s.group.Mkdir("node"); err != nil {
		return err
	}
	if err := n.startNamespaces(ctx); err != nil {
		return err
	}
	if err := n.startContainerd(); err != nil {
		return err
	}
	components := n.components()
	tokens := make([]string, len(components))
	for i, c := range components {
		tokens[i] = s.user(c.user, c.groups...)
	}
	certificate, key, err := s.writeKubeletClient()
	if err != nil {
		return err
	}
	s.serverURL = "https://" + net.JoinHostPort(n.IP, "6443")
	n.Cluster, err = s.startCluster(ctx, "--enable-admission-plugins", "NodeRestriction",
		"--kubelet-client-certificate", certificate, "--kubelet-client-key", key)
	if err != nil {
		return err
	}
	n.Kubeconfig = filepath.Join(s.dir, "admin.kubeconfig")
	if err := WriteKubeconfig(n.Kubeconfig, n.Config); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(s.dir, kubeletFile), fmt.Appendf(nil, kubeletConfig, s.dir, n.cgroup()), 0o600); err != nil {
		return err
	}
	for i, c := range components {
		config := rest.CopyConfig(n.Config)
		config.BearerToken = tokens[i]
		kubeconfig := filepath.Join(s.dir, c.name+".kubeconfig")
		if err := WriteKubeconfig(kubeconfig, config); err != nil {
			return err
		}
		if _, err := s.start(c.name, append(c.args, "--kubeconfig", kubeconfig)...); err != nil {
			return err
		}
	}
	archive := filepath.Join(s.dir, "busybox.tar")
	if err := WriteImage(archive, Busybox, "/bin/busybox", "/bin/busybox", "sleep", "infinity"); err != nil {
		return err
	}
	alive, cancel := s.whileAlive(ctx)
	defer cancel()
	// containerd may not listen yet.
	err = process.Poll(alive, time.Minute, nil, func() error { return n.ImportImage(alive, archive) })
	if err == nil {
		err = process.Poll(alive, time.Minute, nil, func() error { return n.ready(alive) })
	}
	if cause := context.Cause(alive); cause != nil {
		return cause
	}
	return err
}

// component is a part of Kubernetes that is a client of the API server.
type component struct {
	name, user string
	groups     []string
	args       []string
}

func (n *Node) components() []component {
	dir := n.site.dir
	return []component{
		{name: "kube-controller-manager", user: "system:kube-controller-manager", args: []string{
			"--leader-elect=false", "--secure-port", "0", "--use-service-account-credentials",
			"--service-account-private-key-file", filepath.Join(dir, serviceAccountKey), "--root-ca-file", filepath.Join(dir, serverCertificate),
			"--flex-volume-plugin-dir", filepath.Join(dir, "volume-plugins"), // else it makes one in /usr
		}},
		{name: "kube-scheduler", user: "system:kube-scheduler", args: []string{"--leader-elect=false", "--secure-port", "0"}},
		{name: "kubelet", user: "system:node:" + NodeName, groups: []string{"system:nodes"}, args: []string{
			"--config", filepath.Join(dir, kubeletFile), "--root-dir", filepath.Join(dir, "kubelet"),
			"--hostname-override", NodeName, "--node-ip", n.IP,
		}},
		// The conntrack settings are the whole machine's. Without masquerade, what one pod answers to another by a
		// Service would come past kube-proxy's rules, unless this machine happens to show them bridged packets.
		{name: "kube-proxy", user: "system:kube-proxy", args: []string{
			"--proxy-mode", "iptables", "--masquerade-all", "--conntrack-max-per-core", "0", "--conntrack-min", "0",
			"--hostname-override", NodeName,
		}},
	}
}

// cgroup is the name of the pods' cgroup. Like that of the group's directory, nobody else has it.
func (n *Node) cgroup() string { return filepath.Base(n.site.group.Dir()) }

func (n *Node) startNamespaces(ctx context.Context) error {
	// 192.0.2.0/24 is for documentation: no network has it. Four addresses of it are a link.
	link := rand.IntN(64)
	n.HostIP = net.IPv4(192, 0, 2, byte(4*link+1)).String()
	n.IP = net.IPv4(192, 0, 2, byte(4*link+2)).String()
	first, err := n.site.run("node", "unshare", "--net", "--mount", "--pid", "sh", "-ec", nodeScript, "node",
		"pipeops"+strconv.Itoa(link), n.HostIP, n.IP, serviceRange, n.cgroup())
	if err != nil {
		return err
	}
	pid := strconv.Itoa(first.Pid())
	reaper := exec.Command("sh", "-c", nodeReaper, "node-reaper", pid, n.cgroup())
	reaper.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // out of the reach of Ctrl-C
	if err := reaper.Start(); err != nil {
		return err
	}
	go func() { _ = reaper.Wait() }()
	n.site.enter = []string{"nsenter", "--target", pid, "--net", "--mount", "--pid=/proc/" + pid + "/ns/pid_for_children", "--"}
	err = process.Poll(ctx, 10*time.Second, first.Done(), func() error {
		if !strings.HasSuffix(first.Log(), "ready\n") {
			return errors.New("the namespaces are not ready")
		}
		return nil
	})
	select {
	case <-first.Done():
		return first.Failed()
	default:
		return err
	}
}

func (n *Node) startContainerd() error {
	dir := n.site.dir
	config := filepath.Join(dir, "containerd.toml")
	if err := os.WriteFile(config, fmt.Appendf(nil, containerdConfig, dir), 0o600); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "pods.conflist"), []byte(cniConfig), 0o600); err != nil {
		return err
	}
	_, err := n.site.run("containerd", "containerd", "--config", config)
	return err
}

// writeKubeletClient makes the certificate that the API server shows to the kubelet. It is its own authority.
func (s *site) writeKubeletClient() (certificate, key string, err error) {
	certificate, key = filepath.Join(s.dir, "kubelet-client.crt"), filepath.Join(s.dir, "kubelet-client.key")
	data, _, err := keyutil.LoadOrGenerateKeyFile(key)
	if err != nil {
		return "", "", err
	}
	signer, err := keyutil.ParsePrivateKeyPEM(data)
	if err != nil {
		return "", "", err
	}
	made, err := cert.NewSelfSignedCACert(cert.Config{CommonName: "kube-apiserver", Organization: []string{"system:masters"}}, signer.(crypto.Signer))
	if err != nil {
		return "", "", err
	}
	data, err = cert.EncodeCertificates(made)
	if err != nil {
		return "", "", err
	}
	return certificate, key, cert.WriteCert(certificate, data)
}

// ready asks whether a pod made now would be scheduled, run and reach the Services.
func (n *Node) ready(ctx context.Context) error {
	node, err := n.Client.CoreV1().Nodes().Get(ctx, NodeName, metav1.GetOptions{})
	if err != nil {
		return err
	}
	isReady := func(c corev1.NodeCondition) bool {
		return c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
	}
	if !slices.ContainsFunc(node.Status.Conditions, isReady) || len(node.Spec.Taints) > 0 {
		return fmt.Errorf("the node is not ready: conditions %v, taints %v", node.Status.Conditions, node.Spec.Taints)
	}
	if _, err := n.Client.CoreV1().ServiceAccounts("default").Get(ctx, "default", metav1.GetOptions{}); err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+net.JoinHostPort(n.IP, "10256")+"/healthz", nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("kube-proxy has not set up the Services: %s", resp.Status)
	}
	return nil
}

// ImportImage takes the images of a docker-archive or OCI archive into the node. Pods name them as the archive
// does; there is no registry, so a tag other than latest or `imagePullPolicy: Never` is a must.
func (n *Node) ImportImage(ctx context.Context, archive string) error {
	file, err := os.Open(archive)
	if err != nil {
		return err
	}
	defer func() { _ = file.Close() }()
	cmd := n.Command(ctx, "ctr", "--namespace", "k8s.io", "images", "import", "--snapshotter", "native", "-")
	cmd.Stdin = file
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("import %s: %w: %s", archive, err, out)
	}
	return nil
}

// Command prepares a program of this machine that runs in the node's namespaces.
func (n *Node) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	enter := n.site.enter
	return exec.CommandContext(ctx, enter[0], slices.Concat(enter[1:], []string{name}, args)...)
}

// Report tells of each part whether it runs, with the end of its log.
func (n *Node) Report() string {
	var report strings.Builder
	for _, p := range n.site.parts {
		state := "runs"
		select {
		case <-p.Done():
			state = "has ended"
		default:
		}
		lines := strings.Split(strings.TrimSpace(p.Log()), "\n")
		fmt.Fprintf(&report, "== %s %s; the end of its log:\n%s\n", p.name, state, strings.Join(lines[max(0, len(lines)-15):], "\n"))
	}
	return report.String()
}

// whileAlive returns a context that ends when a part does, with the part's log as its cause.
func (s *site) whileAlive(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	for _, p := range s.parts {
		go func() {
			select {
			case <-p.Done():
				cancel(p.Failed())
			case <-ctx.Done():
			}
		}()
	}
	return ctx, func() { cancel(nil) }
}
