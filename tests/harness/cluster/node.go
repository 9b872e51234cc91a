package cluster

import (
	"context"
	"crypto"
	_ "embed"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/util/cert"
	"k8s.io/client-go/util/keyutil"

	"github.com/pipeops/vm-agent/tests/harness/process"
)

// NodeName and WorkerName are the names of the nodes in Kubernetes.
const (
	NodeName   = "node"
	WorkerName = "worker"
)

// Busybox is an image that every node has: a static busybox with all its applets. It sleeps unless told
// otherwise, so it is the pause image too.
const Busybox = "localhost/busybox:static"

// Node is a whole Kubernetes node in namespaces of its own. Its packets reach this machine only. It ends with its
// process group.
type Node struct {
	*Cluster
	*Machine

	Kubeconfig string // file, as an administrator
	HostIP     string // this machine's, as the node and its pods see it

	tokens  map[string]string // by user
	busybox string            // archive
	worker  *Machine
	workers int // so far
}

// Machine is the place where a kubelet runs: namespaces with a containerd, a kube-proxy and a kube-router.
type Machine struct {
	IP string // as seen from the other end of its veth pair

	name  string // in Kubernetes
	pods  string // their addresses
	site  *site
	first *process.Process // all other processes end with it

	importing sync.Mutex // containerd fails when two imports meet
}

// nodeScript is the first process of a node.
//
//go:embed node.sh
var nodeScript string

// nodeReaper waits until a node's first process has ended, in whatever way, and removes what the kernel leaves of the
// node: its cgroup, as soon as that is empty, and its link to this machine, which would stay for as long as the kernel
// keeps a connection of the node whose peer is silent, minutes after its process has ended.
const nodeReaper = `trap '' INT TERM HUP
tail --pid="$1" -s 0.1 -f /dev/null
ip link delete "$3" 2>/dev/null
for try in $(seq 100); do
	left=$(find /sys/fs/cgroup -maxdepth 2 -name "$2")
	[ -n "$left" ] || exit
	find $left -depth -type d -delete 2>/dev/null
	sleep 0.1
done`

// cniConfig is formatted with the range of the pods' addresses.
const cniConfig = `{
  "cniVersion": "0.4.0", "name": "pods",
  "plugins": [
    {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true, "hairpinMode": true,
     "ipam": {"type": "host-local", "ranges": [[{"subnet": "%s"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
    {"type": "portmap", "capabilities": {"portMappings": true}}
  ]
}`

// containerdConfig is formatted with a directory. The settings avoid what some machines lack: overlayfs on their file
// system, AppArmor, and CAP_SYS_RESOURCE. The "opt" plugin is off, because it would make a directory outside.
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

