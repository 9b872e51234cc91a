package e2e

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/pipeops/vm-agent/tests/process"
)

// docker is podman under the name of docker, with a store of its own; and an operator's own frps for what it runs.
type docker struct {
	*shell
	settings string // of an agent, for that frps
	vhost    int    // port where frps takes callers
}

func startDocker(t *testing.T) *docker {
	t.Helper()
	group, err := process.NewGroup()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(group.Close)
	dir, root := group.Dir(), repository(t)
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	podman := fmt.Sprintf("podman --root %[1]s/store --runroot %[1]s/run --tmpdir %[1]s/tmp --storage-driver vfs --cgroup-manager cgroupfs --events-backend file", dir)
	socket := "unix://" + filepath.Join(dir, "podman.sock")
	settings := filepath.Join(dir, "containers.conf")
	d := &docker{shell: newShell(t, dir, "CONTAINERS_CONF="+settings, "DOCKER_HOST="+socket, "KUBECONFIG="+node.Kubeconfig)}
	// podman would raise the limits, for which some machines lack CAP_SYS_RESOURCE.
	if err := os.WriteFile(settings, []byte("[containers]\ndefault_ulimits = [\"nofile=1024:1024\", \"nproc=1024:1024\"]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	d.program("docker", `if [ "$1" = compose ]; then shift; exec docker-compose "$@"; fi; exec `+podman+` "$@"`)
	d.program("sudo", `exec "$@"`)
	t.Cleanup(func() {
		if t.Failed() {
			for _, name := range []string{"bootstrap", "frpc", "proxy"} {
				out, err := d.run("docker logs --tail 20 $(docker ps --all --quiet --filter name=" + name + ")")
				t.Logf("log of %s: %v\n%s", name, err, out)
			}
		}
		if _, err := d.run("docker rm --all --force --time 1; docker volume rm --all --force; docker rmi --all --force"); err != nil {
			t.Error(err)
		}
	})
	if _, err := group.Start("podman", d.env, filepath.Join(dir, "bin", "docker"), "system", "service", "--time", "0", socket); err != nil {
		t.Fatal(err)
	}
	for _, image := range []string{"vm-agent-" + runtime.GOARCH + ".tar", "frpc.tar"} {
		d.must("docker load --quiet --input " + filepath.Join(root, ".build", "images", image))
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
		"--vhost-http-port", fmt.Sprint(ports[1]), "--subdomain-host", "example.internal", "--token", "your-$frp-token"); err != nil {
		t.Fatal(err)
	}
	d.vhost = ports[1]
	d.settings = fmt.Sprintf("PIPEOPS_FRP_TOKEN=your-$frp-token\nPIPEOPS_FRP_SERVER_ADDR=127.0.0.1\nPIPEOPS_FRP_SERVER_PORT=%d\n", ports[0])
	return d
}

// answers waits until the node's API server answers the agent's callers.
func (d *docker) answers(token string) {
	d.t.Helper()
	eventually(d.t, func() error {
		req, err := http.NewRequestWithContext(d.t.Context(), http.MethodGet, fmt.Sprintf("http://127.0.0.1:%d/api/k8s/version", d.vhost), nil)
		if err != nil {
			return err
		}
		req.Host = "agent-001.example.internal"
		req.Header.Set("Authorization", "Bearer "+token)
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

// runByDocker runs the lines that need no Compose.
func runByDocker(t *testing.T, p *page) {
	d := startDocker(t)
	d.must("printf %s '" + d.settings + "PIPEOPS_AGENT_ID=agent-001\nPIPEOPS_AGENT_TOKEN=your-agent-token\n' >agent.env")
	d.must("install -o 65532 -m 400 $KUBECONFIG kubeconfig")
	d.must(p.block(t, "docker volume create"))
	d.answers("your-agent-token")
}

// runByCompose runs those that do, by Compose itself, which talks to podman in Docker's language.
func runByCompose(t *testing.T, p *page) {
	d := startDocker(t)
	d.must("mkdir manifests && cp -r " + filepath.Join(repository(t), "manifests", "docker") + " manifests")
	files := p.block(t, "cd manifests/docker")
	files, _, found := strings.Cut(files, p.command(t, "docker compose up -d"))
	if !found {
		t.Fatal("the page does not start Compose")
	}
	d.must(files + "printf %s '" + d.settings + "' >>agent.env")

	// podman asks systemd to look after the containers' health. There is none here.
	ctx, cancel := context.WithCancel(t.Context())
	var health sync.WaitGroup
	defer health.Wait()
	defer cancel()
	top := *d.shell
	health.Go(func() {
		for ctx.Err() == nil {
			_, _ = top.run("docker healthcheck run pipeops-agent-bootstrap-1; sleep 0.5")
		}
	})
	d.dir = filepath.Join(d.dir, "manifests", "docker")
	d.must(p.command(t, "docker compose up -d"))
	d.answers("your-agent-token")
	if out := d.must(p.command(t, "docker compose exec bootstrap")); strings.Contains(out, "failed") {
		t.Errorf("doctor:\n%s", out)
	}
	// Another token.
	d.must("sed -i 's/your-agent-token/another-$agent-token/' agent.env")
	d.must(p.command(t, "docker compose up -d"))
	d.answers("another-$agent-token")
	d.must(p.command(t, "docker compose down --volumes"))
	if out := d.must("docker ps --all --quiet; docker volume ls --quiet"); out != "" {
		t.Errorf("left: %s", out)
	}
}
