package integration

import (
	"crypto/tls"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pipeops/vm-agent/tests/harness"
	"github.com/pipeops/vm-agent/tests/harness/agent"
	"github.com/pipeops/vm-agent/tests/harness/process"
)

// TestOwnFrpsServesKubectl needs no control plane: the frps of manifests/frps, two replicas of an agent with a
// certificate of their own, and kubectl with the kubeconfig that bootstrap prints. The certificate is replaced and a
// replica stops while kubectl works.
func TestOwnFrpsServesKubectl(t *testing.T) {
	t.Parallel()
	for _, identity := range []string{"agent", "own"} {
		t.Run(identity, func(t *testing.T) {
			w := newAccessWorld(t, identity)
			env, callers := ownFrpsFromManifests(t, w)
			authority := harness.NewAuthority(t)
			if identity == "own" {
				env = append(env, "PIPEOPS_PROXY_TLS_CLIENT_CA_FILE="+writeFile(t, "clients.crt", authority.PEM))
			}
			certificates := t.TempDir()
			w.command(t, "certificate", "--dir", certificates, agentID+".k8s.example.com")
			env = append(env, "PIPEOPS_PROXY_TLS_CERT_FILE="+filepath.Join(certificates, "tls.crt"),
				"PIPEOPS_PROXY_TLS_KEY_FILE="+filepath.Join(certificates, "tls.key"))
			w.agent.Env = append(w.agent.Env, append(env, "PIPEOPS_INSTANCE=first")...)
			w.startAgent()
			if out := w.command(t, "doctor"); !strings.Contains(out, "ok       proxy") { // the certificate lacks the agent's id
				t.Error(out)
			}
			second, err := agent.New(w.group, w.cp, "second", agentToken, api.kubeconfig)
			if err != nil {
				t.Fatal(err)
			}
			for _, setting := range w.agent.Env { // the id too, but not what New chooses for each
				if name, _, _ := strings.Cut(setting, "="); !strings.HasSuffix(name, "_ADDR") && name != "PIPEOPS_RUN_DIR" &&
					name != "PIPEOPS_FRP_ADMIN_PORT" || name == "PIPEOPS_FRP_SERVER_ADDR" {
					second.Env = append(second.Env, setting)
				}
			}
			second.Env = append(second.Env, "PIPEOPS_INSTANCE=second")
			harness.StartAgent(t, second)

			dir := t.TempDir()
			config := filepath.Join(dir, "kubeconfig")
			certificate, key := authority.Client(t, "alice")
			for name, data := range map[string]string{
				"kubeconfig":       w.command(t, "kubeconfig", "--server", "https://"+callers),
				agentID + ".token": w.tokens["alice"], agentID + ".crt": string(certificate), agentID + ".key": string(key),
			} {
				if identity == "agent" && strings.HasSuffix(name, ".token") {
					data = agentToken
				}
				if err := os.WriteFile(filepath.Join(dir, name), []byte(data), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			name, port, _ := net.SplitHostPort(callers)
			// In place of DNS. The name stays the one that frps and the certificate know.
			address := []string{"--server", "https://127.0.0.1:" + port + "/api/k8s", "--tls-server-name", name}
			kubectl := func(args ...string) {
				t.Helper()
				if r := w.kubectl(config, "", append(append(args, "-n", w.ns), address...)...); r.Code != 0 {
					t.Errorf("kubectl %q: %s", args, r.Stderr)
				}
			}
			kubectl("create", "configmap", "through-frps", "--from-literal=a=b")
			shown := func() string {
				conn, err := tls.Dial("tcp", "127.0.0.1:"+port, &tls.Config{ServerName: name, InsecureSkipVerify: true})
				if err != nil {
					return err.Error()
				}
				defer func() { _ = conn.Close() }()
				return conn.ConnectionState().PeerCertificates[0].SerialNumber.String()
			}
			before := shown()
			for _, file := range []string{"tls.crt", "tls.key"} {
				if err := os.Remove(filepath.Join(certificates, file)); err != nil {
					t.Fatal(err)
				}
			}
			w.command(t, "certificate", "--dir", certificates, name)
			new := 0 // in a row: of both replicas
			if err := process.Poll(t.Context(), 30*time.Second, nil, func() error {
				kubectl("get", "configmap", "through-frps")
				if new++; shown() == before {
					new = 0
				}
				if new < 4 {
					return fmt.Errorf("%s still shows the old certificate", name)
				}
				return nil
			}); err != nil {
				t.Error(err)
			}
			w.agent.Proxy.Stop()
			for range 5 {
				kubectl("get", "configmap", "through-frps")
			}
		})
	}
}

// command runs a command of bootstrap, and returns what it prints.
func (w *world) command(t *testing.T, args ...string) string {
	t.Helper()
	p, err := w.agent.Command(args...)
	if err != nil {
		t.Fatal(err)
	}
	if p.ExitCode() != 0 {
		t.Fatal(p.Failed())
	}
	return p.Log()
}

// ownFrpsFromManifests starts frps as manifests/frps has it, on other ports. It returns the settings of its agents, and
// the address that callers of the agent connect to.
func ownFrpsFromManifests(t *testing.T, w *accessWorld) (env []string, callers string) {
	t.Helper()
	dir := t.TempDir()
	data, err := os.ReadFile(filepath.Join(harness.Root(t), "manifests", "frps", "frps.toml"))
	if err != nil {
		t.Fatal(err)
	}
	toml := strings.ReplaceAll(string(data), `"/etc/frp/`, `"`+dir+"/")
	ports := map[string]int{"bindPort = 7000": 0, "vhostHTTPSPort = 8443": 0, "webServer.port = 7500": 0}
	for setting := range ports {
		if ports[setting], err = process.FreePort(); err != nil || !strings.Contains(toml, setting) {
			t.Fatalf("frps.toml has no %s; %v", setting, err)
		}
		key, _, _ := strings.Cut(setting, "=")
		toml = strings.Replace(toml, setting, fmt.Sprintf("%s= %d", key, ports[setting]), 1)
	}
	w.command(t, "certificate", "--dir", dir, "frps.k8s.example.com")
	for name, text := range map[string]string{"frps.toml": toml, "token": "token-of-this-frps\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	p, err := w.group.Start("own-frps", nil, harness.Binary(t, "frps"), "-c", filepath.Join(dir, "frps.toml"))
	if err == nil {
		err = process.Poll(t.Context(), 10*time.Second, p.Done(), func() error {
			return process.Listening(fmt.Sprintf("127.0.0.1:%d", ports["bindPort = 7000"]))
		})
	}
	if err != nil {
		t.Fatal(err)
	}
	return []string{
		"PIPEOPS_API_URL=https://" + harness.FreeAddr(t), // nobody is there
		"PIPEOPS_FRP_TOKEN_FILE=" + filepath.Join(dir, "token"),
		fmt.Sprintf("PIPEOPS_FRP_SERVER_PORT=%d", ports["bindPort = 7000"]),
		"PIPEOPS_FRP_TLS_CA_FILE=" + filepath.Join(dir, "ca.crt"), "PIPEOPS_FRP_TLS_SERVER_NAME=frps.k8s.example.com",
		"PIPEOPS_FRP_TUNNEL_SUBDOMAIN_HOST=k8s.example.com",
		"PIPEOPS_FRP_TUNNEL_GROUP=" + agentID, "PIPEOPS_FRP_TUNNEL_GROUP_KEY=key-of-the-group",
	}, fmt.Sprintf("%s.k8s.example.com:%d", agentID, ports["vhostHTTPSPort = 8443"])
}
