package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/pipeops/vm-agent/tests/harness/agent"
	"github.com/pipeops/vm-agent/tests/harness/controlplane"
	"github.com/pipeops/vm-agent/tests/harness/process"
)

// contenders are the tunnels that are measured side by side.
var contenders = []struct {
	name  string
	calls int  // in a round
	http1 bool // callers speak HTTP/1.1, although HTTP/2 is offered
	start func(s *site, t *contender) error
}{
	{"ours, https, gateway", calls, false, ours("https", false)},
	{"ours, https, gateway, HTTP/1.1", calls, true, ours("https", false)},
	{"ours, https, no gateway", calls, false, ours("https", true)},
	{"ours, http, gateway", calls, false, ours("http", false)},
	{baseline, calls, false, (*site).remotedialer},
	{"konnectivity", calls, false, (*site).konnectivity},
	{"konnectivity, HTTP/1.1", calls, true, (*site).konnectivity},
	{"cluster-proxy's way", calls / 10, false, (*site).clusterProxy},
	{"chisel, kubectl proxy", calls, false, (*site).chisel},
	{"ssh -R, kubectl proxy", calls, false, (*site).ssh},
}

// contender is a running tunnel with all that stands between a caller and the upstream.
type contender struct {
	peer                                // where callers find it
	dress         func(*http.Transport) // what callers need beyond the default; nil: nothing
	agent, server []*process.Process    // in the customer's cluster, and outside of it
	calls         int
	http1         bool
	restart       func() error // kills the server end, and starts it again unless it is restarted anyway
}

// site is where one tunnel runs.
type site struct {
	ctx        context.Context
	group      *process.Group
	rtt        time.Duration // between agent and server
	upstream   string        // address of what stands in for the API server
	kubeconfig string        // for it
}

// run starts a program that make has built, with a log named for it.
func (s *site) run(name string, args ...string) (*process.Process, error) {
	binary, err := process.Binary(name)
	if err != nil {
		return nil, fmt.Errorf("%w: run `make bench PARTS=tunnels`", err)
	}
	return s.group.Start(name, []string{"KUBECONFIG=" + s.kubeconfig}, binary, args...)
}

// serve starts the server end of a tunnel, waits until it listens, and lets the tunnel restart it.
func (s *site) serve(t *contender, listens string, start func() (*process.Process, error)) error {
	p, err := start()
	if err != nil {
		return err
	}
	t.server = append(t.server, p)
	t.restart = func() error {
		kill(p)
		t.server[0], err = start()
		return err
	}
	return process.Poll(s.ctx, 10*time.Second, p.Done(), func() error { return process.Listening(listens) })
}

// join starts a process of the agent's side.
func (s *site) join(t *contender, name string, args ...string) error {
	p, err := s.run(name, args...)
	t.agent = append(t.agent, p)
	return err
}

// far returns the address at which the agent finds an address of the server, behind the delay.
func (s *site) far(addr string) (string, error) {
	if s.rtt == 0 {
		return addr, nil
	}
	relay, err := startDelay(s.ctx, addr, s.rtt)
	if err != nil {
		return "", err
	}
	return relay.String(), nil
}

// addrs returns free addresses.
func addrs(n int) (found []string, err error) {
	for range n {
		addr, err := process.FreeAddr()
		if err != nil {
			return nil, err
		}
		found = append(found, addr)
	}
	return found, nil
}

func port(addr string) string { return addr[strings.LastIndexByte(addr, ':')+1:] }

// family returns the pids of processes and all their descendants. Source: proc(5), /proc/pid/task/tid/children.
func family(processes ...*process.Process) (pids []int) {
	for _, p := range processes {
		pids = append(pids, p.Pid())
	}
	for i := 0; i < len(pids); i++ {
		files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pids[i]))
		for _, file := range files {
			data, _ := os.ReadFile(file)
			for _, field := range strings.Fields(string(data)) {
				if pid, err := strconv.Atoi(field); err == nil {
					pids = append(pids, pid)
				}
			}
		}
	}
	return pids
}

