package integration

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/pipeops/vm-agent/frpc"
	"github.com/pipeops/vm-agent/tests/harness"
	"github.com/pipeops/vm-agent/tests/harness/agent"
	"github.com/pipeops/vm-agent/tests/harness/controlplane"
)

// TestRunCommandPrintsAWorkingKubeconfig does what a new user does: make run, kubectl, curl, Ctrl-C. KUBECONFIG names
// the tests' cluster.
func TestRunCommandPrintsAWorkingKubeconfig(t *testing.T) {
	t.Parallel()
	w := &world{t: t, group: harness.NewGroup(t)}
	run, err := w.group.Start("run", []string{"KUBECONFIG=" + api.kubeconfig}, harness.Binary(t, "run"))
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	eventually(t, func() error {
		found = regexp.MustCompile(`export KUBECONFIG=(\S+)`).FindStringSubmatch(run.Log())
		if found == nil || !strings.Contains(run.Log(), "Ctrl-C") {
			return fmt.Errorf("it has not printed a kubeconfig:\n%s", run.Log())
		}
		return nil
	})
	w.caller = found[1]
	suggested := regexp.MustCompile(`(?m)^  kubectl (.+)$`).FindAllStringSubmatch(run.Log(), -1)
	if len(suggested) < 3 {
		t.Fatalf("it suggests no commands:\n%s", run.Log())
	}
	for i, command := range suggested {
		if got := w.mustKubectl(strings.Fields(command[1])...); i == 0 && !strings.Contains(got, "kube-system") {
			t.Errorf("the first command, kubectl %s, prints %q", command[1], got)
		}
	}
	pattern := regexp.MustCompile(`curl --cacert (\S+) -H "Authorization: Bearer \$\(cat (\S+)\)" (\S+)`)
	curl := pattern.FindStringSubmatch(run.Log())
	if curl == nil {
		t.Fatalf("it prints no command for the agent's own API:\n%s", run.Log())
	}
	ca, caErr := os.ReadFile(curl[1])
	token, err := os.ReadFile(curl[2])
	if info, statErr := os.Stat(curl[2]); errors.Join(caErr, err, statErr) != nil || info.Mode() != 0o600 {
		t.Fatal(caErr, err, statErr, info)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}}
	defer client.CloseIdleConnections()
	if resp, body := get(t, client, curl[3],
		http.Header{"Authorization": {"Bearer " + string(token)}}); resp.StatusCode != http.StatusOK ||
		!strings.Contains(body, `"connected":true`) {
		t.Errorf("curl: %s %s", resp.Status, body)
	}
	if err := syscall.Kill(run.Pid(), syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if code := run.ExitCode(); code != 0 {
		t.Errorf("exit code %d after Ctrl-C:\n%s", code, run.Log())
	}
	if _, err := os.Stat(filepath.Dir(w.caller)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("its directory is still there: %v", err)
	}
}

// TestControlPlaneCommandConnectsAnAgent connects an agent to the development control plane, which runs as a process
// of its own.
func TestControlPlaneCommandConnectsAnAgent(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	agents := filepath.Join(w.group.Dir(), "agents")
	if err := os.WriteFile(agents, []byte("agent-002=another-token\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	p, err := w.group.Start("controlplane", nil, harness.Binary(t, "controlplane"), "--agents", agents)
	if err != nil {
		t.Fatal(err)
	}
	cp := &controlplane.ControlPlane{}
	eventually(t, func() error {
		for line := range strings.Lines(p.Log()) {
			if strings.HasPrefix(line, "{") {
				return json.Unmarshal([]byte(line), cp)
			}
		}
		return fmt.Errorf("it has not printed its addresses:\n%s", p.Log())
	})
	if cp.CA, err = os.ReadFile(cp.CAFile); err != nil {
		t.Fatal(err)
	}
	a, err := agent.New(w.group, cp, "agent-002", "another-token", api.kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	harness.StartAgent(t, a)
	if err := agent.WriteCaller(w.caller, cp, "agent-002", "another-token"); err != nil {
		t.Fatal(err)
	}
	w.mustKubectl("get", "namespaces")
}

// TestFrpcAdminAPIReportsStatusAndStops uses the client of package frpc with the admin API of a stock frpc.
func TestFrpcAdminAPIReportsStatusAndStops(t *testing.T) {
	t.Parallel()
	w := connected(t)
	lease, err := frpc.ReadLease(w.agent.RunDir)
	if err != nil {
		t.Fatal(err)
	}
	client := lease.Frpc.Admin
	proxies, err := client.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := frpc.ProxyStatus{Name: lease.Frpc.Tunnel.Name, Type: "https", Status: "running",
		RemoteAddr: proxies[0].RemoteAddr}
	if len(proxies) != 1 || proxies[0] != want || !strings.HasPrefix(want.RemoteAddr, agentID+".") {
		t.Errorf("got %+v, want %+v", proxies, want)
	}
	wrong := lease.Frpc.Admin
	wrong.Password = "wrong"
	if err := wrong.Stop(t.Context()); err == nil || !strings.Contains(err.Error(), "401 Unauthorized to POST /api/stop") {
		t.Errorf("a wrong password: %v", err)
	}
	if err := client.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if code := w.agent.Frpc.ExitCode(); code != 0 {
		t.Errorf("frpc's exit code is %d", code)
	}
	if _, err := client.Status(t.Context()); err == nil || !strings.Contains(err.Error(), "does not answer") {
		t.Errorf("after its end: %v", err)
	}
}

// TestRunDirectoryIsPrivate checks the modes of the files, because they hold credentials.
func TestRunDirectoryIsPrivate(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.bootstrapOnce()
	files, err := os.ReadDir(w.agent.RunDir)
	if err != nil {
		t.Fatal(err)
	}
	if len(files) != 5 { // frpc.toml, frp.token, lease.json, tls.crt and tls.key
		t.Errorf("the run directory holds %v", files)
	}
	for _, f := range files {
		info, err := f.Info()
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode() != 0o600 {
			t.Errorf("%s has mode %v", f.Name(), info.Mode())
		}
		data, err := os.ReadFile(filepath.Join(w.agent.RunDir, f.Name()))
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(data), agentToken) {
			t.Errorf("%s holds the agent's token, which frpc has no need of", f.Name())
		}
	}
}

// TestSIGUSR1ChangesTheLogLevel checks that SIGUSR1 turns the level debug on, and the next one off.
func TestSIGUSR1ChangesTheLogLevel(t *testing.T) {
	t.Parallel()
	w := connected(t)
	probes := func() int { return strings.Count(w.agent.Proxy.Log(), `"level":"DEBUG","msg":"request"`) }
	probe := func() { _, _ = get(t, http.DefaultClient, w.agent.Operations+"/health", nil) }
	if probe(); probes() != 0 {
		t.Fatal("probes are logged at level info")
	}
	for i, level := range []string{"DEBUG", "INFO"} {
		if err := syscall.Kill(w.agent.Proxy.Pid(), syscall.SIGUSR1); err != nil {
			t.Fatal(err)
		}
		eventually(t, func() error {
			if !strings.Contains(w.agent.Proxy.Log(), `"log level changed","level":"`+level+`"`) {
				return fmt.Errorf("the log does not say that the level is %s", level)
			}
			return nil
		})
		before := probes()
		probe()
		eventually(t, func() error { // a line is logged after its answer is sent
			if shown := probes() > before; shown != (i == 0) {
				return fmt.Errorf("level %s: probes are shown: %v", level, shown)
			}
			return nil
		})
	}
}
