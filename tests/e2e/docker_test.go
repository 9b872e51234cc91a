package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
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

// checkHealth runs the health checks of containers until the function that it returns is called. podman leaves that to
// systemd, and there is none here.
func (s *shell) checkHealth(containers ...string) (stop func()) {
	ctx, cancel := context.WithCancel(s.t.Context())
	var health sync.WaitGroup
	own := *s // whose directory stays
	health.Go(func() {
		for ctx.Err() == nil {
			for _, c := range containers {
				_, _ = own.run("docker healthcheck run " + c)
			}
			time.Sleep(500 * time.Millisecond)
		}
	})
	return func() { cancel(); health.Wait() }
}

// runByCompose runs the commands of the page that need Compose: the real one, which speaks Docker's API to podman.
func runByCompose(t *testing.T, p *page) {
	d := startDocker(t)
	d.must("mkdir manifests && cp -r " + filepath.Join(harness.Root(t), "manifests", "docker") + " manifests")
	unpin(t, filepath.Join(d.dir, "manifests", "docker", "compose.yaml"))
	// The cluster has another agent in pipeops-system.
	const outside = "pipeops-outside"
	do := func(commands string) {
		d.must(strings.NewReplacer("pipeops-system", outside, "team-a", "default").Replace(commands))
	}
	t.Cleanup(func() {
		if _, err := d.run("kubectl delete namespace/" + outside + " clusterrolebinding/pipeops-agent-001; " +
			"kubectl -n default delete rolebinding/agent-001"); err != nil {
			t.Error(err)
		}
	})
	do(p.whole(t, "kubectl create namespace pipeops-system"))
	do(p.whole(t, "kubectl -n team-a create rolebinding"))
	do(p.whole(t, "kubectl config view --raw"))
	d.must("ln -s " + filepath.Join(harness.Root(t), ".build") + " .")
	d.must(strings.ReplaceAll(p.command(t, "docker load"), "amd64", runtime.GOARCH))
	settings := "\nprintf %s 'PIPEOPS_NAMESPACE=" + outside + "\n" + d.settings + "' >>agent.env"
	files, _, found := strings.Cut(p.whole(t, "printf '%s\\n' PIPEOPS_AGENT_ID=agent-001"), "docker compose up -d")
	if !found {
		t.Fatal("the page does not start Compose")
	}
	do(files + settings)
	do(p.whole(t, "mkdir manifests/docker-2") + settings)
	do("cp -p manifests/docker/kubeconfig manifests/docker-2")
	defer d.checkHealth("pipeops-agent-bootstrap-1", "pipeops-agent-2-bootstrap-1")()

	first := d.dir + "/manifests/docker"
	for _, dir := range []string{first, first + "-2"} {
		d.dir = dir
		d.must(p.command(t, "docker compose up -d"))
	}
	d.waitAnswering(t, "agent-001", "your-agent-token")
	d.waitAnswering(t, "agent-002", "its-own-token")
	d.must("docker compose down --volumes")
	d.dir = first
	if out := d.must(p.command(t, "docker compose exec bootstrap")); strings.Contains(out, "failed") ||
		!strings.Contains(out, "may list pods") || !strings.Contains(out, "may not list nodes") {
		t.Errorf("doctor:\n%s", out)
	}
	// Another token.
	d.must("sed -i 's/your-agent-token/another-$agent-token/' agent.env")
	d.must(p.command(t, "docker compose up -d"))
	d.waitAnswering(t, "agent-001", "another-$agent-token")
	d.must(p.command(t, "docker compose down --volumes"))
	d.wantEmpty()
}