// kill kills a process with all its descendants, and waits for its end.
func kill(p *process.Process) {
	for _, pid := range family(p) {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	<-p.Done()
}

// ends is where a control plane that runs as a process of its own can be found.
type ends struct {
	*controlplane.ControlPlane
	Direct, Name string // where frps accepts the agent's callers without the gateway, and their name for it
}

// controlPlane runs a control plane until SIGTERM, and prints its ends.
func controlPlane(id, token, tunnelType, rtt string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	group, err := process.NewGroup()
	if err != nil {
		return err
	}
	defer group.Close()
	cp, err := controlplane.Start(ctx, controlplane.Options{
		Group: group, Agents: map[string]string{id: token}, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		return err
	}
	defer cp.Close()
	cp.SetTerms(controlplane.Terms{Life: 24 * time.Hour, TunnelType: tunnelType})
	if d, err := time.ParseDuration(rtt); err != nil {
		return err
	} else if d > 0 { // leases name the relay in the place of frps
		relay, err := startDelay(ctx, net.JoinHostPort("127.0.0.1", strconv.Itoa(cp.FrpsPort)), d)
		if err != nil {
			return err
		}
		cp.FrpsPort = relay.(*net.TCPAddr).Port
	}
	addr, config := cp.Direct(id)
	if err := json.NewEncoder(os.Stdout).Encode(ends{cp, addr, config.ServerName}); err != nil {
		return err
	}
	<-ctx.Done()
	return nil
}

func ours(tunnelType string, direct bool) func(*site, *contender) error {
	return func(s *site, t *contender) error {
		const id, token = "agent-001", "the-agents-token"
		self, err := os.Executable()
		if err != nil {
			return err
		}
		cp, err := s.group.Start("controlplane", nil, self, "controlplane", id, token, tunnelType, s.rtt.String())
		if err != nil {
			return err
		}
		var at ends
		if err := process.Poll(s.ctx, 10*time.Second, cp.Done(), func() error {
			return json.Unmarshal([]byte(cp.Log()), &at)
		}); err != nil {
			return err
		}
		a, err := agent.New(s.group, at.ControlPlane, id, token, s.kubeconfig)
		if err != nil {
			return err
		}
		a.Env = append(a.Env, "PIPEOPS_FRP_TUNNEL_TYPE="+tunnelType)
		if err := a.Start(); err != nil {
			return err
		}
		t.agent, t.server = []*process.Process{a.Bootstrap, a.Frpc, a.Proxy}, []*process.Process{cp}
		t.url, t.header = at.GatewayURL+"/agents/"+id+"/api/k8s", http.Header{"Authorization": {"Bearer " + token}}
		if direct {
			t.url = "https://" + at.Direct + "/api/k8s"
			t.dress = func(tr *http.Transport) { tr.TLSClientConfig.ServerName = at.Name }
		}
		t.restart = func() error { // the control plane restarts frps
			for _, pid := range family(cp) {
				if comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)); string(comm) == "frps\n" {
					err := syscall.Kill(pid, syscall.SIGKILL)
					for err == nil && process.Alive(pid) {
						time.Sleep(time.Millisecond)
					}
					return err
				}
			}
			return errors.New("the control plane runs no frps")
		}
		return nil
	}
}

func (s *site) remotedialer(t *contender) error {
	at, err := addrs(3)
	if err != nil {
		return err
	}
	front, server, local := at[0], at[1], at[2]
	if err := s.certificate(); err != nil {
		return err
	}
	if err := s.serve(t, server, func() (*process.Process, error) {
		return s.run("tunnels", "remotedialer-server", s.group.Dir(), front, server, local)
	}); err != nil {
		return err
	}
	behind, err := s.far(server)
	if err != nil {
		return err
	}
	t.url = "http://" + front
	return s.join(t, "tunnels", "remotedialer-agent", s.group.Dir(), local, behind, s.upstream)
}

// konnectivity's agent is a pipe: callers speak TLS with the upstream itself.
func (s *site) konnectivity(t *contender) error {
	front, err := s.startKonnectivity(t, "http-connect")
	if err != nil {
		return err
	}
	pair, err := tls.LoadX509KeyPair(filepath.Join(s.group.Dir(), "tls.crt"), filepath.Join(s.group.Dir(), "tls.key"))
	t.url, t.header = "https://"+s.upstream, http.Header{"Authorization": {"Bearer t"}}
	t.dress = func(tr *http.Transport) {
		tr.TLSClientConfig.Certificates = []tls.Certificate{pair}
		tr.Proxy = http.ProxyURL(&url.URL{Scheme: "https", Host: front})
	}
	return err
}

// startKonnectivity returns the address of the server for its callers.
func (s *site) startKonnectivity(t *contender, mode string) (string, error) {
	at, err := addrs(6)
	if err != nil {
		return "", err
	}
	if err := s.certificate(); err != nil {
		return "", err
	}
	cert, key := filepath.Join(s.group.Dir(), "tls.crt"), filepath.Join(s.group.Dir(), "tls.key")
	if err := s.serve(t, at[1], func() (*process.Process, error) {
		return s.run("konnectivity-server", "--mode", mode,
			"--server-ca-cert", cert, "--server-cert", cert, "--server-key", key,
			"--cluster-ca-cert", cert, "--cluster-cert", cert, "--cluster-key", key,
			"--server-bind-address", "127.0.0.1", "--server-port", port(at[0]),
			"--agent-bind-address", "127.0.0.1", "--agent-port", port(at[1]),
			"--admin-port", port(at[2]), "--health-bind-address", "127.0.0.1", "--health-port", port(at[3]))
	}); err != nil {
		return "", err
	}
	behind, err := s.far(at[1])
	if err != nil {
		return "", err
	}
	return at[0], s.join(t, "konnectivity-agent", "--ca-cert", cert, "--agent-cert", cert, "--agent-key", key,
		"--proxy-server-host", "127.0.0.1", "--proxy-server-port", port(behind),
		"--admin-server-port", port(at[4]), "--health-server-host", "127.0.0.1", "--health-server-port", port(at[5]))
}