// kubeletConfig is formatted with the machine's directory, the API server's directory, a cgroup and the first node's
// address. A full disk removes no image and evicts no pod, because the disk is not the node's, and there is no registry
// to pull the image from again. A changed Secret is seen in pods after seconds, not a minute. Pods are evicted if
// process ids run out, so that a test can have that happen. Pods are told of the DNS server, even while it is not
// started.
const kubeletConfig = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {x509: {clientCAFile: %[2]s/kubelet-client.crt}}
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
clusterDNS: ["%[4]s"]
clusterDomain: cluster.local
resolvConf: ""
volumePluginDir: %[1]s/volume-plugins
cgroupDriver: cgroupfs
cgroupRoot: /%[3]s
failCgroupV1: false
failSwapOn: false
imageGCHighThresholdPercent: 100
evictionHard: {memory.available: 1Mi, pid.available: "10"}
syncFrequency: 5s
`

// StartNode starts a node in the group and waits until it is ready for pods. It needs root.
func StartNode(ctx context.Context, group *process.Group) (*Node, error) {
	n := &Node{tokens: map[string]string{}}
	if err := n.start(ctx, group); err != nil {
		return nil, fmt.Errorf("node failed to start: %w\n%s", err, n.Report())
	}
	return n, nil
}

func (n *Node) start(ctx context.Context, group *process.Group) (err error) {
	n.Machine = &Machine{name: NodeName, pods: "10.244.0.0/24", site: &site{group: group}}
	if n.HostIP, err = n.Machine.start(ctx, os.Getpid()); err != nil {
		return err
	}
	s := n.site
	for _, c := range n.components() {
		n.tokens[c.user] = s.user(c.user)
	}
	for _, name := range []string{NodeName, WorkerName} {
		n.tokens["system:node:"+name] = s.user("system:node:"+name, "system:nodes")
	}
	n.tokens["system:kube-proxy"] = s.user("system:kube-proxy")
	n.tokens["kube-router"] = s.user("kube-router", "system:masters")
	certificate, key, err := s.writeKubeletClient()
	if err != nil {
		return err
	}
	s.serverURL = "https://" + net.JoinHostPort(n.IP, "6443")
	n.Cluster, err = s.startCluster(ctx, "--enable-admission-plugins", "NodeRestriction",
		"--kubelet-client-certificate", certificate, "--kubelet-client-key", key,
		// What aggregated API servers need. They trust whom the API server names.
		"--proxy-client-cert-file", certificate, "--proxy-client-key-file", key,
		"--requestheader-client-ca-file", certificate, "--requestheader-username-headers", "X-Remote-User",
		"--requestheader-group-headers", "X-Remote-Group", "--requestheader-extra-headers-prefix", "X-Remote-Extra-")
	if err != nil {
		return err
	}
	n.Kubeconfig = filepath.Join(s.dir, "admin.kubeconfig")
	if err := WriteKubeconfig(n.Kubeconfig, n.Config); err != nil {
		return err
	}
	for _, c := range n.components() {
		if err := n.startComponent(n.Machine, c); err != nil {
			return err
		}
	}
	n.busybox = filepath.Join(s.dir, "busybox.tar")
	if err := WriteImage(n.busybox, Busybox, "/bin/busybox", "/bin/busybox", "sleep", "infinity"); err != nil {
		return err
	}
	return n.join(ctx, n.Machine)
}

// dnsConfig is formatted with a kubeconfig. There is no other server to ask about names outside the cluster.
const dnsConfig = `. {
  errors
  ready
  kubernetes cluster.local in-addr.arpa ip6.arpa {
    kubeconfig %s
    pods insecure
  }
}`

// StartDNS starts the DNS server, and waits until it knows the cluster's names. Until then pods resolve none.
func (n *Node) StartDNS(ctx context.Context) error {
	file := filepath.Join(n.site.dir, "Corefile")
	if err := os.WriteFile(file, fmt.Appendf(nil, dnsConfig, n.Kubeconfig), 0o600); err != nil {
		return err
	}
	dns, err := n.site.start("coredns", "-conf", file)
	if err != nil {
		return err
	}
	return process.Poll(ctx, time.Minute, dns.Done(), func() error {
		if out, err := n.Command(ctx, "busybox", "wget", "-q", "-O", "-", "http://127.0.0.1:8181/ready").
			CombinedOutput(); err != nil {
			return fmt.Errorf("the DNS server is not ready: %s%s", out, dns.Log())
		}
		return nil
	})
}

// StartWorker starts a second node, which runs until StopWorker.
func (n *Node) StartWorker(ctx context.Context) (*Machine, error) {
	n.workers++
	n.worker = &Machine{name: WorkerName, pods: "10.244.1.0/24",
		site: &site{group: n.site.group, prefix: fmt.Sprintf("%s%d-", WorkerName, n.workers)}}
	if err := n.startWorker(ctx); err != nil {
		err = fmt.Errorf("worker failed to start: %w\n%s", err, n.Report())
		return nil, errors.Join(err, n.StopWorker(context.WithoutCancel(ctx)))
	}
	return n.worker, nil
}

func (n *Node) startWorker(ctx context.Context) error {
	outsideIP, err := n.worker.start(ctx, n.first.Pid())
	if err == nil {
		// This machine has a route to the first node only, not to the worker behind it.
		err = n.sh(ctx, `echo 1 >/proc/sys/net/ipv4/ip_forward; ip route replace "$1" via "$2"
			iptables -t nat -A POSTROUTING -s "$2" -o eth0 -j MASQUERADE`, n.worker.pods, n.worker.IP)
	}
	if err == nil {
		err = n.worker.sh(ctx, `ip route add "$3" via "$1"; ip route add "$2" via "$1"`, outsideIP, n.pods, links.String())
	}
	if err == nil {
		err = n.join(ctx, n.worker)
	}
	return err
}

func (m *Machine) sh(ctx context.Context, script string, args ...string) error {
	if out, err := m.Command(ctx, "sh", append([]string{"-ec", script, "sh"}, args...)...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", script, err, out)
	}
	return nil
}

// StopWorker kills the worker at once, as a power failure would, and deletes its Node object.
func (n *Node) StopWorker(ctx context.Context) error {
	if n.worker.first != nil {
		n.worker.first.Kill()
	}
	n.worker = nil
	err := n.Client.CoreV1().Nodes().Delete(ctx, WorkerName, metav1.DeleteOptions{})
	if apierrors.IsNotFound(err) { // it never joined
		return nil
	}
	return err
}

// LoseWorker cuts the worker off and kills it. Unlike after StopWorker, its connections stay open at the other end, as
// in a power failure, and so does its Node object.
func (n *Node) LoseWorker(ctx context.Context) error {
	err := n.worker.sh(ctx, "ip link set eth0 down")
	n.worker.first.Kill()
	return err
}

// join makes a machine a node, and waits until it is ready for pods.
func (n *Node) join(ctx context.Context, m *Machine) error {
	dir := m.site.dir
	if err := os.WriteFile(filepath.Join(dir, kubeletFile), fmt.Appendf(nil, kubeletConfig, dir, n.site.dir, m.cgroup(),
		n.IP), 0o600); err != nil {
		return err
	}
	// containerd may not listen yet, and the kubelet would not wait for it.
	starting, cancel := m.site.whileAlive(ctx)
	defer cancel()
	err := process.Poll(starting, time.Minute, nil, func() error { return m.ImportImage(starting, n.busybox) })
	if err != nil {
		return errors.Join(context.Cause(starting), err)
	}
	for _, c := range []component{
		{"kubelet", "system:node:" + m.name, []string{
			"--config", filepath.Join(dir, kubeletFile), "--root-dir", filepath.Join(dir, "kubelet"),
			"--hostname-override", m.name, "--node-ip", m.IP,
		}},
		// The conntrack settings are the whole machine's. Without masquerade, what one pod answers to another by a
		// Service would come past kube-proxy's rules, unless this machine happens to show them bridged packets.
		{"kube-proxy", "system:kube-proxy", []string{
			"--proxy-mode", "iptables", "--masquerade-all", "--conntrack-max-per-core", "0", "--conntrack-min", "0",
			"--hostname-override", m.name,
		}},
	} {
		if err := n.startComponent(m, c); err != nil {
			return err
		}
	}
	alive, cancel := m.site.whileAlive(ctx)
	defer cancel()
	err = process.Poll(alive, time.Minute, nil, func() error { return n.ready(alive, m) })
	if err == nil {
		// For NetworkPolicies alone: the bridge does not enforce them. It wants to find its node.
		err = n.startComponent(m, component{"kube-router", "kube-router", []string{
			"--run-firewall", "--run-router=false", "--run-service-proxy=false", "--run-loadbalancer=false",
			"--health-port", "0",
			"--service-cluster-ip-range", serviceRange, "--hostname-override", m.name,
		}})
	}
	if cause := context.Cause(alive); cause != nil {
		return cause
	}
	return err
}

// component is a part of Kubernetes that is a client of the API server.
type component struct {
	name, user string
	args       []string
}

func (n *Node) startComponent(m *Machine, c component) error {
	config := rest.CopyConfig(n.Config)
	config.BearerToken = n.tokens[c.user]
	kubeconfig := filepath.Join(m.site.dir, c.name+".kubeconfig")
	if err := WriteKubeconfig(kubeconfig, config); err != nil {
		return err
	}
	_, err := m.site.start(c.name, append(c.args, "--kubeconfig", kubeconfig)...)
	return err
}

// components returns the components that a cluster has once.
func (n *Node) components() []component {
	dir := n.site.dir
	return []component{
		{"kube-controller-manager", "system:kube-controller-manager", []string{
			"--leader-elect=false", "--secure-port", "0", "--use-service-account-credentials",
			"--service-account-private-key-file", filepath.Join(dir, serviceAccountKey),
			"--root-ca-file", filepath.Join(dir, serverCertificate),
			"--flex-volume-plugin-dir", filepath.Join(dir, "volume-plugins"), // else it makes one in /usr
		}},
		{"kube-scheduler", "system:kube-scheduler", []string{"--leader-elect=false", "--secure-port", "0"}},
	}
}

// cgroup returns the name of the pods' cgroup. It is unique, as the name of the group's directory is.
func (m *Machine) cgroup() string {
	return filepath.Base(m.site.group.Dir()) + "-" + m.site.prefix + m.name
}

// start makes the namespaces, with a veth pair to the network namespace of the process outside, and starts containerd
// in them. It returns the address of the pair's other end.
func (m *Machine) start(ctx context.Context, outside int) (outsideIP string, err error) {
	s := m.site
	if s.dir, err = s.group.Mkdir(s.prefix + m.name); err != nil {
		return "", err
	}
	link, err := freeLink()
	if err != nil {
		return "", err
	}
	outsideIP = ipv4(link + 1).String()
	m.IP = ipv4(link + 2).String()
	outsideNet := fmt.Sprintf("/proc/%d/ns/net", outside)
	device := fmt.Sprintf("pipeops%x", link)
	m.first, err = s.run("namespaces", "unshare", "--net", "--mount", "--pid", "sh", "-ec", nodeScript, "node",
		outsideNet, device, outsideIP, m.IP, serviceRange, m.cgroup())
	if err != nil {
		return "", err
	}
	pid := strconv.Itoa(m.first.Pid())
	reaper := exec.Command("sh", "-c", nodeReaper, "node-reaper", pid, m.cgroup(), device)
	reaper.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // so that Ctrl-C does not reach it
	if err := reaper.Start(); err != nil {
		return "", err
	}
	go func() { _ = reaper.Wait() }()
	s.enter = []string{"nsenter", "--target", pid, "--net", "--mount", "--pid=/proc/" + pid + "/ns/pid_for_children", "--"}
	err = process.Poll(ctx, 10*time.Second, m.first.Done(), func() error {
		if !strings.HasSuffix(m.first.Log(), "ready\n") {
			return errors.New("the namespaces are not ready")
		}
		return nil
	})
	select {
	case <-m.first.Done():
		return "", m.first.Failed()
	default:
	}
	if err != nil {
		return "", err
	}
	config := filepath.Join(s.dir, "containerd.toml")
	if err := os.WriteFile(config, fmt.Appendf(nil, containerdConfig, s.dir), 0o600); err != nil {
		return "", err
	}
	if err := os.WriteFile(filepath.Join(s.dir, "pods.conflist"), fmt.Appendf(nil, cniConfig, m.pods), 0o600); err != nil {
		return "", err
	}
	_, err = s.run("containerd", "containerd", "--config", config)
	return outsideIP, err
}

// links is the network of the veth pairs' addresses. It is reserved for benchmarks, so no other network uses it.
var links = netip.MustParsePrefix("198.18.0.0/15")

func ipv4(n uint32) netip.Addr {
	return netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, n)))
}

// freeLink returns the first of four consecutive addresses that this machine does not use.
func freeLink() (uint32, error) {
	taken, err := net.InterfaceAddrs()
	if err != nil {
		return 0, err
	}
	for {
		first := binary.BigEndian.Uint32(links.Addr().AsSlice()) + 4*rand.Uint32N(1<<15)
		if !slices.ContainsFunc(taken, func(a net.Addr) bool {
			prefix, err := netip.ParsePrefix(a.String())
			return err == nil && prefix.Overlaps(netip.PrefixFrom(ipv4(first), 30))
		}) {
			return first, nil
		}
	}
}

// writeKubeletClient makes the self-signed certificate that the API server shows to the kubelet, and to aggregated API
// servers.
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
	made, err := cert.NewSelfSignedCACert(cert.Config{CommonName: "kube-apiserver",
		Organization: []string{"system:masters"}}, signer.(crypto.Signer))
	if err != nil {
		return "", "", err
	}
	data, err = cert.EncodeCertificates(made)
	if err != nil {
		return "", "", err
	}
	return certificate, key, cert.WriteCert(certificate, data)
}

// ready returns nil if a pod made now would be scheduled, run and reach the Services.
func (n *Node) ready(ctx context.Context, m *Machine) error {
	node, err := n.Client.CoreV1().Nodes().Get(ctx, m.name, metav1.GetOptions{})
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
	if out, err := m.Command(ctx, "busybox", "wget", "-q", "-O", "-",
		"http://"+net.JoinHostPort(m.IP, "10256")+"/healthz").CombinedOutput(); err != nil {
		return fmt.Errorf("kube-proxy has not set up the Services: %s", out)
	}
	return nil
}

// ImportImage imports the images of a docker-archive or OCI archive into the node. Pods name them as the archive
// does. There is no registry, so a pod needs a tag other than latest, or `imagePullPolicy: Never`.
func (m *Machine) ImportImage(ctx context.Context, archive string) error {
	file, err := os.Open(archive)
	if err != nil {
		return err
	}
	defer func() { _ = file.Close() }()
	m.importing.Lock()
	defer m.importing.Unlock()
	cmd := m.Command(ctx, "ctr", "--namespace", "k8s.io", "images", "import", "--snapshotter", "native", "-")
	cmd.Stdin = file
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("import %s: %w: %s", archive, err, out)
	}
	return nil
}

// Command prepares a program of this machine to run in the namespaces.
func (m *Machine) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	enter := m.site.enter
	return exec.CommandContext(ctx, enter[0], slices.Concat(enter[1:], []string{name}, args)...)
}

// Report returns whether each part runs, with the end of its log.
func (n *Node) Report() string {
	var report strings.Builder
	parts := n.site.parts
	if n.worker != nil {
		parts = slices.Concat(parts, n.worker.site.parts)
	}
	for _, p := range parts {
		state := "runs"
		select {
		case <-p.Done():
			state = "has ended"
		default:
		}
		lines := strings.Split(strings.TrimSpace(p.Log()), "\n")
		fmt.Fprintf(&report, "== %s %s; the end of its log:\n%s\n", p.name, state,
			strings.Join(lines[max(0, len(lines)-15):], "\n"))
	}
	return report.String()
}

// whileAlive returns a context that ends when a part ends, with the part's log as its cause.
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
