package e2e

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/pipeops/vm-agent/tests/process"
)

// TestDockerRun runs the lines of manifests/README.md that need no Compose, as they stand there, by podman under the
// name of docker, with an operator's own frps; and reaches the node's API server through all of it.
func TestDockerRun(t *testing.T) {
	group, err := process.NewGroup()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(group.Close)
	dir, root := group.Dir(), repository(t)
	// A store of its own, so that nothing is left of it.
	docker := filepath.Join(dir, "docker")
	script := fmt.Sprintf("#!/bin/sh\nexec podman --root %[1]s/store --runroot %[1]s/run --tmpdir %[1]s/tmp --storage-driver vfs --cgroup-manager cgroupfs --events-backend none \"$@\"\n", dir)
	if err := os.WriteFile(docker, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	// podman would raise the limits, for which some machines lack CAP_SYS_RESOURCE.
	settings := filepath.Join(dir, "containers.conf")
	if err := os.WriteFile(settings, []byte("[containers]\ndefault_ulimits = [\"nofile=1024:1024\", \"nproc=1024:1024\"]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	sh := func(command string) (string, error) {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, "sh", "-ec", command)
		cmd.Dir, cmd.Env = dir, []string{"PATH=" + dir + ":" + os.Getenv("PATH"), "HOME=" + dir, "CONTAINERS_CONF=" + settings}
		out, err := cmd.CombinedOutput()
		if err != nil {
			err = fmt.Errorf("%s: %w: %s", command, err, out)
		}
		return string(out), err
	}
	must := func(command string) {
		t.Helper()
		if _, err := sh(command); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		if t.Failed() {
			for _, name := range []string{"bootstrap", "frpc", "proxy"} {
				out, err := sh("docker logs --tail 20 pipeops-" + name)
				t.Logf("log of %s: %v\n%s", name, err, out)
			}
		}
		if _, err := sh("docker rm --all --force --time 1; docker volume rm --all --force; docker rmi --all --force"); err != nil {
			t.Error(err)
		}
	})
	for _, image := range []string{"vm-agent-" + runtime.GOARCH + ".tar", "frpc.tar"} {
		must("docker load --quiet --input " + filepath.Join(root, ".build", "images", image))
	}

	frps, err := process.Binary("frps")
	if err != nil {
		t.Fatal(err)
	}
	var ports [2]int
	for i := range ports {
		if ports[i], err = process.FreePort(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := group.Start("frps", nil, frps, "--bind-addr", "127.0.0.1", "--bind-port", fmt.Sprint(ports[0]),
		"--vhost-http-port", fmt.Sprint(ports[1]), "--subdomain-host", "example.internal", "--token", "your-frp-token"); err != nil {
		t.Fatal(err)
	}
	env := fmt.Sprintf("PIPEOPS_AGENT_ID=agent-001\nPIPEOPS_AGENT_TOKEN=your-agent-token\nPIPEOPS_FRP_TOKEN=your-frp-token\nPIPEOPS_FRP_SERVER_ADDR=127.0.0.1\nPIPEOPS_FRP_SERVER_PORT=%d\n", ports[0])
	if err := os.WriteFile(filepath.Join(dir, "agent.env"), []byte(env), 0o600); err != nil {
		t.Fatal(err)
	}
	must("chmod 711 . && install -o 65532 -m 400 " + node.Kubeconfig + " kubeconfig")
	must(readmeLines(t, filepath.Join(root, "manifests", "README.md"), "The same without Compose"))

	eventually(t, func() error {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, fmt.Sprintf("http://127.0.0.1:%d/api/k8s/version", ports[1]), nil)
		if err != nil {
			return err
		}
		req.Host = "agent-001.example.internal"
		req.Header.Set("Authorization", "Bearer your-agent-token")
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return err
		}
		_ = resp.Body.Close()
		if resp.StatusCode != http.StatusOK || resp.Header.Get("Pipeops-Agent") != "agent-001" {
			return fmt.Errorf("through the tunnel: %s", resp.Status)
		}
		return nil
	})
}

// readmeLines are the commands of the first block of code after a text.
func readmeLines(t *testing.T, path, after string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	_, rest, found := strings.Cut(string(data), after)
	var lines []string
	for line := range strings.Lines(rest) {
		if code, ok := strings.CutPrefix(line, "    "); ok {
			lines = append(lines, code)
		} else if len(lines) > 0 {
			break
		}
	}
	if !found || len(lines) == 0 {
		t.Fatalf("%s has no commands after %q", path, after)
	}
	return strings.Join(lines, "")
}