// clusterProxy has a server for users before konnectivity, and a proxy in the cluster behind it.
func (s *site) clusterProxy(t *contender) error {
	server, err := s.startKonnectivity(t, "grpc")
	if err != nil {
		return err
	}
	at, err := addrs(2)
	if err != nil {
		return err
	}
	front, local := at[0], at[1]
	if err := s.join(t, "tunnels", "service-proxy", s.group.Dir(), local, "", s.upstream); err != nil {
		return err
	}
	users, err := s.run("tunnels", "user-server", s.group.Dir(), front, server, local)
	t.server = append(t.server, users)
	t.url = "https://" + front
	return err
}

func (s *site) chisel(t *contender) error {
	at, err := addrs(3)
	if err != nil {
		return err
	}
	front, server, local := at[0], at[1], at[2]
	keyFile := filepath.Join(s.group.Dir(), "chisel.key")
	made, err := s.run("chisel", "server", "--keygen", keyFile)
	if err != nil {
		return err
	}
	if made.ExitCode() != 0 {
		return made.Failed()
	}
	if err := s.serve(t, server, func() (*process.Process, error) {
		return s.run("chisel", "server", "--reverse", "--host", "127.0.0.1", "--port", port(server),
			"--keyfile", keyFile, "--auth", "agent:secret")
	}); err != nil {
		return err
	}
	fingerprint := regexp.MustCompile(`Fingerprint (\S+)`).FindStringSubmatch(t.server[0].Log())
	if fingerprint == nil {
		return errors.New("chisel prints no fingerprint")
	}
	behind, err := s.far(server)
	if err != nil {
		return err
	}
	if err := s.join(t, "kubectl", "proxy", "--port", port(local)); err != nil {
		return err
	}
	t.url = "http://" + front
	return s.join(t, "chisel", "client", "--fingerprint", fingerprint[1], "--auth", "agent:secret", "http://"+behind,
		"R:"+front+":"+local)
}

// again is how a service manager keeps ssh running. ssh ends with it.
const again = `while :; do setpriv --pdeathsig TERM "$@"; sleep 0.1; done`

func (s *site) ssh(t *contender) error {
	at, err := addrs(3)
	if err != nil {
		return err
	}
	front, server, local := at[0], at[1], at[2]
	sshd, err := exec.LookPath("/usr/sbin/sshd")
	if err != nil {
		return fmt.Errorf("%w: install openssh-server and openssh-client", err)
	}
	dir, user := s.group.Dir(), os.Getenv("USER")
	if os.Geteuid() == 0 { // sshd demands the directory of its unit
		user = "root"
		if err := os.MkdirAll("/run/sshd", 0o755); err != nil {
			return err
		}
	}
	for _, name := range []string{"host", "user"} {
		if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f",
			filepath.Join(dir, name)).CombinedOutput(); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
	}
	hostKey, err := os.ReadFile(filepath.Join(dir, "host.pub"))
	if err != nil {
		return err
	}
	known := filepath.Join(dir, "known")
	if err := os.WriteFile(known, append([]byte("bench "), hostKey...), 0o600); err != nil {
		return err
	}
	if err := s.serve(t, server, func() (*process.Process, error) {
		return s.group.Start("sshd", nil, sshd, "-D", "-e", "-f", "/dev/null", "-o", "ListenAddress="+server,
			"-o", "HostKey="+filepath.Join(dir, "host"), "-o", "AuthorizedKeysFile="+filepath.Join(dir, "user.pub"),
			"-o", "StrictModes=no", "-o", "PidFile=none", "-o", "UsePAM=no", "-o", "AllowTcpForwarding=remote")
	}); err != nil {
		return err
	}
	behind, err := s.far(server)
	if err != nil {
		return err
	}
	if err := s.join(t, "kubectl", "proxy", "--port", port(local)); err != nil {
		return err
	}
	t.url = "http://" + front
	p, err := s.group.Start("ssh", nil, "sh", "-c", again, "sh", "ssh", "-N", "-T", "-F", "none",
		"-i", filepath.Join(dir, "user"), "-o", "UserKnownHostsFile="+known, "-o", "HostKeyAlias=bench",
		"-o", "ExitOnForwardFailure=yes", "-o", "ServerAliveInterval=10", "-p", port(behind), "-R", front+":"+local,
		user+"@127.0.0.1")
	t.agent = append(t.agent, p)
	return err
}

// certificate writes tls.crt and tls.key for both ends of a tunnel.
func (s *site) certificate() error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	certificate, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return err
	}
	private, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	for name, block := range map[string]*pem.Block{
		"tls.crt": {Type: "CERTIFICATE", Bytes: certificate}, "tls.key": {Type: "EC PRIVATE KEY", Bytes: private},
	} {
		if err := os.WriteFile(filepath.Join(s.group.Dir(), name), pem.EncodeToMemory(block), 0o600); err != nil {
			return err
		}
	}
	return nil
}
