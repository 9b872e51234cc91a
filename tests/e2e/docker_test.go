package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pipeops/vm-agent/tests/harness"
	"github.com/pipeops/vm-agent/tests/harness/process"
)

// docker is podman under the name docker, with a store of its own, and an operator's own frps for its containers. It
// runs in the node's namespaces: so its ports collide with nobody's, and what it starts ends with the node at the
// latest.
type docker struct {
	*shell
	*ownFrps
}

func startDocker(t *testing.T) *docker {
	t.Helper()
	group := harness.NewGroup(t)
	dir := group.Dir()
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	podman := fmt.Sprintf("podman --root %[1]s/store --runroot %[1]s/run --tmpdir %[1]s/tmp "+
		"--storage-driver vfs --cgroup-manager cgroupfs --events-backend file", dir)
	socket := "unix://" + filepath.Join(dir, "podman.sock")
	settings := filepath.Join(dir, "containers.conf")
	d := &docker{shell: newShell(t, dir, "CONTAINERS_CONF="+settings, "DOCKER_HOST="+socket,
		"KUBECONFIG="+node.Kubeconfig)}
	// Otherwise podman would raise the limits, which fails without CAP_SYS_RESOURCE, and share its locks and networks with
	// other podmans.
	limits := "[containers]\ndefault_ulimits = [\"nofile=1024:1024\", \"nproc=1024:1024\"]\n" +
		"[engine]\nlock_type = \"file\"\n[network]\nnetwork_config_dir = \"" + dir + "/networks\"\n"
	if err := os.WriteFile(settings, []byte(limits), 0o600); err != nil {
		t.Fatal(err)
	}
	d.program("docker", `if [ "$1" = compose ]; then shift; exec docker-compose "$@"; fi; `+inNode(podman))
	d.program("sudo", `exec "$@"`)
	t.Cleanup(func() {
		if t.Failed() {
			for _, name := range []string{"bootstrap", "frpc", "proxy", "frps"} {
				out, err := d.run("docker logs --tail 20 $(docker ps --all --quiet --filter name=" + name + ")")
				t.Logf("log of %s: %v\n%s", name, err, out)
			}
		}
		const clean = "docker rm --all --force --time 1; docker network prune --force; " +
			"docker volume rm --all --force; docker rmi --all --force"
		if _, err := d.run(clean); err != nil {
			t.Error(err)
		}
		// podman's service, and the monitors of `exec` commands, which would run for five minutes more.
		if out, err := node.Command(context.Background(), "pkill", "-KILL", "-f",
			dir+"/(podman.sock|run)").CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
		if err := process.Poll(context.Background(), 10*time.Second, nil, func() error {
			_, err := d.run("find /sys/fs/cgroup -depth -type d -path '*/libpod_parent*' -delete")
			return err
		}); err != nil {
			t.Error(err)
		}
	})
	if _, err := group.Start("podman", d.env, filepath.Join(dir, "bin", "docker"), "system", "service", "--time", "0",
		socket); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		_, err := os.Stat(strings.TrimPrefix(socket, "unix://"))
		return err
	})
	for _, archive := range archives(t) {
		d.must("docker load --quiet --input " + archive)
	}
	d.ownFrps = startFrps(t, group)
	return d
}

// inNode returns a line of shell that runs a command, with the script's arguments, in the node's namespaces.
func inNode(command string) string {
	return "exec " + strings.Join(node.Command(context.Background(), "sh").Args, " ") + ` -c 'cd "$0" && exec ` +
		command + ` "$@"' "$PWD" "$@"`
}

// runByDocker runs the commands of the page that need no Compose.
func runByDocker(t *testing.T, p *page) {
	d := startDocker(t)
	d.must("printf %s '" + d.settings + "PIPEOPS_AGENT_ID=agent-001\nPIPEOPS_AGENT_TOKEN=your-agent-token\n' >agent.env")
	d.must("install -o 65532 -m 400 $KUBECONFIG kubeconfig")
	d.must(p.block(t, "docker volume create"))
	d.waitAnswering(t, "agent-001", "your-agent-token")
	d.must(p.block(t, "docker rm --force"))
	d.wantEmpty()
}

// wantEmpty checks that no container and no volume is left.
func (d *docker) wantEmpty() {
	d.t.Helper()
	if out := d.must("docker ps --all --quiet; docker volume ls --quiet"); out != "" {
		d.t.Errorf("left: %s", out)
	}
}

// runByCompose runs the commands of the page that need Compose: the real one, which speaks Docker's API to podman.
func runByCompose(t *testing.T, p *page) {
	d := startDocker(t)
	d.must("mkdir manifests && cp -r " + filepath.Join(harness.Root(t), "manifests", "docker") + " manifests")
	unpin(t, filepath.Join(d.dir, "manifests", "docker", "compose.yaml"))
	files := p.block(t, "cd manifests/docker")
	files, _, found := strings.Cut(files, p.command(t, "docker compose up -d"))
	if !found {
		t.Fatal("the page does not start Compose")
	}
	d.must(files + "printf %s '" + d.settings + "' >>agent.env")

	// podman has systemd run the health checks, and there is no systemd here.
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
	d.waitAnswering(t, "agent-001", "your-agent-token")
	if out := d.must(p.command(t, "docker compose exec bootstrap")); strings.Contains(out, "failed") {
		t.Errorf("doctor:\n%s", out)
	}
	// Another token.
	d.must("sed -i 's/your-agent-token/another-$agent-token/' agent.env")
	d.must(p.command(t, "docker compose up -d"))
	d.waitAnswering(t, "agent-001", "another-$agent-token")
	d.must(p.command(t, "docker compose down --volumes"))
	d.wantEmpty()
}
